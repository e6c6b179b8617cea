"""Which requests of HTTP/1 pass, each with the reason why."""

import pytest
from http_guard_bed import NAME, OTHER_NAME, RIGHT_SITE, bytewise, generous, given, request, rules

from ipc.messages import HttpRules
from workers.proxy.http_guard.guard import Guard
from workers.proxy.http_guard.head import MAX_FIELDS, MAX_HEAD_BYTES
from workers.proxy.http_guard.rules import rules_for

PASS = 0

HOSTS = [
    # Each Host with its status and the reason.
    ("app.demo.test", PASS, "the name"),
    ("APP.Demo.TEST", PASS, "names know no case"),
    ("app.demo.test.", PASS, "the full form of the name"),
    ("app.demo.test:80", PASS, "any port: the connection has one already"),
    ("app.demo.test.:8080", PASS, "both"),
    ("app.demo.test:", PASS, "RFC 3986 allows an empty port, and it changes nothing"),
    ("app.demo.test:0", PASS, "a port number, though nobody listens there"),
    ("app.demo.test:65535", PASS, "the last port"),
    (" \tapp.demo.test \t", PASS, "space around a value is none of it"),
    (OTHER_NAME, PASS, "http_hosts has it"),
    (f"{OTHER_NAME}.:1", PASS, "the same rules for those"),
    ("app.demo.test:65536", 421, "no port"),
    ("app.demo.test:99999", 421, "no port"),
    ("app.demo.test:000080", 421, "no port that anyone writes"),
    ("app.demo.test:+80", 421, "no digits"),
    ("app.demo.test:80:80", 421, "two ports"),
    ("app.demo.test..", 421, "one final dot at most"),
    (".app.demo.test", 421, "an empty label"),
    ("demo.test", 421, "the domain above"),
    ("x.app.demo.test", 421, "a name below"),
    ("app.demo.testx", 421, "a longer name"),
    ("evil.test", 421, "the page's own name: rebinding"),
    ("", 421, "empty"),
    (":80", 421, "no name"),
    (".", 421, "the root"),
    ("a b", 421, "no name"),
    ("app.demo.test evil.test", 421, "a list"),
    ("app.demo.test,evil.test", 421, "a list"),
    ("app.demo.test, app.demo.test", 421, "a list, even of the same"),
    ("user@app.demo.test", 421, "user information"),
    ("evil.test@app.demo.test", 421, "user information"),
    ("http://app.demo.test", 421, "no authority"),
    ("app.demo.test/", 421, "no authority"),
    ("app.demo.test\\", 421, "no name"),
    ("app%2edemo.test", 421, "percent-encoded: browsers never send it, servers may decode it"),
    ("app.demo.t\xe9st", 421, "8-bit: international names come as xn--"),
    ("xn--bcher-kva.demo.test", 421, "an international name, but another"),
    ("100.64.0.5", 421, "an address: a page may use it without any rebinding"),
    ("100.64.0.5:80", 421, "an address"),
    ("[fd00::1]", 421, "an address"),
    ("[fd00::1]:80", 421, "an address"),
    ("[app.demo.test]", 421, "no address"),
    ("localhost", 421, "another name"),
    ('"app.demo.test"', 421, "quotes"),
    ("app.demo.test\x0b", 421, "a control character is no space"),
    ("app.demo.test#", 421, "no authority"),
]


@pytest.mark.parametrize(("host", "status", "why"), HOSTS, ids=[repr(row[0]) for row in HOSTS])
def test_host(host, status, why):
    sent = request(host=host)
    outcome = given(sent, chosen=generous())
    assert outcome.status == status, why
    assert outcome.passed == (b"" if status else sent)


def test_names_of_253_bytes_and_international_names():
    name = ".".join(["a" * 49] * 5)[:253]
    longest = f"{name}{'b' * (253 - len(name))}"
    for right in (longest, "xn--bcher-kva.demo.test", "a_b.demo.test"):
        assert not given(request(host=right.upper()), chosen=rules(right)).refusal
        assert not given(request(host=f"{right}.:65535"), chosen=rules(right)).refusal
        assert given(request(host=f"{right}x"), chosen=rules(right)).status == 421


HEADS = [
    # Each head with its status and the reason.
    (b"GET / HTTP/1.1\r\nHost:app.demo.test\r\n\r\n", PASS, "no space behind the colon"),
    (b"GET / HTTP/1.0\r\nHost: app.demo.test\r\n\r\n", PASS, "1.0 with Host"),
    (b"GET / HTTP/1.0\r\n\r\n", 421, "1.0 without Host: a page cannot, but nothing says the app"),
    (b"GET / HTTP/1.1\r\n\r\n", 421, "no Host"),
    (b"FOO / HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", PASS, "any method"),
    (b"foo / HTTP/1.1\r\nHost: evil.test\r\n\r\n", 421, "a page may choose the method"),
    (b"!#$%&'*+-.^_`|~9 / HTTP/1.1\r\nHost: evil.test\r\n\r\n", 421, "all that a method may be"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\nHost: app.demo.test\r\n\r\n", 400, "two"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\nhOST: evil.test\r\n\r\n", 400, "two"),
    (b"GET / HTTP/1.1\r\nHost : app.demo.test\r\n\r\n", 400, "space before the colon"),
    (b"GET / HTTP/1.1\r\nHost\t: app.demo.test\r\n\r\n", 400, "tab before the colon"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\nX : 1\r\n\r\n", 400, "in any field"),
    (b"GET / HTTP/1.1\r\n Host: app.demo.test\r\n\r\n", 400, "space before the first field"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\n evil.test\r\n\r\n", 400, "folded"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\nX: 1\r\n\tHost: evil\r\n\r\n", 400, "folded"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\nX: 1\r\n\r\n", 400, "bare LF"),
    (b"GET / HTTP/1.1\nHost: evil.test\n\n", 400, "bare LFs only, which most servers take"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\rX: 1\r\n\r\n", 400, "bare CR"),
    (b"GET / HTTP/1.1\r\nX: 1\r\rHost: evil.test\r\n\r\n", 400, "bare CR"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\nX: \0\r\n\r\n", 400, "NUL"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\nX\r\n\r\n", 400, "no colon"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\n: x\r\n\r\n", 400, "no name"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\nX(: x\r\n\r\n", 400, "no token"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\nX\xe9: x\r\n\r\n", 400, "no token"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\nX: \xe9\x01\r\n\r\n", PASS, "odd, not ambiguous"),
    (b"GET / HTTP/1.1\r\nHost: app.demo.test\r\nX:\r\n\r\n", PASS, "empty values are right"),
    (b"GET / HTTP/1.1 \r\nHost: app.demo.test\r\n\r\n", 400, "space behind the version"),
    (b"GET / HTTP/1.2\r\nHost: app.demo.test\r\n\r\n", 400, "no such version"),
    (b"GET / HTTP/1.10\r\nHost: app.demo.test\r\n\r\n", 400, "no such version"),
    (b"GET / HTTP/1.\r\nHost: app.demo.test\r\n\r\n", 400, "no version"),
    (b"GET / HTTP/0.9\r\nHost: evil.test\r\n\r\n", 400, "0.9 has no version in it"),
    (b"GET / HTTP/2.0\r\nHost: evil.test\r\n\r\n", 400, "2 has other heads, some servers take it"),
    (b"GET / http/1.1\r\nHost: evil.test\r\n\r\n", 400, "some servers take it"),
    (b"GET  / HTTP/1.1\r\nHost: evil.test\r\n\r\n", 400, "servers split at any space"),
    (b"GET /  HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 400, "servers split at any space"),
    (b"GET /\xc3\xbc HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", PASS, "curl sends what is typed"),
    (b"GET /\xc3\xbc HTTP/1.1\r\nHost: evil.test\r\n\r\n", 421, "but not elsewhere"),
    (b"GET //evil.test/ HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", PASS, "a path"),
    (b"GET http://app.demo.test/ HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", PASS, "they agree"),
    (b"GET HTTP://App.demo.test.:80 HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", PASS, "they agree"),
    (b"GET http://app.demo.test?x HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", PASS, "they agree"),
    (b"GET http://app.demo.test/ HTTP/1.0\r\n\r\n", PASS, "named once"),
    (b"GET http://evil.test/ HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 421, "the target counts"),
    (b"GET http://app.demo.test/ HTTP/1.1\r\nHost: evil.test\r\n\r\n", 421, "not for all servers"),
    (b"GET http://app.demo.test/ HTTP/1.1\r\nHost: alias.corp.test\r\n\r\n", 400, "both right"),
    (b"GET http://u@app.demo.test/ HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 421, "user"),
    (b"GET http://app.demo.test\\@evil.test/ HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 421, "\\"),
    (b"GET http:///x HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 421, "empty authority"),
    (b"GET http:evil.test HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 400, "none of the forms"),
    (b"GET x HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 400, "none of the forms"),
    (b"GET ?x HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 400, "none of the forms"),
    (b"OPTIONS * HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", PASS, "asterisk-form"),
    (b"OPTIONS * HTTP/1.1\r\nHost: evil.test\r\n\r\n", 421, "asterisk-form"),
    (b"GET * HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 400, "for OPTIONS only"),
    (b"CONNECT app.demo.test:80 HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", PASS, "to itself"),
    (b"CONNECT evil.test:80 HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 421, "to another"),
    (b"CONNECT evil.test:80 HTTP/1.1\r\nHost: evil.test:80\r\n\r\n", 421, "to another"),
    (b"GET app.demo.test:80 HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 400, "for CONNECT only"),
    (b"PRI * HTTP/1.1\r\nHost: app.demo.test\r\n\r\n", 400, "no preface"),
    (b"PRI * HTTP/2.0\r\nHost: app.demo.test\r\n\r\n", 400, "no preface"),
    (b"PRI * HTTP/2.0\r\n\r\nSX\r\n\r\n", 400, "no preface"),
    (b"PRI  * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "no preface"),
]


@pytest.mark.parametrize(("head", "status", "why"), HEADS, ids=[repr(row[0]) for row in HEADS])
def test_head(head, status, why):
    for pieces in ([head], bytewise(head)):
        outcome = given(*pieces, chosen=generous())
        assert outcome.status == status, why
        assert outcome.passed == (b"" if status else head)


FRAMING = [
    # Each fields with its status and the reason.
    (["Content-Length: 0"], PASS, "no body"),
    (["Content-Length: 5"], PASS, "five bytes"),
    (["Content-Length:\t5 "], PASS, "space around a value is none of it"),
    (["Content-Length: +5"], 400, "some parse the sign"),
    (["Content-Length: -5"], 400, "negative"),
    (["Content-Length: 5, 5"], 400, "servers take the first, the last or none"),
    (["Content-Length: 5", "Content-Length: 5"], 400, "the same twice: nobody sends it in earnest"),
    (["Content-Length: 5", "content-length: 6"], 400, "which?"),
    (["Content-Length: 0x5"], 400, "hexadecimal"),
    (["Content-Length: 05"], 400, "octal for some"),
    (["Content-Length: 5 5"], 400, "two numbers"),
    (["Content-Length: 5;"], 400, "no number"),
    (["Content-Length: 5_0"], 400, "a number for Python only"),
    (["Content-Length: \xb2"], 400, "a digit for Unicode only"),
    (["Content-Length:"], 400, "empty"),
    ([f"Content-Length: {2**64 + 5}"], 400, "overflows to five"),
    (["Content-Length: \x0b5"], 400, "space for some"),
    (["Transfer-Encoding: chunked", "Content-Length: 5"], 400, "which?"),
    (["Content-Length: 5", "Transfer-Encoding: identity"], 400, "which?"),
    (["Transfer-Encoding: CHUNKED"], PASS, "the name of a coding has no case"),
    (["Transfer-Encoding: xchunked"], 400, "unknown"),
    (["Transfer-Encoding: chunkedx"], 400, "unknown"),
    (["Transfer-Encoding: chunked, gzip"], 400, "the last must be chunked"),
    (["Transfer-Encoding: gzip, chunked"], 400, "right, but no server and no client has it"),
    (["Transfer-Encoding: gzip", "Transfer-Encoding: chunked"], 400, "the same in two lines"),
    (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], 400, "chunked twice"),
    (["Transfer-Encoding: chunked;x=y"], 400, "it has no parameters"),
    (["Transfer-Encoding: \x0bchunked"], 400, "space for some"),
    (['Transfer-Encoding: "chunked"'], 400, "quoted"),
    (["Transfer-Encoding:"], 400, "empty"),
    (["Transfer-Encoding: identity"], 400, "taken out of HTTP"),
    (["TE: chunked, gzip"], PASS, "about the answer, not this body"),
    (["Trailer: X"], PASS, "an announcement"),
    (["Expect: 100-continue", "Content-Length: 5"], PASS, "the program waits, the guard need not"),
]


@pytest.mark.parametrize(("fields", "status", "why"), FRAMING, ids=[str(row[0]) for row in FRAMING])
def test_framing(fields, status, why):
    sent = request(*fields, line="POST / HTTP/1.1")
    outcome = given(sent)
    assert outcome.status == status, why
    assert outcome.passed == (b"" if status else sent)


def test_http_1_0_has_no_chunks_and_connect_no_body():
    chunked = "Transfer-Encoding: chunked"
    assert given(request(chunked, line="POST / HTTP/1.0")).status == 400
    line = f"CONNECT {NAME}:80 HTTP/1.1"
    assert given(request(chunked, line=line)).status == 400
    assert given(request("Content-Length: 1", line=line)).status == 400
    assert not given(request("Content-Length: 0", line=line)).refusal


def site(value):
    return f"Origin: {value}"


CROSS, NAVIGATE = "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"
PRIVATE = "Access-Control-Request-Private-Network: true"
LOCAL = "Access-Control-Request-Local-Network: true"

SITES = [
    # Each fields with its status and the reason.
    ([site("http://app.demo.test")], PASS, "the app's own page"),
    ([site("https://APP.demo.test.:8443")], PASS, "any scheme and port of it"),
    ([site("http://alias.corp.test")], PASS, "another name of the app"),
    ([site(RIGHT_SITE)], PASS, "http_origins has it"),
    ([site(RIGHT_SITE.upper())], PASS, "no case"),
    ([site("https://portal.corp.test")], 403, "the same host on another port is another site"),
    ([site("http://portal.corp.test:8443")], 403, "another scheme"),
    ([site("http://evil.test")], 403, "another site"),
    ([site("http://evil.test/app.demo.test")], 403, "another site"),
    ([site("http://app.demo.test.evil.test")], 403, "another site"),
    ([site("http://evil.test#@app.demo.test")], 403, "no origin"),
    ([site("http://user@app.demo.test")], 403, "no origin"),
    ([site("http://evil.test http://app.demo.test")], 403, "a list: a redirect came between"),
    ([site("app.demo.test")], 403, "no scheme"),
    ([site("null")], 403, "a sandboxed frame or a file: anybody"),
    ([site("")], 403, "no origin"),
    ([site("http://app.demo.test"), site("http://evil.test")], 400, "two"),
    ([CROSS], 403, "an image or a script of another site"),
    (["sec-fetch-site: Cross-Site", "Sec-Fetch-Mode: no-cors"], 403, "the same"),
    ([CROSS, NAVIGATE], PASS, "a link"),
    ([CROSS, NAVIGATE, "Sec-Fetch-Mode: cors"], 403, "two modes"),
    ([CROSS, NAVIGATE, site("http://evil.test")], 403, "a form of another site"),
    ([CROSS, "Sec-Fetch-Mode: cors", site(RIGHT_SITE)], PASS, "http_origins has it"),
    (["Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors"], PASS, "the app's own page"),
    (["Sec-Fetch-Site: same-site"], PASS, "a neighbour below the same domain"),
    (["Sec-Fetch-Site: none"], PASS, "typed by the user"),
    ([PRIVATE], PASS, "means something in OPTIONS only"),
]


@pytest.mark.parametrize(("fields", "status", "why"), SITES, ids=[str(row[0]) for row in SITES])
def test_site(fields, status, why):
    sent = request(*fields)
    outcome = given(sent, chosen=generous())
    assert outcome.status == status, why
    assert outcome.passed == (b"" if status else sent)


@pytest.mark.parametrize("asking", [PRIVATE, LOCAL])
def test_preflight_for_this_network_needs_an_allowed_site(asking):
    line = "OPTIONS / HTTP/1.1"
    own, right = site(f"http://{NAME}"), site(RIGHT_SITE)
    assert given(request(own, asking, line=line), chosen=generous()).status == 403
    assert not given(request(own, line=line), chosen=generous()).refusal
    assert not given(request(right, asking, line=line), chosen=generous()).refusal


def test_any_origin():
    anybody = rules(origins={NAME: ["*"]})
    for fields in ([site("null")], [site("http://evil.test")], [CROSS]):
        assert not given(request(*fields), chosen=anybody).refusal
    assert given(request(site("null"), host="evil.test"), chosen=anybody).status == 421


def test_rules():
    assert rules_for(NAME, HttpRules(is_checked=False)) is None
    assert rules_for(NAME, HttpRules(hosts={NAME: ["x.test", "*"]})) is None
    for_another = rules_for(NAME, HttpRules(hosts={"b.test": ["*", "evil.test"]}))
    assert for_another == rules()
    chosen = rules_for(f"{NAME.upper()}.", HttpRules(hosts={NAME: ["Alias.Corp.test."]}))
    assert chosen.names == {NAME.encode(), OTHER_NAME.encode()}
    listed = ["HTTP://A.test:80/", "https://a.test:443", "http://a.test:443", "null"]
    chosen = rules_for(NAME, HttpRules(origins={NAME: listed}))
    right = {b"http://a.test", b"https://a.test", b"http://a.test:443", b"null"}
    assert chosen.origins == right
    assert not given(request(site("null")), chosen=chosen).refusal


def test_address_in_http_hosts():
    chosen = rules(hosts={NAME: ["10.0.0.5", "[fd00::1]"]})
    for host in ("10.0.0.5", "10.0.0.5:80", "[FD00::1]:80"):
        assert not given(request(host=host), chosen=chosen).refusal
    assert given(request(host="10.0.0.6"), chosen=chosen).status == 421


# Sizes.


def padded(size: int, end: bytes = b"\r\n\r\n") -> bytes:
    head = f"GET / HTTP/1.1\r\nHost: {NAME}\r\nX: ".encode()
    return head + b"x" * (size - len(head) - len(end)) + end


def test_size_of_a_head():
    largest = padded(MAX_HEAD_BYTES)
    too_large = padded(MAX_HEAD_BYTES + 1)
    assert not given(largest).refusal
    for pieces in ([too_large], bytewise(too_large), [too_large[:-1]], [b"\r\n" + too_large]):
        assert given(*pieces).status == 431
    assert given(padded(10 * MAX_HEAD_BYTES)).passed == b""


def test_a_target_that_fills_the_head_is_refused_at_once():
    # None of it may pass: servers that know HTTP/0.9 may answer a line without an end.
    for pieces in ([b"GET /" + b"x" * MAX_HEAD_BYTES], bytewise(b"GET /" + b"x" * MAX_HEAD_BYTES)):
        outcome = given(*pieces)
        assert (outcome.status, outcome.passed) == (431, b"")


def test_number_of_fields():
    assert not given(request(*["X: y"] * (MAX_FIELDS - 1))).refusal
    assert given(request(*["X: y"] * MAX_FIELDS)).status == 431


def test_each_byte_of_a_head_is_looked_at_once(monkeypatch):
    from workers.proxy.http_guard import head

    looked = []

    def counting(part, check=head.check_line_ends):
        looked.append(len(part))
        check(part)

    monkeypatch.setattr(head, "check_line_ends", counting)
    sent = padded(32 * 1024)
    assert given(*bytewise(sent)).passed == sent
    assert sum(looked) == len(sent)
    assert max(looked) < 20


def test_what_is_held_is_bounded():
    for sent in (b"GET /", b"GET", b"GET / HTTP/1.1\r\n", padded(200, b""), b"CONNECT x"):
        guard = Guard(rules())
        for piece in [sent, *[b"x" * 1000] * 200]:
            if guard.from_program(piece).refusal:
                break
            assert len(guard._held) <= MAX_HEAD_BYTES


# Responses.


def test_response_to_a_first_request():
    response = given(request(host="evil.test")).refusal.response
    head, _, body = response.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 421 Misdirected Request"
    assert b"Connection: close" in lines
    assert b"Content-Type: text/plain; charset=utf-8" in lines
    assert b"Content-Length: %d" % len(body) in lines
    assert b"security.http_hosts" in body
    assert body.count(b"\n") == 1
    assert body.endswith(b"\n")


def test_response_tells_a_page_nothing_of_the_app_or_of_itself():
    response = given(request(host="evil.test", line="GET /secret HTTP/1.1")).refusal.response
    for word in (b"app.demo.test", b"evil.test", b"secret", b"Access-Control"):
        assert word not in response


@pytest.mark.parametrize(
    ("sent", "status", "phrase"),
    [
        (request(site("http://evil.test")), 403, b"403 Forbidden"),
        (request("Content-Length: x"), 400, b"400 Bad Request"),
        (padded(MAX_HEAD_BYTES + 1), 431, b"431 Request Header Fields Too Large"),
    ],
)
def test_other_responses(sent, status, phrase):
    refusal = given(sent).refusal
    assert refusal.status == status
    assert refusal.response.startswith(b"HTTP/1.1 " + phrase + b"\r\n")


def test_no_response_once_a_request_has_passed():
    right, wrong = request(), request(host="evil.test")
    for pieces in ([right, wrong], [right + wrong]):
        outcome = given(*pieces)
        assert outcome.passed == right
        assert outcome.status == 421
        assert outcome.refusal.response == b""


def test_refusal_is_fit_for_a_log():
    outcome = given(request(host="\x1b[31m\xe9" + "x" * 1000))
    assert outcome.refusal.host.isprintable()
    assert len(outcome.refusal.host) <= 255
    assert outcome.refusal.reason.isprintable()
    assert given(request(host="evil.test")).refusal.host == "evil.test"


def test_nothing_passes_behind_a_refusal():
    guard = Guard(rules())
    assert guard.from_program(request(host="evil.test")).refusal
    for data in (request(), b"\x16\x03", b"x"):
        step = guard.from_program(data)
        assert step.refusal
        assert not step.send
        assert not step.refusal.response
    assert not guard.timed_out().send

"""Which forward proxy the environment names, and the CONNECT with it."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.proxy.http_proxy import ForwardProxyError, ProxyConnect, parse_proxy, proxy_for

PROXY = "http://proxy.test:3128"


def is_proxied(host: str, no_proxy: str, port: int = 443) -> bool:
    return bool(proxy_for(host, port, {"HTTPS_PROXY": PROXY, "NO_PROXY": no_proxy}))


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, ""),
        ({"HTTPS_PROXY": PROXY}, PROXY),
        ({"https_proxy": PROXY}, PROXY),
        ({"HTTPS_PROXY": PROXY, "https_proxy": "http://other.test"}, PROXY),
        ({"HTTPS_PROXY": "", "https_proxy": PROXY}, PROXY),
        ({"HTTP_PROXY": PROXY}, PROXY),
        ({"http_proxy": PROXY}, PROXY),
        ({"HTTPS_PROXY": PROXY, "HTTP_PROXY": "http://other.test"}, PROXY),
        ({"HTTP_PROXY": PROXY, "REQUEST_METHOD": "GET"}, ""),
        ({"HTTPS_PROXY": PROXY, "REQUEST_METHOD": "GET"}, PROXY),
        ({"HTTPS_PROXY": "proxy.test:3128"}, PROXY),
        ({"HTTPS_PROXY": "https://proxy.test:3128"}, "https://proxy.test:3128"),
        ({"ALL_PROXY": PROXY}, ""),
        ({"HTTPS_PROXY": PROXY, "no_proxy": "example.test"}, ""),
        ({"HTTP_PROXY": PROXY, "NO_PROXY": "example.test"}, ""),
    ],
)
def test_the_variables_and_their_order(environment, url):
    assert proxy_for("teleport.example.test", 443, environment) == url


@pytest.mark.parametrize(
    ("host", "no_proxy", "expected"),
    [
        # A name is that host and everything below it.
        ("example.test", "example.test", False),
        ("a.example.test", "example.test", False),
        ("notexample.test", "example.test", True),
        ("A.Example.Test", "EXAMPLE.test", False),
        # With a dot or a star only what is below.
        ("a.example.test", ".example.test", False),
        ("example.test", ".example.test", True),
        ("a.example.test", "*.example.test", False),
        ("example.test", "*.example.test", True),
        # Lists, blanks, and all.
        ("example.test", "other.test, example.test", False),
        ("example.test", " ,, other.test ,", True),
        ("example.test", "*", False),
        ("192.0.2.1", "*", False),
        ("example.test", "other.test,*", False),
        # Ports.
        ("example.test", "example.test:443", False),
        ("example.test", "example.test:3080", True),
        ("example.test", ".test:443", False),
        ("192.0.2.1", "192.0.2.1:443", False),
        ("192.0.2.1", "192.0.2.1:80", True),
        ("2001:db8::1", "[2001:db8::1]:443", False),
        ("2001:db8::1", "[2001:db8::1]:80", True),
        # Addresses and networks.
        ("192.0.2.1", "192.0.2.1", False),
        ("192.0.2.10", "192.0.2.1", True),
        ("2001:db8::1", "2001:DB8:0::1", False),
        ("192.0.2.200", "192.0.2.0/24", False),
        ("192.0.2.200", "192.0.2.77/24", False),
        ("192.0.3.1", "192.0.2.0/24", True),
        ("::ffff:192.0.2.1", "192.0.2.0/24", False),
        ("2001:db8:1::1", "2001:db8::/32", False),
        ("192.0.2.1", "2001:db8::/32", True),
        ("example.test", "192.0.2.0/24", True),
        # What makes no sense is about nobody.
        ("example.test", "192.0.2.0/99,:443,[,/,*.", True),
        # This machine.
        ("localhost", "", False),
        ("127.0.0.1", "", False),
        ("127.9.9.9", "", False),
        ("::1", "", False),
        ("localhost.example.test", "", True),
    ],
)
def test_exceptions(host, no_proxy, expected):
    assert is_proxied(host, no_proxy) is expected


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_exception_list_is_read(host, no_proxy):
    is_proxied(host, no_proxy)


def test_credentials_are_taken_apart_and_never_shown():
    proxy = parse_proxy("http://us%40er:p%3Aw%2F@Proxy.Test:3128/")
    assert proxy.authorization == "Basic " + base64.b64encode(b"us@er:p:w/").decode()
    assert (proxy.host, proxy.port, proxy.is_tls) == ("proxy.test", 3128, False)
    assert str(proxy) == "http://proxy.test:3128"
    assert proxy.authorization not in repr(proxy)


@pytest.mark.parametrize(
    ("url", "shown", "authorization"),
    [
        ("http://proxy.test", "http://proxy.test:80", ""),
        ("https://proxy.test", "https://proxy.test:443", ""),
        ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443", ""),
        ("http://user@proxy.test:1", "http://proxy.test:1", "Basic dXNlcjo="),
        ("http://:secret@proxy.test:1", "http://proxy.test:1", "Basic OnNlY3JldA=="),
    ],
)
def test_parts_may_be_missing(url, shown, authorization):
    proxy = parse_proxy(url)
    assert str(proxy) == shown
    assert proxy.authorization == authorization


@pytest.mark.parametrize(
    "url",
    [
        "socks4://u:secret@proxy.test:1080",
        "http://u:secret@proxy.test:port",
        "http://u:secret@:80",
        "http://u:secret@[::1:80",
        "http://",
        "://secret",
    ],
)
def test_what_cannot_be_used_is_an_error_without_the_password(url):
    with pytest.raises(ForwardProxyError, match="HTTPS_PROXY") as caught:
        parse_proxy(url)
    assert "secret" not in str(caught.value)


def test_connect_names_the_target_and_who_asks():
    request = ProxyConnect("teleport.example.test", 443, "Basic dXNlcjo=").request
    assert request == (
        b"CONNECT teleport.example.test:443 HTTP/1.1\r\n"
        b"Host: teleport.example.test:443\r\n"
        b"User-Agent: vnet\r\n"
        b"Proxy-Authorization: Basic dXNlcjo=\r\n"
        b"\r\n"
    )
    assert b"[2001:db8::1]:443" in ProxyConnect("2001:db8::1", 443).request
    with pytest.raises(ForwardProxyError):
        ProxyConnect("example.test\r\nX: y", 443)


@pytest.mark.parametrize("status", ["200 Connection established", "200", "204 Fine"])
def test_connected(status):
    talk = ProxyConnect("example.test", 443)
    assert talk.feed(f"HTTP/1.0 {status}\r\nVia: ".encode()) is None
    assert talk.feed(b"x\r\n\r\nSSH-2.0") == b"SSH-2.0"


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (b"HTTP/1.1 407 Who?\r\n\r\n", "user name and password"),
        (b"HTTP/1.1 401 Unauthorized\r\n\r\n", "user name and password"),
        (b"HTTP/1.1 403 Filtered\r\n\r\n", "403 Forbidden"),
        (b"HTTP/1.1 502 Bad\r\n\r\n", "502 Bad Gateway"),
        (b"\x05\x00", "no HTTP"),
    ],
)
def test_not_connected(head, why):
    with pytest.raises(ForwardProxyError, match=why):
        ProxyConnect("example.test", 443).feed(head)

"""Web pages against apps in a real browser: DNS rebinding, requests from other sites, and the app's own page."""

from collections.abc import Iterator

import pytest
from browser_bed import Browser, Page, browser_in
from demo_bed import demo_bed
from http_peers import CountingServer, lines_about, own_dns, refused_requests, reload
from private_bed import Bed, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]

OWN_PORT, OTHER_PORT, WEB_PORT = 7001, 7002, 8000
OWN, OTHER = "own.teleport.guard.test", "other.teleport.guard.test"
CLUSTER = f"""
[[clusters]]
name = "guard.test"
proxy_addr = "teleport.guard.test:3080"
apps = [
  {{ name = "own", uri = "tcp://127.0.0.1:{OWN_PORT}" }},
  {{ name = "other", uri = "tcp://127.0.0.1:{OTHER_PORT}" }},
]
"""
DNS, ATTACKER = "127.0.0.55", "127.0.0.66"
EVIL, OTHER_SITE = f"http://evil.test:{WEB_PORT}", f"http://other.test:{WEB_PORT}"
ENDLESS = f"http://endless.test:{WEB_PORT}"
APP = f"http://{OWN}:{WEB_PORT}"
REFUSED_TEXT = "VNet passes on only requests that name the app"
# Browsers would ask for one some time after the page, perhaps during the next test.
NO_ICON = '<link rel="icon" href="data:,">'

# Each is what a page may try, and gives what the page sees of it; `where` is the beginning of a URL.
FETCH = """
(where, options) => fetch(where + "/secret", options).then(
    async answer => [answer.type, answer.status, await answer.text()],
    error => ["error"])
"""
FORM = """
(where, coding, path) => new Promise(done => {
    const frame = document.createElement("iframe"), form = document.createElement("form");
    frame.name = "f" + Math.random();
    document.body.append(frame, form);
    form.action = where + (path ?? "/form"); form.method = "POST"; form.target = frame.name;
    form.enctype = coding ?? "";
    form.innerHTML = '<input name="transfer" value="everything">';
    frame.onload = () => { try {
        if (frame.contentDocument.URL != "about:blank") done(frame.contentDocument.body.innerText);
    } catch { done("of another site") } };
    form.submit();
})
"""
IMAGE = """
where => new Promise(done => {
    const image = new Image();
    image.onload = () => done("loaded"); image.onerror = () => done("error");
    image.src = where + "/image.png";
})
"""
BEACON = """
where => navigator.sendBeacon(where + "/beacon", "everything")
"""
WEBSOCKET = """
where => new Promise(done => {
    const end = new WebSocket(where.replace("http", "ws") + "/ws");
    end.onmessage = message => { done(message.data); end.close(); };
    end.onerror = () => done("error");
})
"""


def run(page: Page, script: str, *arguments: str) -> object:
    return page.run(f"({script})({', '.join(arguments)})")


def quoted(text: str) -> str:
    return f'"{text}"'


@pytest.fixture(scope="module")
def app() -> CountingServer:
    """The app behind VNet."""
    return CountingServer({"/": f"<title>The app</title>{NO_ICON}", "/secret": "secret"})


@pytest.fixture(scope="module")
def site() -> CountingServer:
    """A web site that has nothing to do with the app."""
    link = f'<title>Another site</title>{NO_ICON}<a id="link" href="{APP}/">the app</a>'
    # Browsers open connections in advance, which the end of the server would wait for.
    return CountingServer({"/": link, "/there": f"{APP}/form"}, idle_seconds=0.5)


@pytest.fixture(scope="module")
def other_app() -> CountingServer:
    """Another, of which no other test cares what reaches it later."""
    return CountingServer({})


@pytest.fixture(scope="module")
def guarded(app, other_app) -> Iterator[Bed]:
    """A demo with two apps, and other names in its DNS: the rebound ones have an app's address too."""
    with (
        demo_bed(CLUSTER) as bed,
        bed.listening(OWN_PORT, app.serve),
        bed.listening(OTHER_PORT, other_app.serve),
    ):
        names = {
            "evil.test": [ATTACKER, bed.resolve(OWN)[0]],
            "endless.test": [ATTACKER, bed.resolve(OTHER)[0]],
            "other.test": [ATTACKER],
        }
        with own_dns(bed, DNS, names):
            reload(bed, dns={"upstream": [DNS]})
            yield bed


@pytest.fixture(scope="module")
def browser(guarded) -> Iterator[Browser]:
    with browser_in(guarded) as browser:
        yield browser


def rebound_page(bed: Bed, browser: Browser, site: CountingServer, origin: str = EVIL) -> Page:
    """A page whose own server is gone: what it asks for now goes to the app's address."""
    page = browser.page()
    with bed.listening(WEB_PORT, site.serve, ATTACKER):
        page.open(f"{origin}/")
        assert page.run("document.title") == "Another site"
    return page


def test_rebound_page_reaches_nothing(guarded, browser, app, site):
    page = rebound_page(guarded, browser, site)
    app.forget()
    before = refused_requests(guarded)
    kind, status, text = run(page, FETCH, quoted(EVIL))
    assert (kind, status) == ("basic", 421)
    assert REFUSED_TEXT in text
    for options in (
        "{method: 'TRANSFER', body: 'everything'}",
        "{method: 'HEAD'}",
        "{method: 'OPTIONS'}",
        "{headers: {'X-Long': 'x'.repeat(50000), 'Content-Type': 'text/plain'}}",
    ):
        assert run(page, FETCH, quoted(EVIL), options)[1] == 421
    assert run(page, BEACON, quoted(EVIL)) is True
    for coding in ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain"):
        assert REFUSED_TEXT in run(page, FORM, quoted(EVIL), quoted(coding))
    assert run(page, IMAGE, quoted(EVIL)) == "error"
    assert run(page, WEBSOCKET, quoted(EVIL)) == "error"
    # The app has got connections, which VNet made before it knew what would come, and nothing through them.
    assert app.received == b""
    wait_until(lambda: refused_requests(guarded) >= before + 11, "all are counted")
    told = f"HTTP request for Host 'evil.test:{WEB_PORT}' at {OWN} refused: "
    wait_until(lambda: lines_about(guarded, told), "the log tells of it")


def test_only_the_word_of_a_request_with_an_endless_method_reaches_the_app(
    guarded, browser, other_app, site
):
    page = rebound_page(guarded, browser, site, ENDLESS)
    before = refused_requests(guarded)
    method = "{method: 'X'.repeat(300000), body: 'everything'}"
    run(page, FETCH, quoted(ENDLESS), method)
    wait_until(lambda: refused_requests(guarded) > before, "it is counted")
    assert set(other_app.received) <= set(b"X ")


def test_the_same_page_takes_everything_from_an_app_that_is_not_checked(guarded, app, site):
    """What the other tests show is the work of the guard and not the browser's."""
    reload(guarded, security={"http_hosts": {OWN: ["*"]}})
    try:
        # One of its own: browsers keep connections, which keep the rules that they began with.
        with browser_in(guarded) as other:
            page = rebound_page(guarded, other, site)
            app.forget()
            assert run(page, FETCH, quoted(EVIL)) == ["basic", 200, "secret"]
            assert run(page, FORM, quoted(EVIL)) == "transfer=everything"
            assert run(page, WEBSOCKET, quoted(EVIL)) == "hello"
            assert {"GET /secret", "POST /form", "GET /ws"} <= set(app.requests)
    finally:
        reload(guarded, security={"http_hosts": {}})


def test_the_app_works_by_its_own_name(guarded, browser, app):
    page = browser.page()
    page.open(f"{APP}/")
    assert page.run("document.title") == "The app"
    assert run(page, FETCH, quoted(APP)) == ["basic", 200, "secret"]
    posted = run(page, FETCH, quoted(APP), "{method: 'POST', body: 'x'.repeat(3000000)}")
    assert posted == ["basic", 200, "x" * 3_000_000]
    assert run(page, FORM, quoted(APP)) == "transfer=everything"
    assert run(page, WEBSOCKET, quoted(APP)) == "hello"


def test_a_form_of_the_app_is_refused_if_its_page_hides_where_it_comes_from(guarded, browser, app):
    """Its Origin is "null", as that of anybody's sandboxed frame."""
    page = browser.page()
    page.open(f"{APP}/")
    page.run("document.head.innerHTML = '<meta name=referrer content=no-referrer>'")
    assert "security.http_origins" in run(page, FORM, quoted(APP))
    told = "refused: its page does not say its site (Origin: null)"
    wait_until(lambda: lines_about(guarded, told), "the log tells of it")
    posted = run(page, FETCH, quoted(APP), "{method: 'POST', body: 'x'}")
    assert posted == ["basic", 200, "x"]
    page.run("document.head.innerHTML = '<meta name=referrer content=same-origin>'")
    assert run(page, FORM, quoted(APP)) == "transfer=everything"


def test_another_site_may_link_and_no_more(guarded, browser, app, site):
    with guarded.listening(WEB_PORT, site.serve, ATTACKER):
        page = browser.page()
        page.open(f"{OTHER_SITE}/")
        app.forget()
        before = refused_requests(guarded)
        post = "{method: 'POST', mode: 'no-cors', body: 'everything'}"
        run(page, FETCH, quoted(APP), post)
        with_preflight = "{method: 'PUT', headers: {'X-Mine': 'x'}, body: 'everything'}"
        assert run(page, FETCH, quoted(APP), with_preflight) == ["error"]
        run(page, FORM, quoted(APP))
        assert run(page, WEBSOCKET, quoted(APP)) == "error"
        run(page, BEACON, quoted(APP))
        # By way of its own server, so that the last step is a redirection to the right name.
        run(page, FORM, quoted(OTHER_SITE), quoted("text/plain"), quoted("/there"))
        redirected = post.replace("{", "{redirect: 'follow', ")
        run(page, FETCH.replace("/secret", "/there"), quoted(OTHER_SITE), redirected)
        assert app.received == b""
        wait_until(lambda: refused_requests(guarded) >= before + 7, "all are counted")

        page.run("document.getElementById('link').click()")
        page.wait_for_url(f"{APP}/")
        assert page.run("document.title") == "The app"
        assert "GET /" in app.requests

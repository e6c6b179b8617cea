"""Web apps at the proxy's web port, and the names that lead there."""

import asyncio
import socket
import ssl

import pytest
from embedded_cluster_client import TlsClient
from proxy_bed import run, web

from demo.cluster.config import parse_cluster_file
from demo.session import upstream_names

FILE = """
[[clusters]]
name = "root.test"
proxy_addr = "proxy.root.test:0"
apps = [
  { name = "page", uri = "http://127.0.0.1:1" },
  { name = "board", uri = "https://127.0.0.1:1", public_addr = "Board.apps.test" },
  { name = "tcp", uri = "tcp://127.0.0.1:1" },
]

[[clusters]]
name = "leaf.test"
leaf_of = "root.test"
proxy_addr = "proxy.leaf.test:443"
apps = [
  { name = "wiki", uri = "http://127.0.0.1:1" },
  { name = "other", uri = "tcp://127.0.0.1:1" },
]
"""


@pytest.mark.parametrize(
    ("host", "app"),
    [
        ("page.proxy.root.test", "page"),
        ("PAGE.proxy.root.test:443", "page"),
        ("board.apps.test", "board"),
        ("wiki.proxy.root.test", "wiki"),
        ("wiki.proxy.leaf.test", None),
        ("board.proxy.root.test", None),
        ("tcp.proxy.root.test", None),
        ("other.proxy.root.test", None),
        ("proxy.root.test", None),
        ("", None),
    ],
)
def test_host_of_a_web_app_gets_a_page_that_names_it(tmp_path, host, app):
    async def scenario(home):
        request = f"GET /any/path HTTP/1.1\nHost: {host}"
        status, headers, body = await asyncio.to_thread(web, home, request)
        if app is None:
            assert status == "HTTP/1.1 404 Not Found"
        else:
            assert status == "HTTP/1.1 200 OK"
            assert headers["content-type"].startswith("text/html")
            assert f"web app {app}" in body.decode()

    run(tmp_path, FILE, scenario)


def test_web_api_stays_where_it_was(tmp_path):
    async def scenario(home):
        for host, status in (("proxy.root.test", "200"), ("page.proxy.root.test", "200")):
            request = f"GET /webapi/find HTTP/1.1\nHost: {host}"
            line, headers, _ = await asyncio.to_thread(web, home, request)
            assert line.split()[1] == status
            is_app = host.startswith("page")
            assert headers["content-type"].startswith("text/html" if is_app else "application/json")

    run(tmp_path, FILE, scenario)


def served_names(home):
    context = home.context(["h2", "http/1.1"])
    with TlsClient(home.address, context, "proxy.root.test") as tls:
        return {name for _, name in tls.tls.getpeercert()["subjectAltName"]}


def test_certificate_covers_the_names_of_web_apps(tmp_path):
    async def scenario(home):
        context = home.context(["h2", "http/1.1"])
        for name in ("page.proxy.root.test", "wiki.proxy.root.test", "board.apps.test"):

            def protocol(name=name):
                with TlsClient(home.address, context, name) as tls:
                    return tls.tls.selected_alpn_protocol()

            assert await asyncio.to_thread(protocol) == "http/1.1"
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.to_thread(TlsClient, home.address, context, "wiki.proxy.leaf.test")

    run(tmp_path, FILE, scenario)


def test_certificate_follows_the_apps_file(tmp_path):
    async def scenario(home):
        assert "new.apps.test" not in await asyncio.to_thread(served_names, home)
        text = '[[apps]]\ncluster = "root.test"\nname = "new"\nuri = "http://h:1"\n'
        (home.path / "apps").write_text(text + 'public_addr = "new.apps.test"\n')
        async with asyncio.timeout(10):
            while "new.apps.test" not in await asyncio.to_thread(served_names, home):
                await asyncio.sleep(0.02)
        request = "GET / HTTP/1.1\nHost: new.apps.test"
        _, _, body = await asyncio.to_thread(web, home, request)
        assert b"web app new" in body

    run(tmp_path, FILE, scenario)


def test_upstream_dns_of_the_demo_knows_proxies_and_web_apps():
    clusters = parse_cluster_file(FILE)
    assert upstream_names(clusters, {"root.test": "127.0.1.1"}) == dict.fromkeys(
        ("proxy.root.test", "page.proxy.root.test", "board.apps.test", "wiki.proxy.root.test"),
        "127.0.1.1",
    )


def test_leaf_says_its_own_proxy_address():
    _, leaf = parse_cluster_file(FILE).clusters
    assert leaf.proxy_addr == "proxy.leaf.test:443"
    assert [app.public_addr for app in leaf.apps] == [
        "wiki.proxy.leaf.test",
        "other.proxy.leaf.test",
    ]


def test_addresses_are_free_again_after_a_stop(tmp_path):
    addresses = []

    async def scenario(home):
        addresses.append(home.address)

    run(tmp_path, FILE, scenario)
    with socket.socket() as sock:
        assert sock.connect_ex(addresses[0]) != 0

"""The proxy's web stack: the API that clients ask before they log in, and web apps. Pure.

api/client/webclient, lib/web. A request for the address of a web app, or for <app>.<proxy host>
where a leaf has it, gets a page that names the app, so that one sees where a browser has come.
`/sso-demo` stands for an identity provider: see `demo.cluster.sso`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import parse_qs

from demo.cluster.config import Cluster
from demo.cluster.errors import RequestError
from demo.cluster.sso import PAGE as SSO_PAGE
from demo.cluster.state import MIN_CLIENT_MAJOR, SERVER_VERSION, ClusterState

_REASONS = {
    200: "OK",
    302: "Found",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
}
# Where browsers end after single sign-on.
_MESSAGES = {
    "/web/msg/info/login_success": "You are signed in. This page can be closed.",
    "/web/msg/error/login": "The sign-on has failed. The terminal says why.",
}
_PAGE = """<!doctype html>
<html><head><title>{name}</title></head><body><h1>web app {name}</h1>
<p>{cluster} would log you in here, and show you {host}.</p></body></html>
"""


@dataclass(frozen=True, slots=True)
class Request:
    """The head of an HTTP/1 request; header names are lower-case, in their order."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    query: str = ""

    @property
    def host(self) -> str:
        """The Host header in lower case, without a port."""
        host = self.one("host").lower()
        return host.rpartition(":")[0] or host

    def values(self, name: str) -> list[str]:
        """All values of a header."""
        return [value for found, value in self.headers if found == name]

    def tokens(self, name: str) -> list[str]:
        """The elements of a header that is a list (RFC 9110 section 5.6.1)."""
        elements = (part.strip() for value in self.values(name) for part in value.split(","))
        return [element for element in elements if element]

    def one(self, name: str) -> str:
        """The first value of a header, or nothing."""
        return next(iter(self.values(name)), "")


def parse_request(head: bytes) -> Request | None:
    """The request line and headers up to the empty line, or None for what is no HTTP/1."""
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        return None
    headers = []
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers.append((name.strip().lower(), value.strip()))
    path, _, query = parts[1].partition("?")
    return Request(parts[0], path.rstrip("/"), tuple(headers), query)


def respond(request: Request, state: ClusterState) -> bytes:
    """The whole response; the connection is closed after it."""
    if request.method not in {"GET", "HEAD"}:
        return refuse(405, f"method {request.method} is not allowed")
    with_body = request.method == "GET"
    host = request.host
    app = web_apps_of(state).get(host)
    path = request.path
    if app is not None:
        page = _PAGE.format(name=escape(app), cluster=escape(state.name), host=escape(host))
        return _response(200, "text/html; charset=utf-8", page, with_body=with_body)
    if path in {"/webapi/ping", "/webapi/ping/local", "/webapi/find"}:
        return _response(200, "application/json", json.dumps(discovery(state)), with_body=with_body)
    if path.startswith("/webapi/ping/"):
        return refuse(400, f"invalid connector name {path.rpartition('/')[2]!r}")
    if path == SSO_PAGE:
        return _sign_on(request, state)
    if path in _MESSAGES:
        return _response(200, "text/plain", _MESSAGES[path] + "\n", with_body=with_body)
    return refuse(404, "path not found")


def _sign_on(request: Request, state: ClusterState) -> bytes:
    """The identity provider, which asks nothing."""
    request_id = parse_qs(request.query).get("request", [""])[0]
    try:
        where = state.factors.sign_ons.sign_on(
            request_id, state.now(), is_refused=state.faults.mfa_refused
        )
    except RequestError as error:
        return refuse(400, str(error))
    return _response(302, "text/plain", "", fields=f"Location: {where}\r\n")


def web_apps(root: Cluster, leaves: Iterable[Cluster]) -> dict[str, str]:
    """The host names, in lower case, below which a root's proxy shows web apps, and their apps."""
    found = {
        f"{app.name}.{root.proxy_host}".lower(): app.name
        for leaf in leaves
        for app in leaf.apps
        if app.is_web
    }
    return found | {app.public_addr.lower(): app.name for app in root.apps if app.is_web}


def web_apps_of(state: ClusterState) -> dict[str, str]:
    """The same for a running root cluster."""
    return web_apps(state.config, (leaf.config for leaf in state.leaves.values()))


def discovery(state: ClusterState) -> dict[str, Any]:
    """The document of /webapi/ping and /webapi/find."""
    cluster = state.config
    web_port = cluster.proxy_port
    ssh_host, _, ssh_port = cluster.ssh_proxy_addr.rpartition(":")
    return {
        "auth": {
            "type": "local",
            "second_factor": "on",
            "preferred_local_mfa": "otp",
            "allow_passwordless": False,
            "allow_headless": False,
            "local": {"name": ""},
            "private_key_policy": "none",
            "device_trust": {"disabled": True},
            "has_motd": False,
            "signature_algorithm_suite": 2,
        },
        "proxy": {
            "kube": {"enabled": False, "listen_addr": f"0.0.0.0:{web_port}"},
            "ssh": {
                "listen_addr": f"0.0.0.0:{ssh_port}",
                "web_listen_addr": f"0.0.0.0:{web_port}",
                "public_addr": cluster.proxy_addr,
                "ssh_public_addr": f"{ssh_host}:{ssh_port}",
                "ssh_tunnel_public_addr": f"{ssh_host}:{ssh_port}",
            },
            "db": {},
            "tls_routing_enabled": cluster.tls_routing,
        },
        "server_version": SERVER_VERSION,
        "min_client_version": f"{MIN_CLIENT_MAJOR}.0.0-aa",
        "cluster_name": cluster.name,
        "automatic_upgrades": False,
        "edition": "oss",
        "fips": False,
    }


def refuse(status: int, message: str) -> bytes:
    """A response that says why not."""
    return _response(status, "application/json", json.dumps({"error": {"message": message}}))


def _response(
    status: int, content_type: str, content: str, *, with_body: bool = True, fields: str = ""
) -> bytes:
    body = content.encode()
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\n{fields}Content-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")

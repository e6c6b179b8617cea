"""The proxy's web API, as far as clients ask before they log in (api/client/webclient). Pure."""

import json
from typing import Any

from demo.cluster.config import Cluster
from demo.cluster.state import MIN_CLIENT_MAJOR, SERVER_VERSION

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed"}


def respond(head: bytes, cluster: Cluster) -> bytes:
    """The whole HTTP/1.1 response to a request head (request line and headers).

    The connection is closed after it.
    """
    method, target, version = [*head.split(b"\r\n", 1)[0].decode("latin-1").split(" "), "", "", ""][
        :3
    ]
    path = target.partition("?")[0].rstrip("/")
    if not version.startswith("HTTP/1."):
        return _response(400, _error("malformed request"))
    if method not in {"GET", "HEAD"}:
        return _response(405, _error(f"method {method} is not allowed"))
    if path in {"/webapi/ping", "/webapi/ping/local", "/webapi/find"}:
        return _response(200, discovery(cluster), with_body=method == "GET")
    if path.startswith("/webapi/ping/"):
        return _response(400, _error(f"invalid connector name {path.rpartition('/')[2]!r}"))
    return _response(404, _error("path not found"))


def discovery(cluster: Cluster) -> dict[str, Any]:
    """The document of /webapi/ping and /webapi/find."""
    address = cluster.proxy_addr
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
            "kube": {"enabled": False, "listen_addr": f"0.0.0.0:{cluster.proxy_port}"},
            "ssh": {
                "listen_addr": f"0.0.0.0:{cluster.proxy_port}",
                "web_listen_addr": f"0.0.0.0:{cluster.proxy_port}",
                "public_addr": address,
                "ssh_public_addr": address,
                "ssh_tunnel_public_addr": address,
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


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


def _response(status: int, document: dict[str, Any], *, with_body: bool = True) -> bytes:
    body = json.dumps(document).encode()
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")

"""Which way leads to a cluster. Pure: from a profile and the environment.

    TLS routing   upgrade required   auth service of any cluster           apps and databases
    yes           no                 web port, ALPN teleport-auth@<name>   web port
    yes           yes                the same in a WebSocket               web port, in a WebSocket
    no            no                 TransportService on the SSH proxy     web port
    no            yes                TransportService on the SSH proxy     web port, in a WebSocket

The web port takes the ALPN of apps and databases whether or not the proxy has other listeners.
Each of these may lead through a forward proxy that the environment names.

Source: `api/client/proxy/client.go`, `lib/service/service.go` (setupALPNRouter), `api/profile`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from workers.proxy.http_proxy import proxy_for
from workers.proxy.teleport.profile import DEFAULT_SSH_PROXY_PORT, Profile


class Way(Enum):
    """How the auth service is reached."""

    DIRECT = "direct"  # TLS whose ALPN names the cluster
    UPGRADE = "upgrade"  # the same inside a WebSocket, inside the TLS of a load balancer
    TRANSPORT = "transport"  # TLS inside frames of the proxy's TransportService


@dataclass(frozen=True, slots=True)
class AuthRoute:
    """Where to connect for the auth service of any cluster of a profile, and how to go on.

    `http_proxy` is the URL of a forward proxy, or empty; it may hold a password.
    """

    way: Way
    host: str
    port: int
    http_proxy: str = ""


@dataclass(frozen=True, slots=True)
class WebRoute:
    """Where to connect for apps, databases and the web port itself. `http_proxy` as above."""

    host: str
    port: int
    http_proxy: str
    is_upgrade_required: bool


def auth_route(profile: Profile, environment: Mapping[str, str]) -> AuthRoute:
    """The way to the auth service of any cluster of the profile, leaves included."""
    if profile.is_tls_routing_enabled:
        way = Way.UPGRADE if profile.is_conn_upgrade_required else Way.DIRECT
        host, port = profile.web_host, profile.web_port
    else:
        way = Way.TRANSPORT
        host, port = profile.ssh_proxy or (profile.web_host, DEFAULT_SSH_PROXY_PORT)
    return AuthRoute(way, host, port, proxy_for(host, port, environment))


def web_route(profile: Profile, environment: Mapping[str, str]) -> WebRoute:
    """The way to apps and databases, of any cluster of the profile."""
    return WebRoute(
        profile.web_host,
        profile.web_port,
        proxy_for(profile.web_host, profile.web_port, environment),
        profile.is_conn_upgrade_required,
    )

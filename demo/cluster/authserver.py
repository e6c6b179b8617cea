"""The auth server's listener: gRPC over mutual TLS, end to end with the client.

The server name tells which cluster's user CA verifies the client: users of a root come to a leaf
with the root's name in SNI (lib/auth/middleware.go). An unknown name means all CAs.
"""

import ssl
from datetime import UTC, datetime

from grpclib.events import RecvRequest, listen
from grpclib.server import Server

from demo.cluster.authorities import issue_host_certificate
from demo.cluster.services import (
    AuthService,
    PresenceService,
    TrustService,
    VnetConfigService,
    check_request,
)
from demo.cluster.state import API_DOMAIN, ClusterState, decode_cluster_name
from demo.cluster.streams import listening_socket
from demo.cluster.tls import server_context


class AuthServer:
    """One cluster's auth server on a loopback port of its own, reached through the proxy."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._server: Server | None = None
        self.address = ("127.0.0.1", 0)

    async def start(self) -> None:
        """Starts to serve; `address` is set afterwards."""
        services = (AuthService, VnetConfigService, PresenceService, TrustService)
        self._server = Server([service(self._state) for service in services])
        listen(self._server, RecvRequest, check_request)
        sock = listening_socket(*self.address)
        self.address = sock.getsockname()
        await self._server.start(sock=sock, ssl=self._context())

    async def stop(self) -> None:
        """Ends all calls and connections."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def _context(self) -> ssl.SSLContext:
        names = (f"*.{API_DOMAIN}", API_DOMAIN)
        pair = issue_host_certificate(self._state.host_ca, names, "Auth", datetime.now(UTC))
        known = tuple(cluster for cluster in (self._state, self._state.root) if cluster)
        by_name = {
            cluster.name: server_context(pair, ["h2"], [cluster.user_ca], ssl.CERT_REQUIRED)
            for cluster in known
        }

        def choose(tls: ssl.SSLObject, server_name: str | None, _context: ssl.SSLContext) -> None:
            name = decode_cluster_name(server_name or "")
            if name in by_name:
                tls.context = by_name[name]

        every = server_context(pair, ["h2"], [c.user_ca for c in known], ssl.CERT_REQUIRED)
        every.sni_callback = choose
        return every

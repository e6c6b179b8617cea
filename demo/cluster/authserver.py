"""The auth server's listener: gRPC over mutual TLS, end to end with the client.

The server name tells which cluster's user CA verifies the client: users of a root come to a leaf
with the root's name in SNI (lib/auth/middleware.go). An unknown name means all CAs.

Handshakes take their context from `_contexts`, so that a new host authority serves at once.
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
    request_check,
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
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._listening: ssl.SSLContext | None = None

    async def start(self) -> None:
        """Starts to serve; `address` is set afterwards."""
        services = (AuthService, VnetConfigService, PresenceService, TrustService)
        self._server = Server([service(self._state) for service in services])
        listen(self._server, RecvRequest, request_check(self._state))
        sock = listening_socket(*self.address)
        self.address = sock.getsockname()
        self._listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._listening.sni_callback = self._choose
        self.reload()
        await self._server.start(sock=sock, ssl=self._listening)

    async def stop(self) -> None:
        """Ends all calls and connections."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def reload(self) -> None:
        """Takes the state's host authority and clock over for handshakes from now on."""
        names = (f"*.{API_DOMAIN}", API_DOMAIN)
        pair = issue_host_certificate(self._state.host_ca, names, "Auth", datetime.now(UTC))
        known = tuple(cluster for cluster in (self._state, self._state.root) if cluster)
        self._contexts = {
            cluster.name: server_context(pair, ["h2"], [cluster.user_ca], ssl.CERT_REQUIRED)
            for cluster in known
        }
        users = [cluster.user_ca for cluster in known]
        self._contexts[""] = server_context(pair, ["h2"], users, ssl.CERT_REQUIRED)
        if self._listening is not None:
            # A connection keeps how it verifies from the context it began with.
            self._listening.verify_mode = ssl.CERT_REQUIRED
            self._state.tune(self._listening)

    def _choose(self, tls: ssl.SSLObject, server_name: str | None, _begun: ssl.SSLContext) -> None:
        name = decode_cluster_name(server_name or "")
        tls.context = self._contexts.get(name or "", self._contexts[""])

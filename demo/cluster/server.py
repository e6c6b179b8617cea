"""The embedded clusters as a whole: authorities, listeners, tsh home, faults.

Not served yet, though the cluster file may ask for it: SSH nodes, databases, ALPN connection
upgrade, separate ports without TLS routing.
"""

import asyncio
import base64
import logging
import secrets
import signal
import socket
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from demo.cluster.authorities import (
    BACKDATE,
    issue_user_certificate,
    make_authority,
    private_key_pem,
    ssh_public_line,
)
from demo.cluster.authserver import AuthServer
from demo.cluster.backends import Backends
from demo.cluster.config import ClusterFile
from demo.cluster.faults import Faults, watch_faults
from demo.cluster.home import (
    Login,
    prepare_home,
    write_certificates,
    write_login,
    write_shared,
    write_totp_secret,
)
from demo.cluster.proxy import Kind, Proxy
from demo.cluster.sshcert import issue_ssh_user_certificate, private_key_openssh
from demo.cluster.state import ClusterState, make_state
from demo.cluster.streams import listening_socket

logger = logging.getLogger(__name__)

FAULTS_FILE = "faults"
DEFAULT_BIND_HOST = "127.0.0.1"
# Where an expired login ended.
_EXPIRED_SINCE = timedelta(hours=1)


class EmbeddedCluster:
    """All clusters of one cluster file in this event loop, logged in to in `home`.

    `bind_hosts` maps a root cluster's name to the address its proxy listens on, for hosts that
    are resolved to one address each; others listen on 127.0.0.1. A `proxy_addr` with port 0 gets
    a free port, and the profile shows it.
    """

    def __init__(
        self, config: ClusterFile, home: Path, *, bind_hosts: Mapping[str, str] | None = None
    ) -> None:
        self._config = config
        self._home = home
        self._bind_hosts = dict(bind_hosts or {})
        self._states: dict[str, ClusterState] = {}
        self._proxies: dict[str, Proxy] = {}
        self._auth_servers: list[AuthServer] = []
        self._auth_addresses: dict[str, tuple[str, int]] = {}
        self._backends = Backends()
        self._keys: dict[str, tuple[ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey]] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._is_expired = False

    @property
    def states(self) -> Mapping[str, ClusterState]:
        """The clusters by name. `config.proxy_addr` has the real port once started."""
        return self._states

    @property
    def web_ca_file(self) -> Path:
        """What a client has to trust for the proxies' web certificates."""
        return self._home / "web-ca.pem"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    def stop_listening(self) -> None:
        """Gives the proxies' addresses up, for a server of another kind; connections stay."""
        for proxy in self._proxies.values():
            proxy.stop_listening()

    async def start(self) -> None:
        """Listens, writes the home, watches the fault file.

        Raises:
            HomeError: the home cannot be used.
            OSError: a proxy address cannot be bound.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        now = datetime.now(UTC)
        web_ca = make_authority("Embedded Web CA", now)
        prepare_home(self._home, web_ca.tls.certificate_pem())
        totp_secret = base64.b32encode(secrets.token_bytes(20)).decode()
        write_totp_secret(self._home, totp_secret)
        self._make_states(totp_secret, now)
        for state in self._states.values():
            auth = AuthServer(state)
            self._auth_servers.append(auth)
            await auth.start()
            self._auth_addresses[state.name] = auth.address
        for root in self._roots():
            sock = self._bind(root)
            port = sock.getsockname()[1]
            address = f"{root.config.proxy_host}:{port}"
            root.config = msgspec.structs.replace(root.config, proxy_addr=address)
            proxy = Proxy(root, web_ca, self._auth_addresses, self._backends)
            self._proxies[root.name] = proxy
            await proxy.listen(sock)
            self._keys[root.name] = (
                ec.generate_private_key(ec.SECP256R1()),
                ed25519.Ed25519PrivateKey.generate(),
            )
        self._write_home(now)
        self._watcher = asyncio.create_task(self._watch(), name="faults")

    async def stop(self) -> None:
        """Closes every listener and connection; the home stays."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        for proxy in self._proxies.values():
            await proxy.stop()
        for auth in self._auth_servers:
            await auth.stop()
        await self._backends.stop()

    def _make_states(self, totp_secret: str, now: datetime) -> None:
        for cluster in self._config.clusters:
            self._states[cluster.name] = make_state(cluster, totp_secret, now)
            if cluster.conn_upgrade_required or not cluster.tls_routing:
                logger.warning("%s: only TLS routing without upgrade is served", cluster.name)
            if cluster.nodes or cluster.databases:
                logger.warning("%s: nodes and databases are listed, not served", cluster.name)
        for state in self._states.values():
            if state.config.leaf_of:
                state.root = self._states[state.config.leaf_of]
                state.root.leaves[state.name] = state

    def _roots(self) -> list[ClusterState]:
        return [state for state in self._states.values() if state.root is None]

    def _bind(self, root: ClusterState) -> socket.socket:
        host = self._bind_hosts.get(root.name, DEFAULT_BIND_HOST)
        return listening_socket(host, root.config.proxy_port)

    def _login(self, root: ClusterState, now: datetime) -> Login:
        """A login made at `now`; `now` in the past gives one that may have expired."""
        tls_key, ssh_key = self._keys[root.name]
        config = root.config
        identity = root.login_identity(now)
        members = (root, *root.leaves.values())
        return Login(
            proxy_host=config.proxy_host,
            proxy_addr=config.proxy_addr,
            cluster=root.name,
            user=config.user,
            tls_routing=config.tls_routing,
            conn_upgrade_required=config.conn_upgrade_required,
            tls_key=private_key_pem(tls_key),
            tls_certificate=issue_user_certificate(
                root.user_ca, identity, tls_key.public_key(), now - BACKDATE
            ),
            ssh_key=private_key_openssh(ssh_key),
            ssh_public=ssh_public_line(ssh_key.public_key()) + b"\n",
            ssh_certificate=issue_ssh_user_certificate(
                root.user_ca, identity, ssh_key.public_key(), now
            ),
            host_authorities={m.name: m.host_ca.tls.certificate_pem() for m in members},
            host_ssh_keys={m.name: m.host_ca.ssh_public_line() for m in members},
        )

    def _write_home(self, now: datetime) -> None:
        logins = tuple(self._login(root, now) for root in self._roots())
        for login in logins:
            write_login(self._home, login)
        write_shared(self._home, logins)

    async def _watch(self) -> None:
        try:
            await watch_faults(self._home / FAULTS_FILE, self._apply)
        except Exception:
            logger.exception("the fault file is no longer watched")

    async def _apply(self, faults: Faults) -> None:
        for state in self._states.values():
            state.faults = faults
        self._renew_login(is_expired=faults.expire_login)
        for root in self._roots():
            await self._apply_to_proxy(root, faults)

    def _renew_login(self, *, is_expired: bool) -> None:
        if is_expired == self._is_expired:
            return
        self._is_expired = is_expired
        now = datetime.now(UTC)
        for root in self._roots():
            lifetime = timedelta(seconds=root.config.cert_ttl_seconds)
            made = now - lifetime - _EXPIRED_SINCE if is_expired else now
            write_certificates(self._home, self._login(root, made))

    async def _apply_to_proxy(self, root: ClusterState, faults: Faults) -> None:
        proxy = self._proxies[root.name]
        if faults.proxy_down and proxy.is_listening:
            await proxy.stop()
        if not faults.proxy_down and not proxy.is_listening:
            await proxy.listen(self._bind(root))
        if faults.auth_down or faults.expire_login:
            await proxy.drop(Kind.AUTH)
        for leaf in faults.leaf_offline:
            await proxy.drop(Kind.AUTH, Kind.APP, cluster=leaf)
        if faults.close_apps:
            await proxy.drop(Kind.APP)


async def run_demo_cluster(
    config: ClusterFile,
    home: Path,
    *,
    bind_hosts: Mapping[str, str] | None = None,
    started: Callable[[EmbeddedCluster], None] = lambda _cluster: None,
) -> None:
    """Runs the clusters until SIGINT or SIGTERM; calls `started` when they can be used.

    Raises:
        HomeError, OSError: they cannot be started.
    """
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    try:
        async with EmbeddedCluster(config, home, bind_hosts=bind_hosts) as cluster:
            started(cluster)
            await stopping.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

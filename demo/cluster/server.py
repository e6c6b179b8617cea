"""The embedded clusters as a whole: authorities, listeners, tsh home, faults."""

import asyncio
import base64
import logging
import secrets
import signal
import socket
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import msgspec

from demo.cluster.app_lists import Apps, watch_apps
from demo.cluster.authorities import make_authority
from demo.cluster.authserver import AuthServer
from demo.cluster.backends import Backends
from demo.cluster.config import ClusterFile
from demo.cluster.faults import NO_FAULTS, Faults, watch_faults
from demo.cluster.home import prepare_home, write_totp_secret, write_webauthn_credential
from demo.cluster.logins import Logins
from demo.cluster.node_files import write_node_files
from demo.cluster.nodes import Nodes
from demo.cluster.proxy import Proxy
from demo.cluster.routes import Kind
from demo.cluster.state import ClusterState, make_state
from demo.cluster.streams import listening_socket
from demo.cluster.webauthn import SecurityKey, make_security_key

logger = logging.getLogger(__name__)

FAULTS_FILE = "faults"
APPS_FILE = "apps"
DEFAULT_BIND_HOST = "127.0.0.1"


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
        self._nodes = Nodes()
        self._logins = Logins(home, self._roots)
        self._watchers: list[asyncio.Task[None]] = []
        self._faults = NO_FAULTS

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
        """Listens, writes the home, watches the fault file and the apps file.

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
        key = make_security_key()
        self._make_states(totp_secret, key, now)
        hosts = [root.config.proxy_host for root in self._roots()]
        write_webauthn_credential(self._home, key.describe(hosts))
        for state in self._states.values():
            auth = AuthServer(state)
            self._auth_servers.append(auth)
            await auth.start()
            self._auth_addresses[state.name] = auth.address
        for root in self._roots():
            sockets = self._bind(root)
            proxy = Proxy(root, web_ca, self._auth_addresses, self._backends, self._nodes)
            self._proxies[root.name] = proxy
            await proxy.listen(*sockets)
        self._logins.write()
        self._write_node_files()
        for name, watch in ((FAULTS_FILE, self._watch_faults), (APPS_FILE, self._watch_apps)):
            self._watchers.append(asyncio.create_task(watch(self._home / name), name=name))

    async def stop(self) -> None:
        """Closes every listener and connection; the home stays."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers.clear()
        for proxy in self._proxies.values():
            await proxy.stop()
        for auth in self._auth_servers:
            await auth.stop()
        await self._backends.stop()
        await self._nodes.stop()

    def _make_states(self, totp_secret: str, key: SecurityKey, now: datetime) -> None:
        for cluster in self._config.clusters:
            self._states[cluster.name] = make_state(cluster, totp_secret, key, now)
        for state in self._states.values():
            if state.config.leaf_of:
                state.root = self._states[state.config.leaf_of]
                state.root.leaves[state.name] = state

    def _roots(self) -> list[ClusterState]:
        return [state for state in self._states.values() if state.root is None]

    def _bind(self, root: ClusterState) -> tuple[socket.socket, socket.socket | None]:
        """Web port and SSH port of a proxy; ports that were free to choose are known then."""
        host, config = self._bind_hosts.get(root.name, DEFAULT_BIND_HOST), root.config
        web = listening_socket(host, config.proxy_port)
        address = f"{config.proxy_host}:{web.getsockname()[1]}"
        root.config = config = msgspec.structs.replace(config, proxy_addr=address)
        if config.tls_routing:
            return web, None
        try:
            ssh = listening_socket(host, config.ssh_proxy_port)
        except BaseException:
            web.close()
            raise
        root.config = msgspec.structs.replace(config, ssh_proxy_port=ssh.getsockname()[1])
        return web, ssh

    async def _watch_faults(self, path: Path) -> None:
        try:
            await watch_faults(path, self._apply)
        except Exception:
            logger.exception("the fault file is no longer watched")

    async def _watch_apps(self, path: Path) -> None:
        try:
            await watch_apps(path, self._config, self._set_apps)
        except Exception:
            logger.exception("the apps file is no longer watched")

    def _set_apps(self, apps: Apps) -> None:
        for name, state in self._states.items():
            if state.config.apps != apps[name]:
                logger.info("%s has %d apps now", name, len(apps[name]))
                state.set_apps(apps[name])
        for proxy in self._proxies.values():
            proxy.reload()  # the web certificate names web apps

    async def _apply(self, faults: Faults) -> None:
        before, self._faults = self._faults, faults
        for state in self._states.values():
            state.faults = faults
        if faults.rotate_ca != before.rotate_ca:
            self._rotate(is_beginning=faults.rotate_ca)
        if faults.rotate_ca != before.rotate_ca or faults.clock_seconds != before.clock_seconds:
            self._reload_contexts()
        if (faults.rotate_ca, faults.host_certificate, faults.clock_seconds) != (
            *(before.rotate_ca, before.host_certificate, before.clock_seconds),
        ):
            self._write_node_files()
        self._logins.apply(faults)
        for root in self._roots():
            await self._apply_to_proxy(root, faults)

    def _write_node_files(self) -> None:
        """For whoever runs an sshd at the address of a node."""
        for state in self._states.values():
            for node in state.config.nodes:
                if node.addr:
                    write_node_files(self._home, state, node, self._nodes.key(node))

    def _rotate(self, *, is_beginning: bool) -> None:
        """The authorities change first, then the home, then what the servers show."""
        for state in self._states.values():
            if is_beginning:
                state.begin_rotation()
            else:
                state.end_rotation()
        self._logins.write_authorities()

    def _reload_contexts(self) -> None:
        for auth in self._auth_servers:
            auth.reload()
        for proxy in self._proxies.values():
            proxy.reload()

    async def _apply_to_proxy(self, root: ClusterState, faults: Faults) -> None:
        proxy = self._proxies[root.name]
        if faults.proxy_down and proxy.is_listening:
            await proxy.stop()
        if not faults.proxy_down and not proxy.is_listening:
            await proxy.listen(*self._bind(root))
        if faults.auth_down or faults.expire_login:
            await proxy.drop(Kind.AUTH)
        for leaf in faults.leaf_offline:
            await proxy.drop(Kind.AUTH, Kind.APP, Kind.DATABASE, Kind.NODE, cluster=leaf)
        proxy.drop_nodes(faults.node_offline)
        if faults.close_apps:
            await proxy.drop(Kind.APP, Kind.DATABASE)


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

"""SSH sessions on the loopback: real clients --> `SshSession` --> a real server, no Teleport between.

    with Gateway(directory, server_port, credentials=...) as gateway:
        subprocess.run([*gateway.ssh(), "command"])

The sessions run in an event loop in a thread of their own, as many as there are connections.
"""

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sshd_server import Authority, new_key, own_user, private_pem, public_line

from ipc.connection_id import about
from workers.proxy.layers import Layer, Plain
from workers.proxy.reactor import Reactor
from workers.proxy.relay import RelayOutcome
from workers.proxy.ssh.session import SshSession, SshSettings
from workers.proxy.teleport.ssh_credentials import SshCredentials
from workers.proxy.upstream import Upstream

NAME = "node1.demo.test"
NODE = "node1"
FLOW = 22
DEADLINE_SECONDS = 30.0


@dataclass(frozen=True)
class BedHostKeys:
    certificate_line: bytes
    certificate_key: Ed25519PrivateKey
    plain_key: Ed25519PrivateKey


class BedIdentity:
    """Who VNet is in a test, and the one key that it trusts."""

    def __init__(self) -> None:
        self.authority = Authority.new()
        self.plain_key = new_key()
        self.trusted_key = new_key()
        self.looked_up: list[str] = []

    def host_key_for(self, name: str) -> BedHostKeys:
        self.looked_up.append(name)
        key = new_key()
        return BedHostKeys(self.authority.host_certificate(key, [name]), key, self.plain_key)

    def is_trusted(self, key_blob: bytes) -> bool:
        return base64.b64decode(public_line(self.trusted_key).split()[1]) == key_blob


class Cluster:
    """The far side's authorities, and credentials as Teleport would give them."""

    def __init__(self, kind: str = "ed25519", authority_kind: str = "ed25519") -> None:
        self.users = Authority.new(authority_kind)
        self.hosts = Authority.new(authority_kind)
        self.key = new_key(kind)
        self.asked: list[str] = []

    def credentials(self, user: str, **changes) -> SshCredentials:
        fields = {
            "private_key": self.key,
            "certificate": self.users.user_certificate(self.key, [user]),
            "host_authorities": (self.hosts.line,),
            "host": NODE,
            "user": user,
            "cluster": "demo.test",
        }
        return SshCredentials(**{**fields, **changes})

    async def __call__(self, user: str) -> SshCredentials:
        self.asked.append(user)
        return self.credentials(user)


class Gateway:
    """Listens on the loopback, and joins each connection to one of `server_port`'s."""

    def __init__(
        self,
        directory: Path,
        server_port: int,
        credentials: Callable,
        settings: SshSettings | None = None,
        layer: Callable[[], Layer] = Plain,
    ) -> None:
        self.directory = directory
        self.identity = BedIdentity()
        self.sessions: list[SshSession] = []
        self.outcomes: list[RelayOutcome] = []
        self.port = 0
        self.loop: asyncio.AbstractEventLoop
        self.reactor: Reactor
        self._server_port = server_port
        self._credentials = credentials
        self._settings = settings or SshSettings()
        self._layer = layer
        self._ready = threading.Event()
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.problems: list[dict] = []  # the loop's unhandled exceptions
        directory.mkdir(parents=True, exist_ok=True)
        for name, key in (("id_vnet", self.identity.trusted_key), ("id_other", new_key())):
            path = directory / name
            path.touch(0o600)
            path.write_bytes(private_pem(key))
            (directory / f"{name}.pub").write_bytes(public_line(key) + b"\n")
        known = b"@cert-authority * " + self.identity.authority.line
        (directory / "known_hosts").write_bytes(known + b"\n")
        (directory / "known_plain").write_bytes(
            b"* " + public_line(self.identity.plain_key) + b"\n"
        )

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(DEADLINE_SECONDS)
        self.config = self.config_with("id_vnet")
        return self

    def config_with(self, identity: str) -> Path:
        """A configuration of OpenSSH's client with that key of ours."""
        path = self.directory / f"ssh_config_{identity}"
        path.write_text(
            f"Host *\n"
            f"    HostName 127.0.0.1\n"
            f"    Port {self.port}\n"
            f"    User {own_user()}\n"
            f"    HostKeyAlias {NAME}\n"
            f"    IdentityFile {self.directory}/{identity}\n"
            f"    UserKnownHostsFile {self.directory}/known_hosts\n"
            f"    GlobalKnownHostsFile /dev/null\n"
            f"    StrictHostKeyChecking yes\n"
            f"    IdentitiesOnly yes\n"
            f"    IdentityAgent none\n"
            f"    BatchMode yes\n"
            f"    ConnectTimeout 20\n"
        )
        return path

    def __exit__(self, *_: object) -> None:
        self.call(self._stop.set)
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()
        assert not self.problems, self.problems

    def ssh(self, *options: str, program: str = "ssh") -> list[str]:
        """The beginning of a command: `ssh [options] host`."""
        return [*self.program(*options, program=program), NAME]

    def program(self, *options: str, program: str = "ssh") -> list[str]:
        return [program, "-F", str(self.config), *options]

    def call(self, function: Callable, *arguments):
        """Runs in the event loop; the result."""

        async def run():
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(DEADLINE_SECONDS)

    def ended(self, count: int = 1) -> RelayOutcome:
        """Waits until so many sessions are over; the outcome of the last."""
        until(lambda: len(self.outcomes) >= count)
        return self.outcomes[count - 1]

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        self.reactor = Reactor(self.loop)
        self._stop = asyncio.Event()
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        accepting = asyncio.create_task(self._accept(listener))
        self._ready.set()
        await self._stop.wait()
        accepting.cancel()
        listener.close()
        for session in list(self.sessions):
            session.abort()
        assert not self.reactor._callbacks
        self.reactor.close()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = await self.loop.sock_accept(listener)
            connection.setblocking(False)
            far = socket.socket()
            far.setblocking(False)
            await self.loop.sock_connect(far, ("127.0.0.1", self._server_port))
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            upstream = Upstream(self.reactor, far, self._layer(), 64 * 1024)
            await upstream.handshake()
            session = SshSession(
                self.reactor,
                connection,
                upstream,
                name=NAME,
                about=about(FLOW),
                identity=self.identity,
                credentials=self._credentials,
                on_end=self.outcomes.append,
                settings=self._settings,
            )
            self.sessions.append(session)
            session.start()


def until(condition: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> None:
    """Waits for something that happens in another thread or process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)

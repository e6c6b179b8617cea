"""The client side of Teleport: everything VNet knows through the user's logins.

    tsh home --> Login --> Session (one per profile) --> Cluster   zones, range
                                                     --> AppFinder name -> app
                                                     --> AppCertificates

The tsh home is looked at every second, so that logins, logouts and renewals are taken over while
VNet runs. Nothing here waits for a cluster before it is asked something.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ipc.messages import Cluster as ClusterReport
from ipc.messages import Refusal
from workers.proxy.teleport import auth_client
from workers.proxy.teleport.apps import App
from workers.proxy.teleport.apps import check_port as check_app_port
from workers.proxy.teleport.errors import (
    PortNotAllowedError,
    TeleportError,
    UnknownAppError,
    ZonesUnknownError,
)
from workers.proxy.teleport.home import Fingerprint, Home, fingerprint, read_home
from workers.proxy.teleport.names import APP_ALPN, normalise
from workers.proxy.teleport.session import AppTarget, Session, Settings

logger = logging.getLogger(__name__)

__all__ = ["AppTarget", "DialParameters", "NotOurs", "Teleport", "default_settings"]


@dataclass(frozen=True, slots=True)
class NotOurs:
    """The name is none of VNet's business: forward the question upstream."""


@dataclass(frozen=True, slots=True)
class DialParameters:
    """All that dialling an app takes. `host` is resolved when dialling, by the ordinary resolver."""

    host: str
    port: int
    ssl_context: ssl.SSLContext
    server_hostname: str
    alpn: tuple[str, ...]  # set in the context already; the server chooses one of them
    is_conn_upgrade_required: bool
    target_port: int
    not_after: datetime


def _utc_now() -> datetime:
    return datetime.now(UTC)


def default_settings(*, ca_file: str = "", insecure: bool = False) -> Settings:
    """Settings for the real world."""
    return Settings(
        connect=auth_client.connect,
        clock=time.monotonic,
        wall_clock=_utc_now,
        ca_file=ca_file,
        insecure=insecure,
    )


class Teleport:
    """All profiles of one tsh home."""

    def __init__(
        self,
        home: Path,
        settings: Settings,
        *,
        on_change: Callable[[], None] | None = None,
        poll_seconds: float = 1.0,
    ) -> None:
        self.on_change = on_change
        self._directory = home
        self._settings = settings
        self._poll_seconds = poll_seconds
        self._home = Home((), f"{home} has not been read yet")
        self._stamp: Fingerprint | None = None
        self._half_written: Fingerprint | None = None
        self._sessions: dict[str, Session] = {}
        self._reported: tuple[list[ClusterReport], str] = ([], "")
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Reads the home and begins to watch it. Clusters are asked in the background."""
        await self._look()
        self._reported = (self.states(), self.problem)
        self._refresh()
        self._spawn(self._watch())

    async def close(self) -> None:
        """Ends every task, closes every connection and forgets every certificate."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for session in self._sessions.values():
            await session.close()
        self._sessions = {}

    @property
    def problem(self) -> str:
        """What is wrong with the home as a whole, and what to do; empty when nothing is."""
        return self._home.problem

    def states(self) -> list[ClusterReport]:
        """All clusters of all profiles, by profile name."""
        return [session.report() for session in self._sessions.values()]

    async def resolve(self, name: str, spelling: str = "") -> AppTarget | NotOurs:
        """What a DNS name stands for.

        `spelling` is the name as it was typed: clusters compare byte by byte, so an app whose
        public address has capitals is found by that alone.

        Raises:
            ZonesUnknownError: no cluster that answers claims the name, and of another one not even
                the zones are known. Unless the address book knows the name, it is not VNet's.
            TeleportError: the name is in a cluster's zone, and the cluster cannot be asked.
        """
        name = normalise(name)
        sessions = list(self._sessions.values())
        if any(name in session.hosts for session in sessions):
            return NotOurs()
        failure: TeleportError | None = None
        for session in sessions:
            try:
                target = await session.find(name, spelling or name)
            except TeleportError as error:
                if failure is None or isinstance(failure, ZonesUnknownError):
                    failure = error
                continue
            if target is not None:
                return target
        if failure is not None:
            raise failure
        return NotOurs()

    def check_port(self, app: App, port: int) -> int | Refusal:
        """The target port for the certificate (0: the app's only one), or why there is none."""
        return check_app_port(app.ports, port)

    async def dial_parameters(self, target: AppTarget, port: int) -> DialParameters:
        """Everything for dialling `target` for a connection to `port`, with a valid certificate.

        Raises:
            TeleportError: `refusal` of the error is what the program is told.
        """
        target_port = self.check_port(target.app, port)
        if isinstance(target_port, Refusal):
            raise PortNotAllowedError(f"app {target.app.name} has no port {port}")
        session = self._sessions.get(target.profile)
        if session is None or session.login.profile is None:
            raise UnknownAppError(f"there is no profile {target.profile} any more")
        profile = session.login.profile
        certificate = await session.certificate(target, target_port)
        return DialParameters(
            host=profile.web_host,
            port=profile.web_port,
            ssl_context=certificate.context,
            server_hostname=profile.web_host,
            alpn=APP_ALPN,
            is_conn_upgrade_required=profile.is_conn_upgrade_required,
            target_port=target_port,
            not_after=certificate.not_after,
        )

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self._look()
                self._refresh()
                self._tell()
            except Exception:
                logger.exception("looking at %s failed", self._directory)

    async def _look(self) -> None:
        # The stamp is taken first: what changes while the files are read is seen next time. In a
        # thread, because a home directory may be on a slow network.
        stamp = await asyncio.to_thread(fingerprint, self._directory)
        if stamp == self._stamp:
            return
        home = await asyncio.to_thread(read_home, self._directory)
        if _is_half_written(self._home, home) and stamp != self._half_written:
            self._half_written = stamp  # a login in progress; believed if it stays like this
            return
        self._stamp, self._home = stamp, home
        await self._apply(home)

    async def _apply(self, home: Home) -> None:
        before, self._sessions = self._sessions, {}
        for login in home.logins:
            session = before.pop(login.name, None)
            if login.name in self._sessions:
                continue  # two files with the same address: the first counts
            if session is None:
                session = Session(login, self._settings, self._tell)
                self._sessions[login.name] = session
                await session.start()
            else:
                self._sessions[login.name] = session
                await session.change(login)
        for session in before.values():
            await session.close()

    def _refresh(self) -> None:
        for session in self._sessions.values():
            self._spawn(session.refresh())

    def _tell(self) -> None:
        reported = (self.states(), self.problem)
        if reported != self._reported:
            self._reported = reported
            if self.on_change is not None:
                self.on_change()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_half_written(before: Home, after: Home) -> bool:
    """Whether a login that was complete has no credentials now, though its profile is there."""
    complete = {login.name for login in before.logins if login.credentials is not None}
    return any(login.name in complete and login.credentials is None for login in after.logins)

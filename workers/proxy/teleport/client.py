"""The client side of Teleport: everything VNet knows through the user's logins.

    tsh home --> HomeWatch --> Login --> Session (one per profile) --> clusters, certificates
    name --> Directory (who may have it) --> consult (all at once) --> decide --> Resolution
    target --> plan: certificate and way to the proxy

The tsh home is watched, so that logins, logouts and renewals are taken over while VNet runs.
Nothing here waits for a cluster before it is asked something.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from pathlib import Path
from ssl import SSLContext

from ipc.messages import Cluster as ClusterReport
from ipc.messages import ClusterState, Refusal
from workers.proxy.dial_plan import DialPlan, SshTarget, TlsPlan
from workers.proxy.teleport.apps import App, OtherApp, check_port, valid_ports
from workers.proxy.teleport.auth_client import CLIENT_VERSION, Connector
from workers.proxy.teleport.certificates import AppSubject, DatabaseSubject, Subject
from workers.proxy.teleport.consulting import Asked, Question, Source, consult
from workers.proxy.teleport.contexts import upgrade_context
from workers.proxy.teleport.databases import Database
from workers.proxy.teleport.errors import (
    PortNotAllowedError,
    TeleportError,
    UnknownAppError,
    safe_text,
)
from workers.proxy.teleport.home import Fingerprint, Home, fingerprint, read_home
from workers.proxy.teleport.home_watch import POLL_SECONDS, HomeWatch
from workers.proxy.teleport.issue_tally import IssueTally
from workers.proxy.teleport.member import Member
from workers.proxy.teleport.mfa import Prompter
from workers.proxy.teleport.names import normalise
from workers.proxy.teleport.precedence import Answer, Claim, Directory
from workers.proxy.teleport.profile import Profile
from workers.proxy.teleport.routes import Way, auth_route, web_route
from workers.proxy.teleport.second_factor import PROMPT_SECONDS
from workers.proxy.teleport.session import Session
from workers.proxy.teleport.settings import Crowd, Settings
from workers.proxy.teleport.ssh_credentials import SshCredentials
from workers.proxy.teleport.targets import (
    AppTarget,
    ClusterTarget,
    DatabaseTarget,
    NoSuchName,
    NotOurs,
    Owner,
    Resolution,
    WebApp,
)

logger = logging.getLogger(__name__)

# Changes are told together, some milliseconds after the first.
TELL_SECONDS = 0.02
TELL_SECONDS_PER_CLUSTER = 0.001


def _utc_now() -> datetime:
    return datetime.now(UTC)


def default_settings(
    *,
    ca_file: str = "",
    insecure: bool = False,
    environment: Mapping[str, str] | None = None,
    prompter: Prompter | None = None,
    prompt_seconds: float = PROMPT_SECONDS,
    tally: IssueTally | None = None,
) -> Settings:
    """Settings for the real world. `environment` names forward proxies; see `Settings`."""
    environment = dict(environment or {})
    return Settings(
        connect=Connector(ca_file=ca_file, insecure=insecure, environment=environment),
        clock=time.monotonic,
        wall_clock=_utc_now,
        ca_file=ca_file,
        insecure=insecure,
        environment=environment,
        prompter=prompter,
        prompt_seconds=prompt_seconds,
        tally=tally or IssueTally(),
    )


def _nothing(_owner: Owner) -> None:
    return


class Teleport:
    """All profiles of one tsh home.

    `on_change` is called when `states` or `problem` are different from before. `on_owner_gone` is
    called with the owner of a login that is gone: logged out, or replaced by another user's or
    another cluster's. A login that expired or was renewed is not gone.
    """

    def __init__(
        self,
        home: Path,
        settings: Settings,
        *,
        on_change: Callable[[], None] | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.on_change = on_change
        self.on_owner_gone: Callable[[Owner], None] = _nothing
        self._directory = home
        self._settings = settings
        self._poll_seconds = poll_seconds
        self._watch = HomeWatch(home, poll_seconds=poll_seconds)
        self._home = Home((), f"{home} has not been read yet: wait")
        self._stamp: Fingerprint | None = None
        # What a home looked like that may be half written, and since when.
        self._half_written: tuple[Fingerprint, float] | None = None
        # Held while what has changed is taken over.
        self._taking_over = asyncio.Lock()
        self._crowd = Crowd.new()
        self._sessions: dict[str, Session] = {}
        self._names: Directory[Source] | None = None
        self._reported: tuple[list[ClusterReport], str] = ([], "")
        self._telling: asyncio.TimerHandle | None = None
        self._upgrade_context: SSLContext | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Reads the home and begins to watch it. Clusters are asked in the background."""
        await self._watch.start()
        await self._look()
        self._reported = (self.states(), self.problem)
        self._refresh()
        self._spawn(self._follow_home())
        self._spawn(self._tick())

    async def close(self) -> None:
        """Ends every task, closes every connection and forgets every certificate."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._watch.close()
        for session in self._sessions.values():
            await session.close()
        self._sessions = {}
        self._names = None
        if self._telling is not None:
            self._telling.cancel()

    @property
    def problem(self) -> str:
        """What is wrong with the home as a whole, and what to do; empty when nothing is."""
        return self._home.problem

    def states(self) -> list[ClusterReport]:
        """All clusters, by profile name, each root before its leaves."""
        return [report for session in self._sessions.values() for report in session.reports()]

    def owner(self, profile: str) -> Owner | None:
        """Whose login of this profile is in use now, expired or not."""
        session = self._sessions.get(profile)
        return session.owner if session is not None else None

    # -- names --

    async def resolve(self, name: str, spelling: str = "", *, fresh: bool = False) -> Resolution:
        """What a DNS name stands for.

        `spelling` is the name as it was typed: clusters compare byte by byte, so an app whose
        public address has capitals is found by that alone. With `fresh`, for whoever decides about
        a connection, answers that there is nothing are not older than a second.

        Raises:
            ZonesUnknownError: no cluster that answers claims the name, and of another one not even
                the zones are known. Unless the address book knows the name, it is not VNet's.
            TeleportError: the name is a cluster's, and the cluster cannot be asked.
        """
        name, home = normalise(name), self._home
        is_changing = self._taking_over.locked()
        question = Question(name, (spelling or name).removesuffix("."), fresh)
        try:
            return await self._answer(question)
        except TeleportError:
            if self._home is home and not is_changing:
                raise
        # Some login is not the one that was asked with: what is there now answers.
        async with self._taking_over:
            pass
        return await self._answer(question)

    async def _answer(self, question: Question) -> Resolution:
        name, names = question.name, self._directory_of_names()
        if names.is_proxy(name):
            return NotOurs()
        sources = names.find(name)
        if not sources:
            return NotOurs()
        decision, asked = await consult(
            sources,
            question,
            grace_seconds=self._settings.grace_seconds,
            remote_seconds=self._settings.remote_seconds,
        )
        # Meanwhile a cluster may have told its public address for the first time.
        if self._directory_of_names().is_proxy(name):
            return NotOurs()
        if decision.failure is not None:
            raise decision.failure
        if decision.claim is None:
            return NotOurs()
        if decision.claim is Claim.NO_DATABASE:
            return NoSuchName()
        return _resolution(decision.claim, asked[decision.index])

    def _directory_of_names(self) -> Directory[Source]:
        if self._names is None:
            self._names = Directory(
                source for session in self._sessions.values() for source in session.sources()
            )
        return self._names

    # -- connections --

    async def plan(self, target: AppTarget | DatabaseTarget, port: int) -> DialPlan:
        """Everything for dialling `target` for a connection to `port`, with a valid certificate.

        May take as long as the user takes to give a second factor.

        Raises:
            TeleportError: `refusal` of the error is what the program is told.
        """
        subject = _subject(target, port)
        session, profile = self._session(target.profile)
        certificate = await session.certificate(target, subject)
        route = web_route(profile, self._settings.environment)
        if not route.is_upgrade_required:
            tls = TlsPlan(certificate.context, profile.web_host)
            return DialPlan(route.host, route.port, tls, http_proxy=route.http_proxy)
        return DialPlan(
            route.host,
            route.port,
            TlsPlan(certificate.tunnel_context, profile.web_host),
            upgrade=TlsPlan(await self._balancer_context(), profile.web_host),
            http_proxy=route.http_proxy,
        )

    async def _balancer_context(self) -> SSLContext:
        if self._upgrade_context is None:
            # In a thread: it reads the system's authorities.
            self._upgrade_context = await asyncio.to_thread(
                upgrade_context, ca_file=self._settings.ca_file, insecure=self._settings.insecure
            )
        return self._upgrade_context

    async def ssh_plan(self, target: ClusterTarget) -> DialPlan:
        """Everything for reaching the SSH server of a host, through the proxy of its root cluster.

        The way is that of the auth service: without TLS routing the SSH proxy's own port. Asks no
        cluster, and no user.

        Raises:
            TeleportError: `refusal` of the error is what the program is told.
        """
        session, profile = self._session(target.profile)
        context = session.ssh_context(target)
        route = auth_route(profile, self._settings.environment)
        upgrade = None
        if route.way is Way.UPGRADE:
            upgrade = TlsPlan(await self._balancer_context(), profile.web_host)
        return DialPlan(
            route.host,
            route.port,
            TlsPlan(context, profile.web_host),  # the context has a name of its own
            upgrade=upgrade,
            http_proxy=route.http_proxy,
            ssh=SshTarget(f"{target.host}:0", target.cluster, CLIENT_VERSION),
        )

    async def ssh_credentials(self, target: ClusterTarget, login: str) -> SshCredentials:
        """Everything for one login as `login` to the host, whose SSH server is reached already.

        Not for a second connection: a certificate got with a second factor is for one alone. May
        take as long as the user takes to give it.

        Raises:
            TeleportError: the text may be shown to whoever logs in.
        """
        session, _ = self._session(target.profile)
        return await session.ssh_credentials(target, login, self._directory)

    def web_plan(self, profile: str) -> DialPlan:
        """For relaying bytes to the web port of a profile's proxy as they are.

        Raises:
            UnknownAppError: the profile is gone.
        """
        route = web_route(self._session(profile)[1], self._settings.environment)
        return DialPlan(route.host, route.port, None, http_proxy=route.http_proxy)

    def web_port(self, profile: str) -> int | None:
        """The web port of a profile's proxy; None when the profile is gone."""
        session = self._sessions.get(profile)
        found = session.login.profile if session is not None else None
        return found.web_port if found is not None else None

    def doubt(self, profile: str) -> None:
        """The proxy of a profile was not reached: `states` tells soon whether anybody reaches it."""
        if (session := self._sessions.get(profile)) is not None:
            session.doubt()

    def _session(self, name: str) -> tuple[Session, Profile]:
        session = self._sessions.get(name)
        if session is None or session.login.profile is None:
            raise UnknownAppError(f"there is no profile {name} any more")
        return session, session.login.profile

    # -- the home --

    async def _follow_home(self) -> None:
        while True:
            settling = self._settings.settle_seconds if self._half_written else None
            await self._watch.wait(settling)
            try:
                await self._look()
                self._refresh()
                self._tell()
            except Exception:
                logger.exception("looking at %s failed", self._directory)

    async def _tick(self) -> None:
        before: list[ClusterState] = []
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                self._refresh()
                # What changes with time alone; clusters tell of the rest.
                states = [session.login_state for session in self._sessions.values()]
                if states != before:
                    self._tell()
                before = states
            except Exception:
                logger.exception("looking after the clusters failed")

    async def _look(self) -> None:
        # The stamp is taken first: what changes while the files are read is seen next time. In a
        # thread, because a home directory may be on a slow network.
        stamp = await asyncio.to_thread(fingerprint, self._directory)
        if stamp == self._stamp:
            self._half_written = None
            return
        home = await asyncio.to_thread(read_home, self._directory)
        if _is_half_written(self._home, home) and not self._has_settled(stamp):
            return
        self._half_written = None
        async with self._taking_over:
            self._stamp, self._home = stamp, home
            await self._apply(home)

    def _has_settled(self, stamp: Fingerprint) -> bool:
        """Whether a home that may be half written has looked like this for a while."""
        now = self._settings.clock()
        if self._half_written is None or self._half_written[0] != stamp:
            self._half_written = stamp, now
        return now >= self._half_written[1] + self._settings.settle_seconds

    async def _apply(self, home: Home) -> None:
        owners = {name: session.owner for name, session in self._sessions.items()}
        before, wanted = dict(self._sessions), dict[str, Session]()
        self._names = None
        for login in home.logins:
            if login.name in wanted:
                continue  # two files with the same address: the first counts
            session = before.pop(login.name, None)
            if session is None:
                # The others stay: names are asked for and reports are made meanwhile.
                session = Session(login, self._settings, self._crowd, self._changed)
                self._sessions[login.name] = wanted[login.name] = session
                await session.start()
            else:
                wanted[login.name] = session
                await session.change(login)
        self._sessions, self._names = wanted, None
        for session in before.values():
            await session.close()
        for name, owner in owners.items():
            if owner is not None and self.owner(name) != owner:
                logger.info("the login of %s at %s is gone", owner.user, name)
                self.on_owner_gone(owner)

    def _refresh(self) -> None:
        for session in self._sessions.values():
            session.refresh()

    def _changed(self) -> None:
        self._names = None
        if self._telling is None:
            # Leaves by the hundred answer one after the other, and each report has them all.
            wait = TELL_SECONDS + TELL_SECONDS_PER_CLUSTER * len(self._reported[0])
            self._telling = asyncio.get_running_loop().call_later(wait, self._tell)

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        reported = (self.states(), self.problem)
        if reported != self._reported:
            self._reported = reported
            if self.on_change is not None:
                self.on_change()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _resolution(claim: Claim, asked: Asked) -> Resolution:
    member, answer, candidate = asked.source, asked.outcome, asked.candidate
    assert isinstance(member, Member)
    assert isinstance(answer, Answer)
    place = member.place
    match answer:
        case Answer(app=App() as app) if claim is Claim.TCP_APP:
            return AppTarget(app=app, **place)
        case Answer(database=Database() as database) if claim is Claim.DATABASE:
            return DatabaseTarget(database=database, **place)
        case Answer(app=OtherApp() as other) if claim is Claim.WEB_APP:
            return WebApp(member.profile, other.name)
    assert candidate is not None
    return ClusterTarget(host=candidate.host, **place)


def _subject(target: AppTarget | DatabaseTarget, port: int) -> Subject:
    if isinstance(target, DatabaseTarget):
        return DatabaseSubject(target.database)
    target_port = check_port(target.app.ports, port)
    if isinstance(target_port, Refusal):
        valid = valid_ports(target.app)
        raise PortNotAllowedError(
            f"app {safe_text(target.app.name, 100)} has no port {port}, "
            + (f"only {valid}" if valid else "nor any other")
        )
    return AppSubject(target.app, target_port)


def _is_half_written(before: Home, after: Home) -> bool:
    """Whether a login that was complete is not any more, though nobody has removed it."""
    complete = {login.name for login in before.logins if login.credentials is not None}
    return any(
        login.name in complete
        and login.credentials is None
        and login.state is ClusterState.NO_LOGIN
        and not login.is_removed
        for login in after.logins
    )

"""One profile: its login, the clusters it leads to, and the certificates got with it.

Login --> Members        the root cluster and its leaves
      --> Certificates   for apps and databases
      --> SshAccess      for hosts
      --> HostAddresses  of the proxy
"""

import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from ipc import messages
from ipc.messages import ClusterState
from workers.proxy.teleport.auth_client import AuthApi
from workers.proxy.teleport.background import Background
from workers.proxy.teleport.certificates import Certificate, Certificates, Subject
from workers.proxy.teleport.consulting import Source
from workers.proxy.teleport.contexts import cluster_context
from workers.proxy.teleport.errors import (
    HardwareKeyError,
    LoginExpiredError,
    NotLoggedInError,
    TeleportError,
    UnknownAppError,
    UnreachableError,
)
from workers.proxy.teleport.home import Login
from workers.proxy.teleport.host_addresses import HostAddresses
from workers.proxy.teleport.member import Member
from workers.proxy.teleport.members import Members
from workers.proxy.teleport.names import normalise
from workers.proxy.teleport.precedence import ClusterNames
from workers.proxy.teleport.proxy_cluster import TRANSPORT_ALPN
from workers.proxy.teleport.report import health, report
from workers.proxy.teleport.routes import auth_route, web_route
from workers.proxy.teleport.second_factor import SecondFactor
from workers.proxy.teleport.settings import Crowd, Settings
from workers.proxy.teleport.ssh_access import SshAccess, SshLogin
from workers.proxy.teleport.ssh_credentials import SshCredentials
from workers.proxy.teleport.targets import (
    AppTarget,
    ClusterTarget,
    DatabaseTarget,
    Owner,
    Target,
)
from workers.proxy.teleport.unheard import NoLogin

T = TypeVar("T")

# Logins that may come while one certificate is got.
MAX_RENEWALS = 2
_LOGIN_ERRORS: dict[ClusterState, type[TeleportError]] = {
    ClusterState.LOGIN_EXPIRED: LoginExpiredError,
    ClusterState.NO_LOGIN: NotLoggedInError,
    ClusterState.HARDWARE_KEY: HardwareKeyError,
}


class Session:
    """What VNet does with one profile."""

    def __init__(
        self, login: Login, settings: Settings, crowd: Crowd, on_change: Callable[[], None]
    ) -> None:
        self.name = login.name
        self.login = login
        self._settings = settings
        self._crowd = crowd
        self._on_change = on_change
        self._members: Members | None = None
        self._certificates: Certificates | None = None
        self._ssh: SshAccess | None = None
        self._ssh_context: ssl.SSLContext | None = None
        self._addresses: HostAddresses | None = None
        self._background = Background()

    @property
    def _root(self) -> Member | None:
        return self._members.root if self._members is not None else None

    # -- the login --

    @property
    def owner(self) -> Owner | None:
        """Whose login it is, expired or not; None without one."""
        if self.login.credentials is None:
            return None
        identity = self.login.credentials.identity
        return Owner(self.name, identity.user, identity.root_cluster)

    @property
    def login_state(self) -> ClusterState:
        """The state of the login now: it changes by itself when it expires."""
        return self.login.state_at(self._settings.wall_clock())[0]

    async def start(self) -> None:
        """Makes what the login allows. Does no network I/O."""
        await self._use(self.login)

    async def change(self, login: Login) -> None:
        """Takes over what the files hold now; certificates of an earlier login are dropped."""
        before, owner, self.login = self.login, self.owner, login
        if _connection(before) == _connection(login):
            return
        if owner != self.owner:
            await self.close()
        await self._use(login)

    async def _use(self, login: Login) -> None:
        # The connections first: whoever loses a certificate asks for another at once.
        certificates, self._certificates = self._certificates, None
        ssh_access, self._ssh = self._ssh, None
        self._ssh_context = None
        self._connect(login)
        if certificates is not None:
            await certificates.close()
        if ssh_access is not None:
            await ssh_access.close()

    def _connect(self, login: Login) -> None:
        if login.credentials is None:
            return
        if self._members is not None:
            self._members.renew()
            return
        self._members = Members(
            login.credentials.identity.root_cluster,
            self._settings,
            self._crowd,
            profile=self.name,
            login=lambda: self.login,
            names=self._names,
            require=self._require,
            on_change=self._on_change,
            on_leaves=self._leaves_named,
        )

    def _require(self, member: Member | None) -> None:
        """Raises a TeleportError when the cluster cannot be asked at all."""
        state, problem = self.login.state_at(self._settings.wall_clock())
        if state in _LOGIN_ERRORS:
            raise _LOGIN_ERRORS[state](problem)
        if member is None:  # between two logins
            raise UnreachableError(f"{self.name}: a new login is being taken over")
        if not member.is_online:
            if self._members is not None:
                self._members.want_leaves()
            raise UnreachableError(f"leaf cluster {member.cluster.name} is offline")

    # -- kept up to date --

    def refresh(self) -> None:
        """Asks for whatever is due, in the background; failures show in `reports`."""
        if self.login.profile is not None:
            self._refresh_addresses(self.login.profile.web_host)
        try:
            self._require(self._root)
        except TeleportError:
            return
        if self._members is not None:
            self._members.refresh()

    def doubt(self) -> None:
        """The proxy was not reached for a connection: its cluster is asked how it is."""
        if self._root is not None:
            self._root.cluster.doubt()
            self.refresh()

    def _leaves_named(self) -> None:
        self._on_change()
        self.refresh()

    def _refresh_addresses(self, host: str) -> None:
        if self._addresses is None or self._addresses.host != host:
            self._addresses = HostAddresses(
                host,
                self._settings.look_up,
                clock=self._settings.clock,
                on_change=self._on_change,
            )
        if self._addresses.is_due():
            self._background.spawn(self._addresses.refresh())

    # -- names --

    def _names(self, member: Member | None) -> ClusterNames:
        profile, credentials = self.login.profile, self.login.credentials
        config = member.cluster.config if member is not None else None
        return ClusterNames(
            profile=self.name,
            web_host=profile.web_host if profile is not None else "",
            root=credentials.identity.root_cluster.lower() if credentials is not None else "",
            leaf=member.leaf.lower() if member is not None else "",
            public_host=config.proxy_public_host if config is not None else "",
            zones=config.zones if config is not None else None,
            on_the_way=self._on_the_way() if member is self._root else frozenset(),
        )

    def _on_the_way(self) -> frozenset[str]:
        """Listeners of the proxy with an address of their own, and forward proxies."""
        profile = self.login.profile
        if profile is None:
            return frozenset()
        environment = self._settings.environment
        routes = auth_route(profile, environment), web_route(profile, environment)
        forward = (_url_host(route.http_proxy) for route in routes)
        return frozenset(filter(None, (*(route.host for route in routes), *forward)))

    def sources(self) -> list[tuple[ClusterNames | None, Source]]:
        """Whom to ask about names, in order."""
        if self._members is None:
            return [(self._names(None), NoLogin(self._require))]
        return self._members.sources()

    # -- certificates --

    async def certificate(
        self, target: AppTarget | DatabaseTarget, subject: Subject
    ) -> Certificate:
        """A certificate for dialling the target now. A login that is renewed meanwhile is used.

        Raises:
            TeleportError: none is to be had.
        """

        async def get(root: Member, member: Member) -> Certificate:
            certificates = await self._current_certificates(root)
            kept = certificates.kept(subject, leaf=target.leaf)
            if kept is not None:
                return kept  # which tells nothing of the clusters
            certificate = await certificates.get(
                subject,
                cluster=target.cluster,
                leaf=target.leaf,
                owner=await member.cluster.api(),
            )
            member.cluster.note(None)
            return certificate

        return await self._with_login(target, get)

    async def _with_login(self, target: Target, get: Callable[[Member, Member], Awaitable[T]]) -> T:
        """What `get` makes of the root cluster and the target's; again with a login that is new."""
        for _ in range(MAX_RENEWALS):
            login, owner = self.login, self.owner
            try:
                return await self._once(target, get)
            except UnreachableError:
                if self.login is login or self.owner != owner:
                    raise
        return await self._once(target, get)

    async def _once(self, target: Target, get: Callable[[Member, Member], Awaitable[T]]) -> T:
        login = self.login
        root, member = self._members_of(target)
        try:
            return await get(root, member)
        except TeleportError as error:
            if self.login is not login:
                raise  # which tells nothing of the login that is used now
            if error.state is ClusterState.HARDWARE_KEY:
                # For this resource alone, or for everything: asking the cluster tells which.
                root.cluster.expire()
            elif member is root:
                root.cluster.note(error)
            elif error.state is ClusterState.UNREACHABLE:
                # Either of the two failed; asking them tells which.
                root.cluster.expire()
                member.cluster.expire()
            raise

    def _members_of(self, target: Target) -> tuple[Member, Member]:
        """The root cluster and the target's, both of which can be asked."""
        root = self._root
        self._require(root)
        member = self._members.get(target.leaf) if self._members is not None else None
        if root is None or member is None or root.cluster.name != target.root_cluster:
            raise UnknownAppError(
                f"cluster {target.cluster} is not reached with this login any more"
            )
        self._require(member)
        return root, member

    async def _current_certificates(self, root: Member) -> Certificates:
        login = self.login
        api = await self._current_api(root)
        if self._certificates is None:
            settings = self._settings
            self._certificates = Certificates(
                login,
                api,
                wall_clock=settings.wall_clock,
                prompter=settings.prompter,
                prompt_seconds=settings.prompt_seconds,
                callbacks=settings.callbacks,
                ca_file=settings.ca_file,
                insecure=settings.insecure,
                tally=settings.tally,
            )
        return self._certificates

    async def _current_api(self, root: Member) -> AuthApi:
        """The root's auth service, if the login is the same afterwards."""
        login = self.login
        api = await root.cluster.api()
        if login is not self.login or self._root is not root:
            raise UnreachableError(f"{self.name}: a new login is being taken over")
        return api

    # -- SSH --

    def ssh_context(self, target: ClusterTarget) -> ssl.SSLContext:
        """For the proxy's service that carries SSH to hosts of the target's cluster.

        Raises:
            TeleportError: the login does not allow it, or the cluster is offline.
        """
        self._members_of(target)
        if self._ssh_context is None:
            credentials = self.login.credentials
            assert credentials is not None
            root = credentials.identity.root_cluster
            try:
                self._ssh_context = cluster_context(
                    root,
                    self.login.authorities.get(root, ()),
                    credentials.certificate,
                    credentials.key,
                    alpn=TRANSPORT_ALPN,
                )
            except ssl.SSLError as error:
                raise UnreachableError(
                    f"a host authority of cluster {root} is no certificate: "
                    f"run tsh login --proxy={self.name}"
                ) from error
        return self._ssh_context

    async def ssh_credentials(self, target: ClusterTarget, user: str, home: Path) -> SshCredentials:
        """For one login as `user` to the target. `home` is the tsh home.

        Raises:
            TeleportError: none are to be had.
        """

        async def get(root: Member, member: Member) -> SshCredentials:
            access = await self._current_ssh(root, home)
            login = SshLogin(target.host, user, target.cluster, target.leaf)
            return await access.get(login, await member.cluster.api())

        return await self._with_login(target, get)

    async def _current_ssh(self, root: Member, home: Path) -> SshAccess:
        login = self.login
        api = await self._current_api(root)
        if self._ssh is None:
            settings = self._settings
            second_factor = SecondFactor(
                login,
                api,
                settings.prompter,
                prompt_seconds=settings.prompt_seconds,
                callbacks=settings.callbacks,
            )
            self._ssh = SshAccess(
                login,
                home,
                api,
                second_factor,
                clock=settings.clock,
                wall_clock=settings.wall_clock,
                tally=settings.tally,
            )
        return self._ssh

    # -- the status page --

    def reports(self) -> list[messages.Cluster]:
        """The root cluster and its leaves."""
        state, problem = self.login.state_at(self._settings.wall_clock())
        if self._members is None:
            return [self._report(None, state, problem, knows_leaves=False)]
        found = []
        for member in self._members.all:
            its_state, its_problem = state, "" if member.leaf else problem
            if state is ClusterState.OK:
                is_in_question = self._members.is_in_question(member)
                its_state, its_problem = health(member, is_in_question=is_in_question)
            knows_leaves = self._members.knows_leaves
            found.append(self._report(member, its_state, its_problem, knows_leaves=knows_leaves))
        return found

    def _report(
        self, member: Member | None, state: ClusterState, problem: str, *, knows_leaves: bool
    ) -> messages.Cluster:
        return report(
            self.login,
            member,
            state,
            problem,
            knows_leaves=knows_leaves,
            proxy_addresses=self._addresses.known if self._addresses is not None else (),
        )

    async def close(self) -> None:
        """Ends what runs, closes connections, forgets certificates and what clusters said."""
        certificates, self._certificates = self._certificates, None
        ssh_access, self._ssh = self._ssh, None
        self._ssh_context = None
        members, self._members = self._members, None
        if certificates is not None:
            await certificates.close()
        if ssh_access is not None:
            await ssh_access.close()
        if members is not None:
            await members.close()
        await self._background.close()


def _connection(login: Login) -> tuple[object, ...]:
    """What a connection is made of; when it changes, a new one is due."""
    fingerprint = login.credentials.fingerprint if login.credentials is not None else None
    return fingerprint, login.profile, login.authorities


def _url_host(url: str) -> str:
    try:
        return normalise(urlsplit(url).hostname or "")
    except ValueError:
        return ""

"""One profile: its login, its clusters, its apps and their certificates.

Only the root cluster is asked so far; a leaf will be one more `Cluster` with its own `AppFinder`.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Network
from typing import TypeAlias

from ipc import messages
from ipc.messages import ClusterState
from workers.proxy.teleport.apps import App, AppFinder
from workers.proxy.teleport.auth_client import AuthApi
from workers.proxy.teleport.certificates import AppCertificate, AppCertificates
from workers.proxy.teleport.cluster import Cluster, ClusterConfig
from workers.proxy.teleport.errors import (
    HardwareKeyError,
    LoginExpiredError,
    NotLoggedInError,
    TeleportError,
    UnreachableError,
    ZonesUnknownError,
    safe_text,
)
from workers.proxy.teleport.home import Login
from workers.proxy.teleport.names import is_direct_subdomain, is_subdomain, is_zone

Connect: TypeAlias = Callable[[Login], AuthApi]

_LOGIN_ERRORS: dict[ClusterState, type[TeleportError]] = {
    ClusterState.LOGIN_EXPIRED: LoginExpiredError,
    ClusterState.NO_LOGIN: NotLoggedInError,
    ClusterState.HARDWARE_KEY: HardwareKeyError,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the whole client shares. Times in seconds."""

    connect: Connect
    clock: Callable[[], float]  # monotonic
    wall_clock: Callable[[], datetime]  # time zone aware
    ca_file: str = ""
    insecure: bool = False
    config_seconds: float = 300.0
    app_seconds: float = 60.0
    no_app_seconds: float = 10.0
    # A name must not wait longer than this for a cluster of which nothing is known yet.
    first_answer_seconds: float = 3.0


@dataclass(frozen=True, slots=True)
class AppTarget:
    """The app a name stands for. `leaf` is empty for an app of the root cluster."""

    profile: str
    root_cluster: str
    leaf: str
    app: App
    ipv4_range: IPv4Network | None  # None: VNet's own

    @property
    def cluster(self) -> str:
        """The cluster that has the app."""
        return self.leaf or self.root_cluster


class Session:
    """What VNet does with one profile."""

    def __init__(self, login: Login, settings: Settings, on_change: Callable[[], None]) -> None:
        self.name = login.name
        self.login = login
        self._settings = settings
        self._on_change = on_change
        self._cluster: Cluster | None = None
        self._apps: AppFinder | None = None
        self._certificates: AppCertificates | None = None
        self._cannot_connect: UnreachableError | None = None

    async def start(self) -> None:
        """Makes what the login allows. Does no network I/O."""
        await self._use(self.login)

    async def change(self, login: Login) -> None:
        """Takes over what the files hold now; certificates of an earlier login are dropped."""
        before, self.login = self.login, login
        if _connection(before) == _connection(login):
            return
        if _owner(before) != _owner(login):
            await self.close()
        await self._use(login)

    async def _use(self, login: Login) -> None:
        if self._certificates is not None:
            await self._certificates.close()
            self._certificates = None
        if login.credentials is None:
            return
        self._cannot_connect = None
        try:
            api = self._settings.connect(login)
        except UnreachableError as error:
            self._cannot_connect = error
            return
        identity, settings = login.credentials.identity, self._settings
        if self._cluster is None:
            self._cluster = Cluster(
                identity.root_cluster,
                api,
                clock=settings.clock,
                on_change=self._on_change,
                config_ttl_seconds=settings.config_seconds,
            )
            self._apps = AppFinder(
                self._cluster,
                clock=settings.clock,
                positive_seconds=settings.app_seconds,
                negative_seconds=settings.no_app_seconds,
            )
        else:
            self._cluster.use(api)
            assert self._apps is not None
            self._apps.expire()
        self._certificates = AppCertificates(
            identity,
            api,
            wall_clock=settings.wall_clock,
            ca_file=settings.ca_file,
            insecure=settings.insecure,
        )

    @property
    def config(self) -> ClusterConfig | None:
        """What the root cluster said last about itself."""
        return self._cluster.config if self._cluster is not None else None

    @property
    def hosts(self) -> frozenset[str]:
        """Names of the proxy: never VNet's, or VNet could not reach the proxy itself."""
        names = {self.name}
        if self.login.profile is not None:
            names.add(self.login.profile.web_host)
        if self.config is not None:
            names.add(self.config.proxy_public_host)
        return frozenset(names - {""})

    def require_login(self) -> Cluster:
        """The root cluster, ready to be asked.

        Raises:
            TeleportError: there is no usable login, or the proxy cannot be dialled at all.
        """
        state, problem = self.login.state_at(self._settings.wall_clock())
        if state in _LOGIN_ERRORS:
            raise _LOGIN_ERRORS[state](problem)
        if self._cannot_connect is not None:
            raise self._cannot_connect
        if self._cluster is None:  # between two logins
            raise UnreachableError(f"{self.name}: a new login is being taken over")
        return self._cluster

    async def refresh(self) -> None:
        """Asks for the configuration if that is due; failures show in `report`."""
        try:
            cluster = self.require_login()
            if cluster.is_due():
                await cluster.current_config()
        except TeleportError:
            return

    async def find(self, name: str, spelling: str) -> AppTarget | None:
        """The app behind a normalised name; None when no cluster of this profile has one.

        `spelling` is the same name as it was typed.

        Raises:
            ZonesUnknownError: the cluster's zones are not known, so neither is whose the name is.
            TeleportError: the name lies in a zone of the cluster, which cannot be asked.
        """
        if not await self._is_candidate(name):
            return None
        try:
            self.require_login()
        except TeleportError:
            known = self._apps.last_known(name) if self._apps is not None else None
            if known is None:
                raise
            return self._target(known)
        app = await self._apps.find(name) if self._apps is not None else None
        if app is None and self._apps is not None and spelling != name:
            app = await self._apps.find(spelling)
        return self._target(app) if app is not None else None

    async def _is_candidate(self, name: str) -> bool:
        if is_direct_subdomain(name, self.name):
            return True
        config = self.config
        if config is None:
            try:
                async with asyncio.timeout(self._settings.first_answer_seconds):
                    config = await self.require_login().current_config()
            except TimeoutError as error:
                waiting = UnreachableError(f"{self.name} has not answered yet")
                raise ZonesUnknownError(waiting) from error
            except TeleportError as error:
                raise ZonesUnknownError(error) from error
        return any(is_subdomain(name, zone) for zone in config.zones)

    def _target(self, app: App) -> AppTarget:
        config, credentials = self.config, self.login.credentials
        return AppTarget(
            profile=self.name,
            root_cluster=credentials.identity.root_cluster if credentials is not None else "",
            leaf="",
            app=app,
            ipv4_range=config.ipv4_range if config is not None else None,
        )

    async def certificate(self, target: AppTarget, target_port: int) -> AppCertificate:
        """A certificate for dialling the target now.

        Raises:
            TeleportError: none is to be had.
        """
        cluster, certificates = self.require_login(), self._certificates
        if certificates is None:
            raise UnreachableError(f"{self.name}: a new login is being taken over")
        try:
            certificate = await certificates.get(
                target.app,
                target_port,
                cluster=target.cluster,
                leaf=target.leaf,
                owner=cluster.api,
            )
        except TeleportError as error:
            cluster.note(error)
            raise
        cluster.note(None)
        return certificate

    def report(self) -> messages.Cluster:
        """The root cluster for the status page."""
        state, problem = self.login.state_at(self._settings.wall_clock())
        trouble = self._cannot_connect or (self._cluster.problem if self._cluster else None)
        if state is ClusterState.OK and trouble is not None and trouble.state is not None:
            state, problem = trouble.state, str(trouble)
        config = self.config
        if state is ClusterState.OK and config is not None:
            problem = config.problem
        zones = {self.name: None} if is_zone(self.name) else {}
        zones |= dict.fromkeys(config.zones if config is not None else ())
        credentials, profile = self.login.credentials, self.login.profile
        identity = credentials.identity if credentials is not None else None
        return messages.Cluster(
            name=safe_text(identity.root_cluster if identity else _cluster_name(self.login), 253),
            profile=safe_text(self.name, 253),
            leaf_of=None,
            state=state,
            user=safe_text(profile.user if profile is not None else "", 500),
            expires=_rfc3339(identity.not_after) if identity is not None else None,
            zones=list(zones),
            ranges=[str(config.ipv4_range)] if config and config.ipv4_range else [],
            is_configured=config is not None,
            problem=safe_text(problem, 500),
        )

    async def close(self) -> None:
        """Ends what runs, closes connections, forgets certificates and what the cluster said."""
        if self._certificates is not None:
            await self._certificates.close()
        if self._apps is not None:
            await self._apps.close()
        if self._cluster is not None:
            await self._cluster.close()
        self._cluster = self._apps = self._certificates = None


def _connection(login: Login) -> tuple[object, ...]:
    """What a connection is made of; when it changes, a new one is due."""
    fingerprint = login.credentials.fingerprint if login.credentials is not None else None
    return fingerprint, login.profile, login.authorities


def _owner(login: Login) -> tuple[str, str] | None:
    if login.credentials is None:
        return None
    identity = login.credentials.identity
    return identity.user, identity.root_cluster


def _cluster_name(login: Login) -> str:
    return login.profile.cluster if login.profile is not None else login.name


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

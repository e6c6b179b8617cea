"""The clusters of one profile: the root, and the leaves that it names, kept up to date.

Login --> Member (root)  --> Cluster          zones, range
                         --> AppFinder        name -> app
                         --> DatabaseFinder   identifier -> database
      --> Leaves         --> Member (each leaf)
"""

import asyncio
from collections.abc import Callable, Coroutine

from ipc.messages import ClusterState
from workers.proxy.teleport.apps import AppFinder
from workers.proxy.teleport.auth_client import AuthApi
from workers.proxy.teleport.background import Background
from workers.proxy.teleport.cluster import RETRY_SECONDS, Cluster
from workers.proxy.teleport.consulting import Deferred, Question, Source
from workers.proxy.teleport.databases import DatabaseFinder
from workers.proxy.teleport.errors import TeleportError, UnreachableError, ZonesUnknownError
from workers.proxy.teleport.home import Login
from workers.proxy.teleport.leaves import Leaves
from workers.proxy.teleport.member import Member
from workers.proxy.teleport.precedence import ClusterNames, candidate
from workers.proxy.teleport.settings import Crowd, Settings
from workers.proxy.teleport.unheard import UnknownLeaves

MAX_LEAF_RETRY_SECONDS = 60.0
# When VNet starts, the system's resolver may be away for a moment, because VNet has set it up.
FIRST_ROOT_RETRY_SECONDS = 0.5


class Members:
    """The root cluster of a profile and its leaves. Does no network I/O before it is asked to.

    `login` is the one in use now; `names` and `require` are as for `Member`. `on_change` is called
    when a cluster is in another state than before, `on_leaves` whenever the root has named its
    leaves.
    """

    def __init__(
        self,
        root_cluster: str,
        settings: Settings,
        crowd: Crowd,
        *,
        profile: str,
        login: Callable[[], Login],
        names: Callable[[Member], ClusterNames],
        require: Callable[[Member], None],
        on_change: Callable[[], None],
        on_leaves: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._crowd = crowd
        self._profile = profile
        self._login = login
        self._names = names
        self._require = require
        self._on_change = on_change
        self._on_leaves = on_leaves
        self._leaves: dict[str, Member] = {}
        self._gone: set[Member] = set()
        self._background = Background()
        self._is_closed = False
        self.root = self._member(root_cluster, "")
        self._list = Leaves(
            self.root.cluster,
            clock=settings.clock,
            on_answer=self._leaves_answered,
            ttl_seconds=settings.leaves_seconds,
        )

    @property
    def all(self) -> list[Member]:
        """The root and its leaves, in the order of precedence."""
        return [self.root, *self._leaves.values()]

    def get(self, leaf: str) -> Member | None:
        """A leaf by name, or the root by none."""
        return self._leaves.get(leaf) if leaf else self.root

    @property
    def knows_leaves(self) -> bool:
        """Whether the root has named its leaves."""
        return self._list.known is not None

    def _member(self, root_cluster: str, leaf: str) -> Member:
        settings = self._settings
        cluster = Cluster(
            leaf or root_cluster,
            self._connect_to(leaf),
            clock=settings.clock,
            on_change=self._on_change,
            config_ttl_seconds=settings.config_seconds,
            retry_seconds=RETRY_SECONDS if leaf else FIRST_ROOT_RETRY_SECONDS,
            max_retry_seconds=MAX_LEAF_RETRY_SECONDS if leaf else RETRY_SECONDS,
            limiter=self._crowd.configs if leaf else None,
        )
        return Member(
            cluster,
            profile=self._profile,
            root_cluster=root_cluster,
            leaf=leaf,
            names=self._names,
            require=self._require,
            crowd=self._crowd.remote,
            apps=AppFinder(
                cluster,
                clock=settings.clock,
                positive_seconds=settings.app_seconds,
                negative_seconds=settings.no_app_seconds,
            ),
            databases=DatabaseFinder(
                cluster,
                clock=settings.clock,
                positive_seconds=settings.app_seconds,
                negative_seconds=settings.no_app_seconds,
            ),
            first_answer_seconds=settings.first_answer_seconds,
        )

    def _connect_to(self, leaf: str) -> Callable[[], Coroutine[None, None, AuthApi]]:
        login = self._login()

        async def connect() -> AuthApi:
            if not leaf:
                return self._settings.connect(login, "", None)
            member = self._leaves.get(leaf)
            authorities = member.authorities if member is not None else None
            authorities = authorities or login.authorities.get(leaf)
            if authorities is None and not self._is_closed:
                authorities = await self._list.authorities(leaf)
            if member is not None:
                member.authorities = authorities
            return self._settings.connect(login, leaf, authorities)

        return connect

    # -- kept up to date --

    def renew(self) -> None:
        """Takes over a new login of the same user; what is known stays until it is asked again."""
        self._list.expire()
        for member in self.all:
            member.authorities = None
            member.cluster.use(self._connect_to(member.leaf))
            member.expire()

    def refresh(self) -> None:
        """Asks for whatever is due, in the background."""
        if any(self._is_in_doubt(leaf) for leaf in self._leaves.values()):
            self._list.want()
        if self._list.is_due():
            self._background.spawn(self._list.current())
        for member in self.all:
            if not member.is_online:
                continue
            if self._is_distrusted(member):
                member.trust_checked_at = self._settings.clock()
                self._background.spawn(self._renew_trust(member))
            elif member.cluster.is_due():
                self._background.spawn(member.cluster.current_config())

    def want_leaves(self) -> None:
        """A leaf that is said to be offline is wanted: the root is asked again soon."""
        self._list.want()

    def is_in_question(self, member: Member) -> bool:
        """Whether a leaf fails that may be offline: the root is being asked."""
        return bool(member.leaf) and _is_unreachable(member) and not self._is_confirmed(member)

    def _is_in_doubt(self, leaf: Member) -> bool:
        """Whether the root was not asked about the leaf since that failed last."""
        return _is_unreachable(leaf) and leaf.cluster.failed_at >= self._list.answered_at

    def _is_confirmed(self, leaf: Member) -> bool:
        """Whether the root called a leaf connected after that began to fail."""
        return _is_unreachable(leaf) and leaf.cluster.failing_since < self._list.answered_at

    def _is_distrusted(self, member: Member) -> bool:
        """Whether a leaf fails that is connected: its authority may be another by now."""
        return (
            bool(member.leaf)
            and self._is_confirmed(member)
            and member.cluster.failed_at > member.trust_checked_at
        )

    async def _renew_trust(self, leaf: Member) -> None:
        authorities = await self._list.authorities(leaf.leaf, is_new=True)
        if leaf.authorities is not None and set(authorities) != set(leaf.authorities):
            leaf.authorities = authorities
            leaf.cluster.reconnect(self._connect_to(leaf.leaf))

    def _leaves_answered(self) -> None:
        if self._is_closed:
            return
        known = self._list.known or {}
        before, self._leaves = self._leaves, {}
        for name, is_online in known.items():
            leaf = before.pop(name, None) or self._member(self.root.cluster.name, name)
            if is_online and not leaf.is_online:
                leaf.cluster.expire()
            elif not is_online:
                leaf.cluster.note(None)
            leaf.is_online = is_online
            self._leaves[name] = leaf
        for gone in before.values():
            self._gone.add(gone)
            self._background.spawn(self._forget(gone))
        self._on_leaves()

    async def _forget(self, gone: Member) -> None:
        await gone.close()
        self._gone.discard(gone)

    # -- names --

    def sources(self) -> list[tuple[ClusterNames | None, Source]]:
        """Whom to ask about names, in order."""
        found: list[tuple[ClusterNames | None, Source]] = [
            (member.names, member) for member in self.all
        ]
        if not self.knows_leaves:
            found.append((None, UnknownLeaves(self._ask_unknown_leaves)))
        return found

    async def _ask_unknown_leaves(self, question: Question) -> Deferred:
        """The leaves that may have a name, once they are known.

        Raises:
            ZonesUnknownError: they are not known in time.
        """
        try:
            await self._wait_for_leaves()
        except TeleportError as error:
            raise ZonesUnknownError(error) from error
        found = [(leaf, candidate(question.name, leaf.names)) for leaf in self._leaves.values()]
        return Deferred(
            [(leaf, c) for leaf, c in found if c is not None or not leaf.cluster.config]
        )

    async def _wait_for_leaves(self) -> None:
        """Waits for the first list as long as for a first configuration."""
        self._require(self.root)
        clock, seconds = self._settings.clock, self._settings.first_answer_seconds
        left = self.root.cluster.asked_since + seconds - clock()
        try:
            async with asyncio.timeout(max(left, 0.0)):
                await self._list.current()
        except TimeoutError as error:
            raise UnreachableError(
                f"{self.root.cluster.name} has not named its leaf clusters yet"
            ) from error

    async def close(self) -> None:
        """Ends what runs, closes connections, forgets what the clusters said."""
        members = [*self.all, *self._gone]
        self._is_closed = True
        self._leaves = {}
        self._gone = set()
        await self._background.close()
        await self._list.close()
        for member in members:
            await member.close()


def _is_unreachable(member: Member) -> bool:
    problem = member.cluster.problem
    return problem is not None and problem.state is ClusterState.UNREACHABLE

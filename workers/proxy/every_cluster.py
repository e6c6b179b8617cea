"""Asks every cluster of a tsh home, roots and leaves, the same question: a few at a time.

home --> login --> root --> leaves          of each that answers: `ask`
           |         |         |
           +---------+---------+-- Problem  of each that does not; the others go on
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

from ipc.messages import ClusterState
from workers.proxy.resource_rows import Place, Problem
from workers.proxy.teleport.auth_client import AuthApi
from workers.proxy.teleport.cluster import make_config
from workers.proxy.teleport.errors import RefusedError, TeleportError, UnreachableError
from workers.proxy.teleport.home import Login, read_home
from workers.proxy.teleport.leaves import read_leaves
from workers.proxy.teleport.precedence import ClusterNames

MAX_AT_ONCE = 8

# As `auth_client.Connector`: a cluster's name ("" for the root's), and its authorities if known.
Connect: TypeAlias = Callable[[Login, str, tuple[bytes, ...] | None], AuthApi]


@dataclass(frozen=True, slots=True)
class AskedCluster:
    """A cluster that answers. `note` takes problems that leave the rest of the answer standing."""

    place: Place
    api: AuthApi
    note: Callable[[str], None]


Ask: TypeAlias = Callable[[AskedCluster], Awaitable[None]]


@dataclass(slots=True)
class Survey:
    """What came of it. `clusters`: names of all that are known, asked or not."""

    problems: list[Problem] = field(default_factory=list)
    clusters: set[str] = field(default_factory=set)

    def note(self, profile: str, cluster: str, text: str) -> None:
        """Adds a problem, once."""
        problem = Problem(profile=profile, cluster=cluster, text=text)
        if problem not in self.problems:
            self.problems.append(problem)


async def ask_every_cluster(
    directory: Path, connect: Connect, now: datetime, ask: Ask, *, only: str = ""
) -> Survey:
    """Calls `ask` for each cluster, or for those named `only`; its TeleportErrors become problems.

    Problems are sorted by profile and cluster.
    """
    survey = Survey()
    home = await asyncio.to_thread(read_home, directory)
    if home.problem:
        survey.note("", "", home.problem)
    limiter = asyncio.Semaphore(MAX_AT_ONCE)
    async with asyncio.TaskGroup() as group:
        for login in home.logins:
            group.create_task(_Login(login, connect, ask, survey, limiter, only).run(now))
    survey.problems.sort(key=lambda problem: (problem.profile, problem.cluster))
    return survey


@dataclass(frozen=True, slots=True)
class _Login:
    login: Login
    connect: Connect
    ask: Ask
    survey: Survey
    limiter: asyncio.Semaphore
    only: str

    async def run(self, now: datetime) -> None:
        state, problem = self.login.state_at(now)
        if state is not ClusterState.OK:
            self.survey.note(self.login.name, "", problem)
            return
        try:
            root = self.connect(self.login, "", None)
        except UnreachableError as error:
            self.survey.note(self.login.name, self._root, str(error))
            return
        self.survey.clusters.add(self._root)
        try:
            async with asyncio.TaskGroup() as group:
                if self.only in {"", self._root}:
                    group.create_task(self._ask(root, ""))
                if self.only != self._root:
                    group.create_task(self._ask_leaves(root))
        finally:
            root.close()

    @property
    def _root(self) -> str:
        assert self.login.credentials is not None
        return self.login.credentials.identity.root_cluster

    async def _ask_leaves(self, root: AuthApi) -> None:
        try:
            async with self.limiter:
                leaves = read_leaves(await root.remote_clusters())
        except RefusedError:
            return  # a root that does not tell its leaves has none, as far as its user can know
        except TeleportError as error:
            self.survey.note(self.login.name, self._root, str(error))
            return
        self.survey.clusters.update(leaves)
        async with asyncio.TaskGroup() as group:
            for leaf, is_online in leaves.items():
                if self.only not in {"", leaf}:
                    continue
                if is_online:
                    group.create_task(self._ask_leaf(root, leaf))
                else:
                    text = f"it has no connection to {self._root} now"
                    self.survey.note(self.login.name, leaf, text)

    async def _ask_leaf(self, root: AuthApi, leaf: str) -> None:
        try:
            async with self.limiter:
                authorities = await root.host_authority(leaf)
            api = self.connect(self.login, leaf, authorities)
        except TeleportError as error:
            self.survey.note(self.login.name, leaf, str(error))
            return
        try:
            await self._ask(api, leaf)
        finally:
            api.close()

    async def _ask(self, api: AuthApi, leaf: str) -> None:
        profile = self.login.profile
        assert profile is not None

        def note(text: str) -> None:
            self.survey.note(self.login.name, leaf or self._root, text)

        try:
            async with self.limiter:
                place = Place(
                    root=self._root,
                    leaf=leaf,
                    names=await self._names(api, leaf),
                    web_port=profile.web_port,
                )
                await self.ask(AskedCluster(place, api, note))
        except TeleportError as error:
            note(str(error))

    async def _names(self, api: AuthApi, leaf: str) -> ClusterNames:
        profile = self.login.profile
        assert profile is not None
        ping = await api.ping()
        try:
            config = make_config(ping.ProxyPublicAddr, await api.vnet_config())
        except RefusedError:
            config = None
        return ClusterNames(
            profile=self.login.name,
            web_host=profile.web_host,
            root=self._root.lower(),
            leaf=leaf.lower(),
            public_host=config.proxy_public_host if config is not None else "",
            zones=config.zones if config is not None else None,
        )

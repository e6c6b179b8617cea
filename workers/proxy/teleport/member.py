"""One cluster of a profile, root or leaf, and what it is asked about names."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Network
from typing import TypedDict

from workers.proxy.teleport.apps import AppFinder
from workers.proxy.teleport.cluster import Cluster
from workers.proxy.teleport.consulting import Answered, Question
from workers.proxy.teleport.databases import DatabaseFinder
from workers.proxy.teleport.errors import TeleportError, ZonesUnknownError
from workers.proxy.teleport.precedence import (
    NO_CANDIDATE,
    Answer,
    Candidate,
    ClusterNames,
    candidate,
)


class Place(TypedDict):
    """What all targets of a cluster have in common, as in `targets`."""

    profile: str
    root_cluster: str
    leaf: str
    ipv4_range: IPv4Network | None


class Member:
    """A cluster with its apps and databases.

    `names` tells its names now; `require` raises a TeleportError when it cannot be asked at all;
    `crowd` bounds how many clusters are asked at once for names that are not in their zones.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        profile: str,
        root_cluster: str,
        leaf: str,
        names: Callable[["Member"], ClusterNames],
        require: Callable[["Member"], None],
        crowd: asyncio.Semaphore,
        apps: AppFinder,
        databases: DatabaseFinder,
        first_answer_seconds: float,
    ) -> None:
        self.cluster = cluster
        self.profile = profile
        self.root_cluster = root_cluster
        self.leaf = leaf
        # A leaf that its root calls offline is not asked.
        self.is_online = True
        # When its authority was compared with what the root knows.
        self.trust_checked_at = cluster.asked_since
        self.authorities: tuple[bytes, ...] | None = None
        self._names = names
        self._require = require
        self._crowd = crowd
        self._apps = apps
        self._databases = databases
        self._first_answer_seconds = first_answer_seconds

    @property
    def names(self) -> ClusterNames:
        """The names by which it is known now."""
        return self._names(self)

    @property
    def place(self) -> Place:
        """Where its targets are."""
        config = self.cluster.config
        return {
            "profile": self.profile,
            "root_cluster": self.root_cluster,
            "leaf": self.leaf,
            "ipv4_range": config.ipv4_range if config is not None else None,
        }

    def known(self, question: Question, candidate: Candidate) -> Answer | None:
        """See `Source`: the answer that is remembered, if it is young enough."""
        if _is_fresh(question, candidate):
            return None
        app = self._apps.current(question.name, candidate.label)
        if app is None or (app[0] is None and question.spelling != question.name):
            return None
        if not candidate.identifier:
            return Answer(app[0])
        database = self._databases.current(candidate.identifier)
        return None if database is None else Answer(app[0], database[0])

    def last_known(self, question: Question, candidate: Candidate) -> Answer | None:
        """See `Source`."""
        answer = Answer(
            self._apps.last_known(question.name, candidate.label),
            self._databases.last_known(candidate.identifier) if candidate.identifier else None,
        )
        return answer if answer != Answer() else None

    async def ask(self, question: Question, candidate: Candidate | None) -> Answered:
        """See `Source`.

        Raises:
            ZonesUnknownError: the cluster's zones are not known, so neither is whose the name is.
            TeleportError: the name may be the cluster's, which cannot be asked.
        """
        if candidate is None:
            candidate = await self._candidate(question)
            if candidate is NO_CANDIDATE:
                return Answered(candidate, Answer())
        try:
            self._require(self)
            if candidate.is_remote and self.cluster.problem is not None:
                raise self.cluster.problem
        except TeleportError:
            known = self.last_known(question, candidate)
            if known is None:
                raise
            return Answered(candidate, known)
        if not candidate.is_remote:
            if self.cluster.config is None:
                # The range is part of the answer: without it the name would move to another address.
                with suppress(TeleportError):
                    await self.cluster.first_config(self._first_answer_seconds)
            return Answered(candidate, await self._ask(question, candidate))
        async with self._crowd:
            return Answered(candidate, await self._ask(question, candidate))

    async def _candidate(self, question: Question) -> Candidate:
        try:
            if self.cluster.config is None:
                self._require(self)
            await self.cluster.first_config(self._first_answer_seconds)
        except TeleportError as error:
            raise ZonesUnknownError(error) from error
        return candidate(question.name, self.names) or NO_CANDIDATE

    async def _ask(self, question: Question, candidate: Candidate) -> Answer:
        fresh = _is_fresh(question, candidate)
        app = self._apps.find(
            question.name,
            spelling=question.spelling,
            label=candidate.label,
            fresh=fresh,
        )
        if not candidate.identifier:
            return Answer(await app)
        database = self._databases.find(candidate.identifier, spelling=question.label, fresh=fresh)
        return Answer(*await asyncio.gather(app, database))

    def expire(self) -> None:
        """Lets every name be asked again, with another login."""
        self._apps.expire()
        self._databases.expire()

    async def close(self) -> None:
        """Ends what runs, closes the connection, forgets what the cluster said."""
        await self._apps.close()
        await self._databases.close()
        await self.cluster.close()


def _is_fresh(question: Question, candidate: Candidate) -> bool:
    # All leaves would be asked at each connection to a name below the root's proxy. A new web app
    # of theirs is reached nevertheless: an undecided name leads to the web port as well.
    return question.fresh and (not candidate.is_remote or bool(candidate.identifier))

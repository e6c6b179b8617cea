"""Which clusters a name may belong to, and which of their answers counts. Pure.

Source: `lib/vnet/fqdn_resolver.go`. Two tables say it all: RULES (what makes a cluster a candidate)
and CLAIMS (what a name stands for, best first). Differences from the source: names are compared
without case; a name `<identifier>.db.<proxy>` that fits no database does not exist; and no name of
a proxy is ever claimed, also not one below a custom zone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeAlias, TypeVar

from workers.proxy.teleport.apps import AnyApp, App, OtherApp
from workers.proxy.teleport.databases import Database
from workers.proxy.teleport.errors import TeleportError, ZonesUnknownError
from workers.proxy.teleport.names import is_zone

M = TypeVar("M")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNames:
    """The names by which a cluster is known, all normalised; empty where there is none.

    `leaf` is empty for a root. `zones` holds the proxy's public host and the custom zones; None
    while the cluster has not been asked. `on_the_way` are other hosts that lead to the cluster.
    """

    profile: str
    web_host: str
    root: str
    leaf: str
    public_host: str = ""
    zones: tuple[str, ...] | None = None
    on_the_way: frozenset[str] = frozenset()

    @property
    def cluster(self) -> str:
        """The cluster's own name."""
        return self.leaf or self.root

    @property
    def proxy_hosts(self) -> frozenset[str]:
        """Names of its proxies: never VNet's, or nobody could reach the proxy any more."""
        return frozenset({self.profile, self.web_host, self.public_host} - {""})


class Relation(Enum):
    """Why a cluster is a candidate for a name."""

    PROFILE = auto()  # one label below the profile's name
    CLUSTER = auto()  # below the cluster's name
    ZONE = auto()  # below the proxy's public address or a custom zone
    DATABASE = auto()  # one label below `db.<proxy>`
    # The same below the root's proxy, for a leaf: its own databases are below its own proxy.
    ROOT_DATABASE = auto()


_OWN = frozenset({Relation.CLUSTER, Relation.ZONE, Relation.DATABASE})


def _cluster_suffixes(names: ClusterNames) -> Iterable[str]:
    # A name of one label would take a whole top-level domain.
    if is_zone(names.cluster):
        yield names.cluster
    if names.leaf and is_zone(names.root):
        yield f"{names.leaf}.{names.root}"


def _own_proxies(names: ClusterNames) -> Iterable[str]:
    return [names.public_host] if names.leaf else names.proxy_hosts


@dataclass(frozen=True, slots=True)
class Rule:
    """A cluster is a candidate for the names below these suffixes; `is_direct`: by one label."""

    relation: Relation
    suffixes: Callable[[ClusterNames], Iterable[str]]
    is_direct: bool = False


RULES = (
    Rule(Relation.PROFILE, lambda c: [c.profile], is_direct=True),
    Rule(Relation.CLUSTER, _cluster_suffixes),
    Rule(Relation.ZONE, lambda c: c.zones or ()),
    Rule(
        Relation.DATABASE,
        lambda c: [f"db.{host}" for host in _own_proxies(c) if host],
        is_direct=True,
    ),
    Rule(
        Relation.ROOT_DATABASE,
        lambda c: [f"db.{host}" for host in {c.profile, c.web_host} if c.leaf and host],
        is_direct=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cluster that may have the name.

    `label`: the app name that counts too, for a leaf's web apps below the root's proxy.
    `identifier`: of the database that the name may stand for. `host`, `suffix`: the name split
    before the cluster's, empty where it is not below that. `is_remote`: it is a leaf, and the name
    in none of its zones.
    """

    relations: frozenset[Relation]
    label: str = ""
    identifier: str = ""
    host: str = ""
    suffix: str = ""
    is_remote: bool = False


NO_CANDIDATE = Candidate(frozenset())

# Why, and below which of the cluster's names; the longest of these comes first.
_Hits: TypeAlias = tuple[tuple[Relation, str], ...]


def candidate(name: str, names: ClusterNames) -> Candidate | None:
    """What makes this cluster a candidate for a normalised name; None when nothing does."""
    suffixes = _suffixes(names)
    hits = [
        (relation, suffix)
        for suffix, is_direct in _suffixes_of(name)
        for relation, wants_direct in suffixes.get(suffix, ())
        if is_direct or not wants_direct
    ]
    return _candidate(name, tuple(hits), is_leaf=bool(names.leaf)) if hits else None


def _suffixes(names: ClusterNames) -> dict[str, list[tuple[Relation, bool]]]:
    found: dict[str, list[tuple[Relation, bool]]] = {}
    for rule in RULES:
        for suffix in rule.suffixes(names):
            found.setdefault(suffix, []).append((rule.relation, rule.is_direct))
    return found


def _suffixes_of(name: str) -> Iterator[tuple[str, bool]]:
    """Every proper suffix that begins at a label, and whether it is one label shorter."""
    rest, is_direct = name, True
    while (at := rest.find(".")) > 0:
        rest = rest[at + 1 :]
        yield rest, is_direct
        is_direct = False


def _candidate(name: str, hits: _Hits, *, is_leaf: bool) -> Candidate:
    relations = frozenset(relation for relation, _ in hits)
    first = name.partition(".")[0]
    # The longest comes first.
    suffix = next((suffix for relation, suffix in hits if relation is Relation.CLUSTER), "")
    return Candidate(
        relations,
        label=first if is_leaf and Relation.PROFILE in relations else "",
        identifier=first if relations & {Relation.DATABASE, Relation.ROOT_DATABASE} else "",
        host=name[: -len(suffix) - 1] if suffix else "",
        suffix=suffix,
        is_remote=is_leaf and not relations & _OWN,
    )


class Directory(Generic[M]):
    """All clusters in their order (profiles by name, a root before its leaves), for look-ups."""

    def __init__(self, members: Iterable[tuple[ClusterNames | None, M]]) -> None:
        """`members` in their order; without names nothing at all is known of that one."""
        self._members = list(members)
        self._by_suffix: dict[str, list[tuple[int, Relation, bool]]] = {}
        self._hosts: set[str] = set()
        self._unknown: list[int] = []
        for index, (names, _) in enumerate(self._members):
            if names is None or names.zones is None:
                self._unknown.append(index)
            if names is None:
                continue
            self._hosts |= names.proxy_hosts | names.on_the_way
            for suffix, rules in _suffixes(names).items():
                self._by_suffix.setdefault(suffix, []).extend((index, *rule) for rule in rules)

    def is_proxy(self, name: str) -> bool:
        """Whether a normalised name is a proxy's."""
        return name in self._hosts

    def find(self, name: str) -> list[tuple[M, Candidate | None]]:
        """Who may have a normalised name, in order; None for one whose zones are not known."""
        hits: dict[int, _Hits] = {}
        for suffix, is_direct in _suffixes_of(name):
            for index, relation, wants_direct in self._by_suffix.get(suffix, ()):
                if is_direct or not wants_direct:
                    hits[index] = (*hits.get(index, ()), (relation, suffix))
        for index in self._unknown:
            hits.setdefault(index, ())
        # The leaves of a profile by the hundred have the same reasons.
        made: dict[tuple[bool, _Hits], Candidate] = {}
        found: list[tuple[M, Candidate | None]] = []
        for index in sorted(hits):
            names, member = self._members[index]
            key = (names is not None and bool(names.leaf), hits[index])
            if hits[index] and key not in made:
                made[key] = _candidate(name, hits[index], is_leaf=key[0])
            found.append((member, made.get(key)))
        return found


@dataclass(frozen=True, slots=True)
class Answer:
    """What a cluster says about a name."""

    app: AnyApp | None = None
    database: Database | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate and how it answered: None is not yet, an error is not at all."""

    candidate: Candidate = NO_CANDIDATE
    outcome: Answer | TeleportError | None = None


class Claim(Enum):
    """What a name stands for."""

    TCP_APP = auto()
    DATABASE = auto()
    WEB_APP = auto()
    NO_DATABASE = auto()
    CLUSTER = auto()


@dataclass(frozen=True, slots=True)
class Decision:
    """Which row's claim counts (`claim` None: nobody's).

    `is_final`: no row that has not answered could change it. `failure`: why nobody may be believed
    to have the name or not to have it, when nobody claims it.
    """

    claim: Claim | None = None
    index: int = -1
    is_final: bool = True
    failure: TeleportError | None = None

    @property
    def is_match(self) -> bool:
        """Whether the name is somebody's."""
        return self.claim not in {None, Claim.NO_DATABASE}


_Find = Callable[[Sequence[Row]], int | None]
_Matters = Callable[[int, Row, int], bool]


def _tcp_app(rows: Sequence[Row]) -> int | None:
    index = _first_app(rows)
    return index if index is not None and isinstance(_answer(rows[index]).app, App) else None


def _web_app(rows: Sequence[Row]) -> int | None:
    index = _first_app(rows)
    return index if index is not None and isinstance(_answer(rows[index]).app, OtherApp) else None


def _first_app(rows: Sequence[Row]) -> int | None:
    return _first(i for i, row in enumerate(rows) if _answer(row).app is not None)


def _database(rows: Sequence[Row]) -> int | None:
    return _first(i for i, row in enumerate(rows) if _answer(row).database is not None)


def _no_database(rows: Sequence[Row]) -> int | None:
    return _first(i for i, row in enumerate(rows) if row.candidate.identifier)


def _cluster(rows: Sequence[Row]) -> int | None:
    named = [i for i, row in enumerate(rows) if row.candidate.suffix]
    return max(named, key=lambda i: len(rows[i].candidate.suffix), default=None)


def _first(indexes: Iterable[int]) -> int | None:
    return next(iter(indexes), None)


def _answer(row: Row) -> Answer:
    return row.outcome if isinstance(row.outcome, Answer) else Answer()


def _every_row(_index: int, _row: Row, _claimant: int) -> bool:
    return True


def _earlier_row(index: int, _row: Row, claimant: int) -> bool:
    return index < claimant


# Best first: the claim, the row that makes it, and which rows could still take it away.
CLAIMS: tuple[tuple[Claim, _Find, _Matters], ...] = (
    (Claim.TCP_APP, _tcp_app, _earlier_row),
    (Claim.DATABASE, _database, _every_row),
    (
        Claim.WEB_APP,
        _web_app,
        lambda index, row, claimant: index < claimant or bool(row.candidate.identifier),
    ),
    (Claim.NO_DATABASE, _no_database, _every_row),
    (Claim.CLUSTER, _cluster, _every_row),
)


def decide(rows: Sequence[Row]) -> Decision:
    """What the answers so far amount to."""
    for claim, find, matters in CLAIMS:
        index = find(rows)
        if index is None:
            continue
        if claim is Claim.NO_DATABASE and (doubt := _doubt(rows, lambda r: r.candidate.identifier)):
            return doubt
        # The cluster whose name it is must have said that it has no such app.
        if claim is Claim.CLUSTER and not isinstance(rows[index].outcome, Answer):
            break
        is_open = any(row.outcome is None and matters(i, row, index) for i, row in enumerate(rows))
        return Decision(claim, index, is_final=not is_open)
    return _doubt(rows, lambda _row: True) or Decision()


def _doubt(rows: Sequence[Row], concerns: Callable[[Row], object]) -> Decision | None:
    """Nothing can be said while these rows have not answered or failed."""
    outcomes = [row.outcome for row in rows if concerns(row)]
    if None in outcomes:
        return Decision(is_final=False)
    failures = [outcome for outcome in outcomes if isinstance(outcome, TeleportError)]
    # One that says whose the name is comes before one that does not.
    failures.sort(key=lambda failure: isinstance(failure, ZonesUnknownError))
    return Decision(failure=failures[0]) if failures else None

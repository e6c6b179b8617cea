"""What clusters want of this machine, checked before the system is touched with it. Pure.

A cluster is not trusted by the supervisor: its zones may become file names, its ranges become
routes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_address
from typing import Final, Protocol

import msgspec

from ipc.messages import MAX_SAFE_TEXT, Cluster, ClusterState, Network
from supervisor.config import is_usable_range

# RFC 1035 section 2.3.1 with underscores, which the DNS itself allows (RFC 2181 section 11).
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# A range larger than this takes a good part of the Internet away.
SHORTEST_PREFIX: Final = 8
# Ranges of all clusters together: each is a route.
MAX_RANGES: Final = 64
# Zones of all clusters together; each is shown, and becomes a setting of the system's resolver.
MAX_ZONES: Final = 1000
# With another state there is no login, and what its cluster wanted is over.
_LOGGED_IN: Final = frozenset(
    {ClusterState.OK, ClusterState.UNREACHABLE, ClusterState.LOGIN_EXPIRED}
)
# More than these are counted: whoever sends a thousand wrong ones is no cluster.
MAX_PROBLEMS: Final = 20
# So long a cluster that was never asked keeps VNet from being called healthy for the first time: by then
# a proxy has found out that nobody answers.
FIRST_ANSWER_SECONDS: Final = 15.0
_ADVICE: Final = "; VNet tries again, and vnet diag looks for the cause"


class InTheWay(Protocol):
    """What of this machine uses a range already, as a clause; empty if nothing does."""

    def __call__(self, block: IPv4Network, *, is_routed: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What one proxy has said of all clusters; `problem` as in ClustersReported.

    Of several proxies together, `awaited` names the root clusters that one of them still asks for
    the first time: a name of theirs may be taken for somebody else's until then.
    """

    clusters: list[Cluster]
    problem: str
    awaited: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Accepted:
    """What of the clusters' wishes is granted; `problems` says what is not, and why."""

    zones: list[str]
    ranges: list[str]
    problems: list[str]


def names_of(view: ClusterView | None) -> frozenset[object]:
    """What decides whose a name is. While it is the same, answers may be given again."""
    return frozenset(
        (c.profile, c.name, c.user, c.state in _LOGGED_IN, c.is_configured, *c.zones)
        for c in (view.clusters if view else [])
    )


def unasked(view: ClusterView) -> list[tuple[str, str]]:
    """Profile and name of each root cluster that has neither answered this proxy nor failed to."""
    return [
        (c.profile, c.name)
        for c in view.clusters
        if c.leaf_of is None
        and c.state is ClusterState.OK
        and not c.is_configured
        and not c.problem
    ]


def combine(views: Sequence[ClusterView]) -> ClusterView:
    """What the proxies say together: as the first has it, but a cluster is well only if all say so.

    Each proxy has connections of its own and notices a failure when it asks something, which the
    others may not do for minutes; a new login is taken over by one before the others. The problem
    is that of the first that has one: each sees the tsh home, and one alone keeps files there.
    """
    first, *others = views
    failing: dict[tuple[str, str], Cluster] = {}
    for view in others:
        for cluster in view.clusters:
            if cluster.state is not ClusterState.OK:
                failing.setdefault((cluster.profile, cluster.name), cluster)
    combined = []
    for cluster in first.clusters:
        worse = failing.get((cluster.profile, cluster.name))
        if cluster.state is ClusterState.OK and worse is not None:
            combined.append(
                msgspec.structs.replace(cluster, state=worse.state, problem=worse.problem)
            )
        else:
            combined.append(cluster)
    combined = [_with_advice(cluster) for cluster in combined]
    return ClusterView(combined, next((view.problem for view in views if view.problem), ""))


def _with_advice(cluster: Cluster) -> Cluster:
    """An error of the network says what has failed, and not what can be done about it."""
    if cluster.state is not ClusterState.UNREACHABLE or not cluster.problem:
        return cluster
    # It has to fit into what is handed over to another version.
    problem = cluster.problem[: MAX_SAFE_TEXT - len(_ADVICE)]
    return msgspec.structs.replace(cluster, problem=f"{problem}{_ADVICE}")


def complete(clusters: Sequence[Cluster], known: Sequence[Cluster]) -> list[Cluster]:
    """The same clusters; of one that has not been asked yet, what `known` has of it.

    A proxy that was just started knows only the logins. Routes and zones must not vanish until its
    clusters have answered, least of all while they are down; nor must those of leaves, which only
    their root can name.
    """
    earlier = {(c.profile, c.name): c for c in known if c.is_configured}
    reported = {(c.profile, c.name) for c in clusters}
    completed = []
    for cluster in clusters:
        before = earlier.get((cluster.profile, cluster.name))
        if cluster.is_configured or cluster.state not in _LOGGED_IN:
            completed.append(cluster)
            continue
        if before is not None:
            cluster = msgspec.structs.replace(  # noqa: PLW2901  # the completed one from here on
                cluster, zones=before.zones, ranges=before.ranges, is_configured=True
            )
        completed.append(cluster)
        completed += [
            leaf
            for key, leaf in earlier.items()
            if leaf.profile == cluster.profile
            and leaf.leaf_of == cluster.name
            and key not in reported
        ]
    return completed


def accept(
    clusters: Sequence[Cluster],
    network: Network,
    upstream: Sequence[bytes],
    in_the_way: InTheWay = lambda _block, *, is_routed: "",  # noqa: ARG005  # nothing is
) -> Accepted:
    """Zones and ranges (VNet's own range first) to be used.

    `upstream` are the packed addresses of nameservers.
    """
    # Dicts, because the order counts and each is wanted once.
    zones: dict[str, None] = {}
    ranges = {network.ranges[0]: None}
    problems: dict[str, None] = {}
    proxies = [address for cluster in clusters for address in cluster.proxy_addresses]
    taken = [
        *(("the nameserver", address) for address in upstream),
        *(("the Teleport proxy", address) for address in proxies),
    ]
    for cluster in clusters:
        for zone in cluster.zones:
            reason = _objection_to_zone(zone)
            if reason is None and (zone in zones or len(zones) < MAX_ZONES):
                zones[zone] = None
            else:
                problems[_left_out(f"zone {zone!r}", cluster, reason)] = None
        for text in cluster.ranges:
            # VNet's own range was chosen by this machine's administrator.
            reason = None if text in ranges else objection(text, taken)
            plain = str(IPv4Network(text)) if reason is None else text
            if reason is None and plain not in ranges:
                used = in_the_way(IPv4Network(plain), is_routed=plain in network.ranges)
                if used and IPv4Network(network.ranges[0]).subnet_of(IPv4Network(plain)):
                    # Its apps have addresses in the part that VNet has.
                    continue
                if used:
                    problems[_used(plain, cluster, used)] = None
                    continue
            if reason is None and (plain in ranges or len(ranges) < MAX_RANGES):
                ranges[plain] = None
            else:
                problems[_left_out(f"range {text!r}", cluster, reason)] = None
    shown = list(problems)
    if len(shown) > MAX_PROBLEMS:
        rest = len(shown) - MAX_PROBLEMS
        shown[MAX_PROBLEMS:] = [f"{rest} more zones and ranges are left out: correct vnet_config."]
    return Accepted(zones=list(zones), ranges=list(ranges), problems=shown)


def _left_out(what: str, cluster: Cluster, reason: str | None) -> str:
    return (
        f"The {what} of cluster {cluster.name!r} is left out: {reason or 'there are too many'};"
        " correct vnet_config."
    )


def _used(text: str, cluster: Cluster, used: str) -> str:
    return (
        f"The range {text} of cluster {cluster.name!r} is used by something else ({used}), so its apps"
        " have addresses of VNet's own range: stop the other program, or correct vnet_config."
    )


def _objection_to_zone(text: str) -> str | None:
    return None if is_zone(text) else "it is no DNS name of two labels or more"


def is_zone(text: str) -> bool:
    """Whether this is a DNS name of at least two labels, lower-case, without trailing dot."""
    labels = text.split(".")
    return len(labels) >= 2 and len(text) <= 253 and all(map(_LABEL.fullmatch, labels))


def objection(text: str, taken: Sequence[tuple[str, bytes]]) -> str | None:
    """Why this range is not used, or None. `taken`: what must stay reachable, packed, and where."""
    try:
        if not is_usable_range(text):
            return "it is too small or of a special kind"
    except ValueError as error:
        return str(error)
    network = IPv4Network(text)
    if network.prefixlen < SHORTEST_PREFIX:
        return f"it is larger than a /{SHORTEST_PREFIX}"
    for what, packed in taken:
        address = ip_address(packed)
        if address.version == 4 and address in network:
            return f"it contains {what} {address}"
    return None

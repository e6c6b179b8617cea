"""What clusters want of this machine, checked before the system is touched with it. Pure.

A cluster is not trusted by the supervisor: its zones may become file names, its ranges become
routes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_address
from typing import Final

import msgspec

from ipc.messages import Cluster, Network
from supervisor.config import is_usable_range

# RFC 1035 section 2.3.1 with underscores, which the DNS itself allows (RFC 2181 section 11).
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# A range larger than this takes a good part of the Internet away.
SHORTEST_PREFIX: Final = 8
# Ranges of all clusters together: each is a route.
MAX_RANGES: Final = 64
# Zones of all clusters together; each is shown, and becomes a setting of the system's resolver.
MAX_ZONES: Final = 1000
# More than these are counted: whoever sends a thousand wrong ones is no cluster.
MAX_PROBLEMS: Final = 20


@dataclass(frozen=True, slots=True)
class Accepted:
    """What of the clusters' wishes is granted; `problems` says what is not, and why."""

    zones: list[str]
    ranges: list[str]
    problems: list[str]


def complete(clusters: Sequence[Cluster], known: Sequence[Cluster]) -> list[Cluster]:
    """The same clusters; of one that has not been asked yet, what `known` has of it.

    A proxy that was just started knows only the logins. Routes and zones must not vanish until its
    clusters have answered, least of all while they are down.
    """
    earlier = {(c.profile, c.name): c for c in known if c.is_configured}
    completed = []
    for cluster in clusters:
        before = earlier.get((cluster.profile, cluster.name))
        if before is not None and not cluster.is_configured:
            completed.append(
                msgspec.structs.replace(
                    cluster, zones=before.zones, ranges=before.ranges, is_configured=True
                )
            )
        else:
            completed.append(cluster)
    return completed


def accept(clusters: Sequence[Cluster], network: Network, upstream: Sequence[bytes]) -> Accepted:
    """Zones and ranges (VNet's own range first) to be used; `upstream` are packed addresses."""
    # Dicts, because the order counts and each is wanted once.
    zones: dict[str, None] = {}
    ranges = {network.ranges[0]: None}
    problems: dict[str, None] = {}
    for cluster in clusters:
        for zone in cluster.zones:
            reason = _objection_to_zone(zone)
            if reason is None and (zone in zones or len(zones) < MAX_ZONES):
                zones[zone] = None
            else:
                problems[_left_out(f"zone {zone!r}", cluster, reason)] = None
        for text in cluster.ranges:
            reason = objection(text, upstream)
            plain = str(IPv4Network(text)) if reason is None else text
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


def _objection_to_zone(text: str) -> str | None:
    return None if is_zone(text) else "it is no DNS name of two labels or more"


def is_zone(text: str) -> bool:
    """Whether this is a DNS name of at least two labels, lower-case, without trailing dot."""
    labels = text.split(".")
    return len(labels) >= 2 and len(text) <= 253 and all(map(_LABEL.fullmatch, labels))


def objection(text: str, upstream: Sequence[bytes]) -> str | None:
    """Why this range is not used, or None."""
    try:
        if not is_usable_range(text):
            return "it is too small or of a special kind"
    except ValueError as error:
        return str(error)
    network = IPv4Network(text)
    if network.prefixlen < SHORTEST_PREFIX:
        return f"it is larger than a /{SHORTEST_PREFIX}"
    for packed in upstream:
        address = ip_address(packed)
        if address.version == 4 and address in network:
            return f"it contains the nameserver {address}"
    return None

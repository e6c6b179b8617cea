"""Which range VNet takes its own addresses from: the configured one, or a free part of 100.64.0.0/10.

What was chosen for "auto" is kept in the state directory, so that addresses stay the same for as long as
nothing else wants them.
"""

import contextlib
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

from supervisor.config import DEFAULT_RANGE, NetworkConfig
from supervisor.exits import ConflictError
from supervisor.network import DNS_HOST
from supervisor.osconfig.route_conflicts import (
    HostRoutes,
    conflicts,
    describe,
    free_part,
    taken_of,
)

POOL: Final = IPv4Network(DEFAULT_RANGE)
# Smaller parts have too few addresses: every app has one, and every name below a cluster's may get one.
LONGEST_PREFIX: Final = 24
FILE_NAME: Final = "ipv4-range"


def choose(
    config: NetworkConfig,
    host: HostRoutes,
    kept: IPv4Network | None,
    user: int,
    nameservers: Iterable[IPv4Address] = (),
) -> IPv4Network:
    """VNet's own range.

    `kept` is what "auto" meant last time, `user` the id of who connects, `nameservers` must stay
    reachable.

    Raises:
        ConflictError: the configured range, or all of the pool, is used by something else, which is
            named.
    """
    interface = config.interface
    if config.ipv4_cidr_range != "auto":
        wanted = IPv4Network(config.ipv4_cidr_range)
        if found := conflicts(host, interface, wanted, user):
            raise ConflictError(
                f"the range {wanted} is used by something else: {describe(found)}; set"
                ' network.ipv4_cidr_range to a free range, or to "auto"'
            )
        return wanted
    # The system may still ask the DNS server of an earlier run.
    ours = {block[DNS_HOST] for block in (POOL, kept) if block is not None}
    taken = taken_of(host, interface, POOL, user, set(nameservers) - ours)
    if kept is not None and not any(map(kept.overlaps, taken)):
        return kept
    part = free_part(POOL, taken, longest=LONGEST_PREFIX)
    if part is None:
        found = conflicts(host, interface, POOL, user)
        reason = describe(found) or "addresses of this machine are in all of it"
        raise ConflictError(
            f"no part of {POOL} is free: {reason}; set network.ipv4_cidr_range to a free range"
        )
    return part


def read(state_dir: Path) -> IPv4Network | None:
    """What was kept, if it is a part of the pool that is large enough."""
    try:
        kept = IPv4Network((state_dir / FILE_NAME).read_text().strip())
    except (OSError, ValueError):
        return None
    return kept if kept.subnet_of(POOL) and kept.prefixlen <= LONGEST_PREFIX else None


def write(state_dir: Path, chosen: IPv4Network) -> None:
    """Keeps a choice; a state directory that cannot be written costs stable addresses only."""
    path = state_dir / FILE_NAME
    temporary = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        temporary.write_text(f"{chosen}\n")
        temporary.replace(path)

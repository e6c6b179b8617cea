"""What `security.allow_forwarded_from` may hold: the part that the configuration alone tells. Pure."""

from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final, TypeAlias

_Block: TypeAlias = IPv4Network | IPv6Network

MAX_NETWORKS: Final = 100
TUN_HOST: Final = 1  # as in `supervisor.network`, which needs the configuration
# RFC 6890, and IPv4 addresses in IPv6 ones (RFC 4291 section 2.5.5.2): nothing of this is forwarded.
_SPECIAL: Final = tuple(
    (ip_network(text), what)
    for text, what in (
        ("0.0.0.0/8", "no addresses of machines"),
        ("127.0.0.0/8", "loopback addresses"),
        ("169.254.0.0/16", "link-local addresses"),
        ("224.0.0.0/4", "multicast addresses"),
        ("240.0.0.0/4", "no addresses of machines"),
        ("::/127", "loopback addresses"),
        ("::ffff:0:0/96", "IPv4 addresses: list those as IPv4 networks"),
        ("fe80::/10", "link-local addresses"),
        ("ff00::/8", "multicast addresses"),
    )
)


def checks(
    listed: Sequence[str], own_range: str, pool: str
) -> Iterator[tuple[str, Any, Callable[[Any], bool], str]]:
    """Key, value, test and hint of each value, as `supervisor.config` wants them.

    `own_range` is VNet's, or "auto", which takes a part of `pool`.
    """
    yield (
        "security.allow_forwarded_from",
        len(listed),
        lambda number: number <= MAX_NETWORKS,
        f"must be at most {MAX_NETWORKS} networks",
    )
    # What is wrong with the range is told where it stands.
    try:
        own = None if own_range == "auto" else IPv4Network(own_range)
    except ValueError:
        own = None
    if own is not None and own.num_addresses <= TUN_HOST:
        own = None
    for index, text in enumerate(listed):
        yield (
            f"security.allow_forwarded_from[{index}]",
            text,
            lambda value: bool(_network(value, own, IPv4Network(pool))),
            "must be a network of containers or virtual machines, such as '172.30.0.0/24'",
        )


def _network(text: str, own: IPv4Network | None, pool: IPv4Network) -> _Block:
    """Raises ValueError: it is no network that packets may be forwarded from; why."""
    block = ip_network(text)
    if block.prefixlen == 0:
        raise ValueError("these are all addresses there are")
    for special, what in _SPECIAL:
        if block.version == special.version and block.overlaps(special):
            raise ValueError(f"in {special} are {what}")
    if block.version == 6:
        return block
    if own is None and block.supernet_of(pool):
        raise ValueError(f"it contains {pool}, from which VNet takes its own addresses")
    if own is not None and block.overlaps(own) and block != IPv4Network(own[TUN_HOST]):
        raise ValueError(
            f"in {own}, VNet's own range, {own[TUN_HOST]} alone may be listed: what is masqueraded"
        )
    return block

"""Where a question belongs: what the name alone tells, before anybody is asked. Pure.

    vnet-diag-<anything>.<any zone>            VNet's own DNS addresses
    name below in-addr.arpa or ip6.arpa        ours if the address lies in a virtual range
                                               (RFC 1035 section 3.5, RFC 3596 section 2.5)
    any other name a host could have           a proxy knows
    the rest                                   upstream

The reverse zones are cut at the label boundary inside the range: for 100.64.0.0/10 they are
64.100.in-addr.arpa to 127.100.in-addr.arpa, for an IPv6 /64 one zone of 16 nibbles.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final, TypeAlias

from ipc.addresses import ipv4_twin
from ipc.messages import Network
from ipc.networks import virtual_networks
from workers.dns.message import CLASS_IN, Query

DIAGNOSTIC_PREFIX: Final = b"vnet-diag-"
_OCTET: Final = re.compile(rb"0|[1-9][0-9]{0,2}")
_NIBBLE: Final = re.compile(rb"[0-9a-f]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """A name that only tests whether questions reach us."""


@dataclass(frozen=True, slots=True)
class HostName:
    """A name a proxy has to be asked about; `spelling` is the name as it was typed."""

    name: str
    spelling: str


@dataclass(frozen=True, slots=True)
class VirtualAddress:
    """The reverse name of a virtual address; `zone_labels` counts the labels of its zone."""

    ipv4: bytes
    zone_labels: int


@dataclass(frozen=True, slots=True)
class EmptyReverse:
    """A name between our reverse zone and the addresses: it exists and has no records."""

    zone_labels: int


@dataclass(frozen=True, slots=True)
class NoSuchReverse:
    """A name in our reverse zone that is no address, or one that is never given out."""

    zone_labels: int


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """For the upstream servers."""


Route: TypeAlias = Diagnostic | HostName | VirtualAddress | EmptyReverse | NoSuchReverse | Elsewhere


@dataclass(frozen=True, slots=True)
class _Place:
    """A reverse name inside one of our networks. `address` is set when it is complete."""

    zone_labels: int
    address: bytes | None
    is_numeric: bool


class _ReverseTree:
    """One of the two reverse trees, with our networks in it."""

    def __init__(
        self,
        top: bytes,
        digit: re.Pattern[bytes],
        base: int,
        bits_per_label: int,
        networks: Sequence[IPv4Network | IPv6Network],
    ) -> None:
        self._suffix = (top, b"arpa")
        self._digit = digit
        self._base = base
        self._bits_per_label = bits_per_label
        self._total_bits = networks[0].max_prefixlen if networks else 0
        self._networks = [
            (
                network.prefixlen,
                int(network.network_address) >> self._total_bits - network.prefixlen,
            )
            for network in networks
        ]

    def locate(self, labels: Sequence[bytes]) -> _Place | None:
        """Where the name lies; None when it is not in one of our networks."""
        if tuple(label.lower() for label in labels[-2:]) != self._suffix:
            return None
        value = bits = 0
        used = 2
        for label in reversed(labels[:-2]):
            digit = self._read(label)
            if digit is None or bits == self._total_bits:
                break
            value = value << self._bits_per_label | digit
            bits += self._bits_per_label
            used += 1
        for length, start in self._networks:
            if bits >= length and value >> bits - length == start:
                is_complete = used == len(labels) and bits == self._total_bits
                address = value.to_bytes(self._total_bits // 8) if is_complete else None
                zone_labels = 2 + -(-length // self._bits_per_label)
                return _Place(zone_labels, address, used == len(labels))
        return None

    def _read(self, label: bytes) -> int | None:
        if not self._digit.fullmatch(label):
            return None
        digit = int(label, self._base)
        return digit if digit < 1 << self._bits_per_label else None


class Zones:
    """The names that can be placed without asking, for one state of the network."""

    def __init__(self, network: Network) -> None:
        self._virtual = virtual_networks(network)
        self._trees = (
            _ReverseTree(b"in-addr", _OCTET, 10, 8, list(_ipv4_networks(network.ranges))),
            _ReverseTree(b"ip6", _NIBBLE, 16, 4, list(_ipv6_networks(network))),
        )

    def route(self, query: Query) -> Route:
        """Where the question belongs."""
        if query.qclass != CLASS_IN or not query.labels:
            return Elsewhere()
        if query.labels[0][: len(DIAGNOSTIC_PREFIX)].lower() == DIAGNOSTIC_PREFIX:
            return Diagnostic()
        for tree in self._trees:
            if (place := tree.locate(query.labels)) is not None:
                return self._route_in_reverse_zone(place)
        if query.labels[-1].lower() == b"arpa":
            return Elsewhere()
        spelling = query.spelling
        return Elsewhere() if spelling is None else HostName(spelling.lower(), spelling)

    def covers(self, address: bytes) -> bool:
        """Whether a packed address lies in a virtual range."""
        return address in self._virtual

    def _route_in_reverse_zone(self, place: _Place) -> Route:
        if place.address is None:
            kind = EmptyReverse if place.is_numeric else NoSuchReverse
            return kind(place.zone_labels)
        ipv4 = ipv4_twin(place.address)
        is_ours = self.covers(ipv4) and place.address[-8:-4] in (b"", b"\0\0\0\0")
        if not is_ours:
            return NoSuchReverse(place.zone_labels)
        return VirtualAddress(ipv4, place.zone_labels)


def _ipv4_networks(ranges: Iterable[str]) -> Iterable[IPv4Network]:
    for text in ranges:
        network = ip_network(text, strict=False)
        if isinstance(network, IPv4Network):
            yield network


def _ipv6_networks(network: Network) -> Iterable[IPv6Network]:
    if network.ipv6_prefix is not None:
        yield IPv6Network((network.ipv6_prefix[:8] + bytes(8), 64))

"""Which packets may cross between the two TUN devices. Pure.

    outer -> inner   source       the outer TUN's own address, or in a forwarded network
                     destination  a virtual range, or VNet's own addresses
    inner -> outer   the same pair the other way round, and no connection attempts

Where packets are rewritten there is one device, and the first rule holds for all that comes from it; networks are
not forwarded then.

A connection attempt must not slip past the SYN gate inside fragments (RFC 1858, RFC 3128). With an
MTU of 65535 no TCP segment is ever fragmented by an honest sender, so fragments that are TCP, or
could be after reassembly, are dropped; only those of UDP and ICMP pass. IPv4 reassembly matches on
the protocol and IPv6 takes the next header from the first fragment, so one kind cannot turn into
another.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Final

from ipc.messages import Network
from ipc.networks import Networks, virtual_networks
from ipc.probe_ports import probed_proxy
from workers.tun.packet import ICMP, ICMPV6, TCP, UDP, Malformed, Packet

# A SYN is kept in memory while it is held. Linux sends data in a SYN (RFC 7413) only to a server
# that gave it a cookie, and sends the SYN again without data when it stays unanswered.
MAX_SYN_BYTES: Final = 2048
_MAX_APPROVED_PAIRS: Final = 4096
_BROADCAST: Final = b"\xff\xff\xff\xff"


class Drop(StrEnum):
    """Why a packet does not cross."""

    MALFORMED = "malformed"  # counted a second time by its `Malformed` reason
    NOISE = "noise"  # multicast, broadcast, link-local: the kernel's own chatter on a new link
    FOREIGN_SOURCE = "foreign_source"
    FOREIGN_DESTINATION = "foreign_destination"
    SOURCE_ROUTED = "source_routed"
    FRAGMENTED_TCP = "fragmented_tcp"  # or could be TCP once reassembled
    OVERSIZED_SYN = "oversized_syn"
    INNER_SYN = "inner_syn"  # nothing in the inner namespace connects out
    NOT_REDIRECTED = "not_redirected"  # admitted, but nobody listens any more (rewriting only)
    UNSERVED = "unserved"  # what this host would not answer, or not now (rewriting only)


class Perimeter:
    """The addresses of one VNet and what may pass between them; `proxies` is their number."""

    def __init__(self, network: Network, proxies: int) -> None:
        self._dns_ipv4: Final = network.dns_ipv4
        self._proxies: Final = proxies
        own = (network.tun_ipv4, network.tun_ipv6)
        self._outer: Final = frozenset(a for a in own if a is not None)
        served = (network.dns_ipv4, network.dns_ipv6)
        self._ungated: Final = self._outer | {a for a in served if a is not None}
        self._ranges: Final = virtual_networks(network)
        self._forwarded: Final = Networks(network.forwarded_from)

    def check_from_outer(self, packet: Packet) -> Drop | None:
        """Why a packet read from the outer device does not pass, or None."""
        if _is_noise(packet):
            return Drop.NOISE
        if not self._is_program(packet.source):
            return Drop.FOREIGN_SOURCE
        if not self._is_virtual(packet.destination):
            return Drop.FOREIGN_DESTINATION
        return _check_shape(packet)

    def check_from_inner(self, packet: Packet) -> Drop | None:
        """Why a packet read from the inner device does not pass, or None."""
        if _is_noise(packet):
            return Drop.NOISE
        if not self._is_virtual(packet.source):
            return Drop.FOREIGN_SOURCE
        if not self._is_program(packet.destination):
            return Drop.FOREIGN_DESTINATION
        if packet.tcp is not None and packet.tcp.opens_connection:
            return Drop.INNER_SYN
        return _check_shape(packet)

    def is_gated(self, packet: Packet) -> bool:
        """Whether this packet, read from the outer device, must wait for a proxy's verdict.

        Of what goes to VNet's own addresses only the supervisor's probes of the proxies.
        """
        if packet.tcp is None or not packet.tcp.opens_connection:
            return False
        if packet.destination not in self._ungated:
            return True
        port = packet.tcp.destination_port
        return probed_proxy(self._dns_ipv4, self._proxies, packet.destination, port) is not None

    def is_uninvited(self, packet: Packet) -> bool:
        """Whether a packet with a foreign source is one that this VNet would have answered."""
        return self._is_virtual(packet.destination) and not self._is_virtual(packet.source)

    def _is_program(self, address: bytes) -> bool:
        """Whether connections may come from there."""
        return address in self._outer or (
            address in self._forwarded and not self._is_virtual(address)
        )

    def _is_virtual(self, address: bytes) -> bool:
        return address in self._ungated or address in self._ranges


class FastPath:
    """Recognises the ordinary packet: unfragmented TCP without SYN, UDP, between known addresses.

    Whatever it passes, the full check has passed for the same address pair, and would pass again;
    False only means "look closer". `buffer` is longer than the packet: at least 80 bytes.
    """

    def __init__(self) -> None:
        self._approved: Final[set[bytes]] = set()

    def approve(self, packet: Packet) -> None:
        """The full check let `packet` pass; the next one of this pair need not be parsed."""
        if len(self._approved) >= _MAX_APPROVED_PAIRS:
            self._approved.clear()
        self._approved.add(packet.source + packet.destination)

    def forget(self) -> None:
        """The perimeter has changed."""
        self._approved.clear()

    def recogniser(self) -> Callable[[bytearray, int], bool]:
        """A function (buffer, length of the packet in it) -> whether it may pass unparsed.

        A closure: it runs once per packet, and attribute look-ups are a third of its time.
        """
        approved = self._approved

        def is_ordinary(buffer: bytearray, length: int) -> bool:
            first = buffer[0]
            if first == 0x45:
                if buffer[9] == TCP:
                    return (
                        not buffer[33] & 0x02
                        and 40 <= length == buffer[2] << 8 | buffer[3]
                        and 20 <= buffer[32] >> 2 & 0x3C <= length - 20
                        and not (buffer[6] & 0x3F or buffer[7])
                        and bytes(buffer[12:20]) in approved
                    )
                return (
                    buffer[9] == UDP
                    and 28 <= length == buffer[2] << 8 | buffer[3]
                    and not (buffer[6] & 0x3F or buffer[7])
                    and bytes(buffer[12:20]) in approved
                )
            if first & 0xF0 == 0x60:
                if buffer[6] == TCP:
                    return (
                        not buffer[53] & 0x02
                        and 60 <= length == (buffer[4] << 8 | buffer[5]) + 40
                        and 20 <= buffer[52] >> 2 & 0x3C <= length - 40
                        and bytes(buffer[8:40]) in approved
                    )
                return (
                    buffer[6] == UDP
                    and 48 <= length == (buffer[4] << 8 | buffer[5]) + 40
                    and bytes(buffer[8:40]) in approved
                )
            return False

        return is_ordinary


def drop_reasons() -> list[str]:
    """Every counter name this module's decisions can lead to."""
    return [f"dropped_{r}" for r in Drop] + [f"malformed_{r}" for r in Malformed]


def is_oversized_syn(data: bytes) -> bool:
    """Whether a SYN of this size is not held."""
    return len(data) > MAX_SYN_BYTES


def _check_shape(packet: Packet) -> Drop | None:
    if packet.source_routed:
        return Drop.SOURCE_ROUTED
    if packet.fragment and packet.protocol not in {UDP, ICMP if packet.version == 4 else ICMPV6}:
        return Drop.FRAGMENTED_TCP
    return None


def _is_noise(packet: Packet) -> bool:
    source, destination = packet.source, packet.destination
    if packet.version == 4:
        return (
            destination[0] & 0xF0 == 0xE0
            or destination == _BROADCAST
            or source[:2] == b"\xa9\xfe"  # RFC 3927
            or not any(source)
        )
    return destination[0] == 0xFF or _is_link_local(source, destination) or not any(source)


def _is_link_local(*addresses: bytes) -> bool:
    """RFC 4291 section 2.5.6: fe80::/10."""
    return any(a[0] == 0xFE and a[1] & 0xC0 == 0x80 for a in addresses)

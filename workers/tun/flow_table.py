"""How the ordinary packet is rewritten, worked out once for each direction of a connection. Pure.

    key     addresses and ports as they are read (12 bytes, or 36 of IPv6)
    value   the same bytes as they are written, and the correction of the checksum

A cache and no state: everything follows from `redirects`, so whatever is missing is worked out again, and
nothing is lost with it. That is why an entry needs no time at which it expires: it is right until the
redirects change, and the oldest makes room for a new one.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

from workers.tun.packet import TCP, UDP, Packet
from workers.tun.rewrite import correction

# Two for each connection; one takes about 300 bytes.
MAX_FLOWS: Final = 16384

_Rewriting: TypeAlias = tuple[bytes, int]


class FlowTable:
    """At most `limit` directions of connections."""

    def __init__(self, limit: int = MAX_FLOWS) -> None:
        self._limit: Final = limit
        self._tcp: Final[dict[bytes, _Rewriting]] = {}
        self._udp: Final[dict[bytes, _Rewriting]] = {}

    def __len__(self) -> int:
        return len(self._tcp) + len(self._udp)

    def learn(self, packet: Packet, ports: tuple[int, int], new_ports: tuple[int, int]) -> None:
        """The next packet like this TCP or UDP packet need not be looked at closely.

        Source port first; one of the two stays as it was.
        """
        table = self._tcp if packet.protocol == TCP else self._udp
        while len(self) >= self._limit:
            largest = max(self._tcp, self._udp, key=len)
            del largest[next(iter(largest))]
        key = packet.source + packet.destination + _packed(ports)
        changed = 0 if ports[0] != new_ports[0] else 1
        table[key] = (
            packet.destination + packet.source + _packed(new_ports),
            correction(ports[changed], new_ports[changed]),
        )

    def forget(self) -> None:
        """Perimeter or redirects have changed."""
        self._tcp.clear()
        self._udp.clear()

    def rewriter(self) -> Callable[[bytearray, int], bool]:
        """A function (buffer, length of the packet in it) -> whether it has rewritten the packet.

        It does so in place with unfragmented TCP without SYN and UDP of a direction that was learnt;
        with False the packet is as it was. `buffer` is longer than the packet: at least 80 bytes. A
        closure, because it runs once per packet.
        """
        tcp, udp = self._tcp, self._udp

        def rewrite(buffer: bytearray, length: int) -> bool:
            first = buffer[0]
            if first == 0x45:
                if length != buffer[2] << 8 | buffer[3] or buffer[6] & 0x3F or buffer[7]:
                    return False
                if buffer[9] == TCP:
                    if (
                        length < 40
                        or buffer[33] & 0x02
                        or not 20 <= buffer[32] >> 2 & 0x3C <= length - 20
                    ):
                        return False
                    found = tcp.get(bytes(buffer[12:24]))
                    place = 36
                elif buffer[9] == UDP and length >= 28:
                    found = udp.get(bytes(buffer[12:24]))
                    place = 26
                else:
                    return False
                if found is None:
                    return False
                buffer[12:24] = found[0]
            elif first & 0xF0 == 0x60:
                if length != (buffer[4] << 8 | buffer[5]) + 40:
                    return False
                if buffer[6] == TCP:
                    if (
                        length < 60
                        or buffer[53] & 0x02
                        or not 20 <= buffer[52] >> 2 & 0x3C <= length - 40
                    ):
                        return False
                    found = tcp.get(bytes(buffer[8:44]))
                    place = 56
                elif buffer[6] == UDP and length >= 48:
                    found = udp.get(bytes(buffer[8:44]))
                    place = 46
                else:
                    return False
                if found is None:
                    return False
                buffer[8:44] = found[0]
            else:
                return False
            high, low = buffer[place], buffer[place + 1]
            # RFC 1624, eqn. 3, as in `rewrite.corrected`: a call would cost a third of the time.
            total = ((high << 8 | low) ^ 0xFFFF) + found[1]
            total = (total & 0xFFFF) + (total >> 16) ^ 0xFFFF
            if place in (26, 46):
                if not (high or low):
                    return True  # UDP without a checksum
                total = total or 0xFFFF
            buffer[place] = total >> 8
            buffer[place + 1] = total & 0xFF
            return True

        return rewrite


def _packed(ports: tuple[int, int]) -> bytes:
    return ports[0].to_bytes(2) + ports[1].to_bytes(2)

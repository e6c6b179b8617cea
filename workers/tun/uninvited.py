"""Answers what comes from elsewhere than programs may connect from, so that nobody waits for a time-out.

Such a packet was forwarded by this host for a network that is not listed, or sent by a program that has chosen
another address of this host's. It is refused as a host without the service would: TCP with a reset, UDP with an
ICMP error.
"""

from collections.abc import Callable
from typing import Final

from workers.tun import icmp
from workers.tun.packet import UDP, Packet
from workers.tun.reset import build_reset


class Uninvited:
    """See the module. `clock` is monotonic; counts in `counters` as `turned_away`."""

    def __init__(self, counters: dict[str, int], clock: Callable[[], float]) -> None:
        self._counters: Final = counters
        self._clock: Final = clock
        self._errors: Final = icmp.ErrorAllowance()
        counters["turned_away"] = 0

    def answer(self, data: bytes, packet: Packet) -> bytes | None:
        """What goes back, if anything; `packet` is the view of `data`."""
        if packet.fragment or packet.source_routed:
            return None
        answer = None
        if packet.protocol == UDP:
            if self._errors.take(self._clock()):
                answer = icmp.build_port_unreachable(data, packet)
        else:
            answer = build_reset(packet)
        if answer is not None:
            self._counters["turned_away"] += 1
        return answer

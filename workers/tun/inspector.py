"""The full check of each packet that the fast path does not recognise, for a pair of devices.

What passes does so unchanged; a connection attempt goes to the doorkeeper.
"""

from collections.abc import Callable
from typing import Final

from ipc.messages import Network
from workers.tun.doorkeeper import Doorkeeper
from workers.tun.packet import Malformed, Packet, parse_packet
from workers.tun.policy import Drop, FastPath, Perimeter, drop_reasons, is_oversized_syn
from workers.tun.uninvited import Uninvited


class Inspector:
    """See the module. `doorkeeper` is set before the first packet comes. `clock` is monotonic."""

    def __init__(
        self,
        network: Network,
        proxies: int,
        counters: dict[str, int],
        clock: Callable[[], float],
        write_outer: Callable[[bytes], None],
    ) -> None:
        self._counters: Final = counters
        self._write_outer: Final = write_outer
        self._uninvited: Final = Uninvited(counters, clock)
        self._proxies: Final = proxies
        self._perimeter = Perimeter(network, proxies)
        self.doorkeeper: Doorkeeper
        self.outer_path: Final = FastPath()
        self.inner_path: Final = FastPath()
        counters.update(dict.fromkeys(drop_reasons(), 0))

    def replace_network(self, network: Network) -> None:
        """Ranges were added or removed."""
        self._perimeter = Perimeter(network, self._proxies)
        self.outer_path.forget()
        self.inner_path.forget()

    def inspect_from_outer(self, data: bytes) -> bytes | None:
        """What goes to the inner device now; a SYN goes to the doorkeeper."""
        packet = parsed(data, self._counters)
        if packet is None:
            return None
        drop = self._perimeter.check_from_outer(packet)
        if drop is None and self._perimeter.is_gated(packet):
            if not is_oversized_syn(data):
                self.doorkeeper.receive_syn(data, packet)
                return None
            drop = Drop.OVERSIZED_SYN
        if drop is not None:
            self._counters[f"dropped_{drop}"] += 1
            if drop is Drop.FOREIGN_SOURCE and self._perimeter.is_uninvited(packet):
                answer = self._uninvited.answer(data, packet)
                if answer is not None:
                    self._write_outer(answer)
            return None
        self.outer_path.approve(packet)
        return data

    def inspect_from_inner(self, data: bytes) -> bytes | None:
        """What goes to the outer device."""
        packet = parsed(data, self._counters)
        if packet is None:
            return None
        drop = self._perimeter.check_from_inner(packet)
        if drop is not None:
            self._counters[f"dropped_{drop}"] += 1
            return None
        self.inner_path.approve(packet)
        return data


def parsed(data: bytes, counters: dict[str, int]) -> Packet | None:
    """The view of a packet, or None for one that is malformed, which is counted."""
    packet = parse_packet(data)
    if isinstance(packet, Malformed):
        counters[f"malformed_{packet}"] += 1
        counters[f"dropped_{Drop.MALFORMED}"] += 1
        return None
    return packet

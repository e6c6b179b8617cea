"""What becomes of each packet that the flow table does not know, where packets are rewritten.

    own -> virtual   a connection attempt                   to the doorkeeper, or (DNS) on at once
                     from a port of ours to v               back: to the program, from v:vp
                     to (v, vp) that is redirected          on: to the port of ours, from v
                     other TCP                              RST
                     other UDP                              port unreachable
                     echo request                           echo reply
                     anything else                          dropped

So a program sees what it would see of a host that has all virtual addresses. Everything is written back to
the device it came from.
"""

import logging
from collections.abc import Callable
from typing import Final

from ipc.messages import Network, Redirect
from workers.tun import icmp
from workers.tun.doorkeeper import Doorkeeper
from workers.tun.flow_table import FlowTable
from workers.tun.framing import Buffer
from workers.tun.inspector import parsed
from workers.tun.packet import TCP, UDP, Packet, parse_packet
from workers.tun.policy import Drop, Perimeter, drop_reasons, is_oversized_syn
from workers.tun.redirects import MAX_REDIRECTS, Redirects
from workers.tun.reset import build_reset
from workers.tun.rewrite import (
    DESTINATION_PORT,
    SOURCE_PORT,
    is_later_fragment,
    ports_of,
    turned,
    turned_to_port,
)
from workers.tun.uninvited import Uninvited

log = logging.getLogger(__name__)


class RewritingInspector:
    """See the module. `doorkeeper` is set before the first packet comes. `clock` is monotonic."""

    def __init__(
        self, network: Network, proxies: int, counters: dict[str, int], clock: Callable[[], float]
    ) -> None:
        self._counters: Final = counters
        self._proxies: Final = proxies
        self._clock: Final = clock
        self.doorkeeper: Doorkeeper
        self.flows: Final = FlowTable()
        self._redirects: Final = Redirects()
        self._errors: Final = icmp.ErrorAllowance()
        self._uninvited: Final = Uninvited(counters, clock)
        self._use_network(network)
        names = ["resets", "echo_replies", "unreachables", *drop_reasons()]
        counters.update(dict.fromkeys(names, 0))

    def replace_network(self, network: Network) -> None:
        """Ranges were added or removed."""
        self._use_network(network)
        self.flows.forget()

    def _use_network(self, network: Network) -> None:
        self._perimeter = Perimeter(network, self._proxies)
        self._dns = {network.dns_ipv4, network.dns_ipv6}

    def change_redirects(self, redirects: list[Redirect]) -> None:
        """Some have come, changed or gone."""
        if left_out := self._redirects.change(redirects):
            log.error("no room for %d redirected ports: %d are the limit", left_out, MAX_REDIRECTS)
        self.flows.forget()

    def inspect(self, data: bytes) -> Buffer | None:
        """What is written back now, if anything."""
        packet = parsed(data, self._counters)
        if packet is None:
            return None
        result = self._decide(data, packet)
        if result is Drop.FOREIGN_SOURCE and self._perimeter.is_uninvited(packet):
            self._counted(result)
            return self._uninvited.answer(data, packet)
        return self._counted(result)

    def admitted(self, data: bytes) -> Buffer | None:
        """A connection attempt that may pass, as it is to be written.

        Without a redirect it is dropped. The supervisor has told of it before the proxy could answer, so
        that can only be of a listener that was closed since; the program sends its SYN again.
        """
        packet = parse_packet(data)
        found = self._redirected(data, packet) if isinstance(packet, Packet) else None
        return self._counted(Drop.NOT_REDIRECTED if found is None else found)

    def _counted(self, result: Buffer | Drop | None) -> Buffer | None:
        if isinstance(result, Drop):
            self._counters[f"dropped_{result}"] += 1
            return None
        return result

    def _decide(self, data: bytes, packet: Packet) -> Buffer | Drop | None:
        if (drop := self._perimeter.check_from_outer(packet)) is not None:
            return drop
        if packet.destination == packet.source:
            return Drop.FOREIGN_DESTINATION  # the kernel delivers that itself
        if self._perimeter.is_gated(packet):
            if is_oversized_syn(data):
                return Drop.OVERSIZED_SYN
            self.doorkeeper.receive_syn(data, packet)
            return None
        if packet.protocol == TCP:
            return self._redirected(data, packet) or self._reset(packet)
        if packet.protocol == UDP:
            return self._decide_udp(data, packet)
        return self._answer_echo(data, packet)

    def _redirected(self, data: bytes, packet: Packet) -> Buffer | None:
        """The packet for whom it is meant, one way or the other."""
        ports = ports_of(data, packet)
        if ports is None:
            return None
        source_port, destination_port = ports
        protocol, virtual = packet.protocol, packet.destination
        port = self._redirects.port(protocol, virtual, source_port)
        is_attempt = packet.tcp is not None and packet.tcp.opens_connection
        # Nothing of ours begins a connection.
        if port is not None and not is_attempt:
            new_ports, which = (port, destination_port), SOURCE_PORT
        else:
            port = self._redirects.local_port(protocol, virtual, destination_port)
            new_ports, which = (source_port, port or 0), DESTINATION_PORT
        if port is None:
            return None
        # From a port of ours an attempt goes another way than what follows it would.
        if not packet.fragment and not is_attempt:
            self.flows.learn(packet, ports, new_ports)
        return turned_to_port(data, packet, which, port)

    def _reset(self, packet: Packet) -> Buffer | None:
        reset = build_reset(packet)
        if reset is not None:
            self._counters["resets"] += 1
        return reset

    def _decide_udp(self, data: bytes, packet: Packet) -> Buffer | Drop:
        if is_later_fragment(data, packet):
            # To or from the DNS server: the addresses change places in either case.
            return turned(data, packet) if packet.destination in self._dns else Drop.UNSERVED
        found = self._redirected(data, packet)
        if found is not None:
            return found
        if not self._errors.take(self._clock()):
            return Drop.UNSERVED
        self._counters["unreachables"] += 1
        return icmp.build_port_unreachable(data, packet)

    def _answer_echo(self, data: bytes, packet: Packet) -> Buffer | Drop:
        reply = icmp.build_echo_reply(data, packet) if icmp.is_icmp(packet) else None
        if reply is None:
            return Drop.UNSERVED
        self._counters["echo_replies"] += 1
        return reply

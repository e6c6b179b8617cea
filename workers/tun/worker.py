"""The TUN worker: puts pump, policy, SYN gate and bus together.

It borrows both TUN descriptors from the supervisor and keeps no state that matters: when it dies,
established connections wait in the devices' queues for its successor, and programs send their SYN
again. So it is when it drains: it reads no more and ends at once.
"""

import asyncio
import logging
import secrets
from typing import Final

from ipc.bus import Sender
from ipc.messages import AnyMessage, ConfigureTun, Network, NetworkChanged
from workers.runtime import Runtime
from workers.tun.doorkeeper import Doorkeeper
from workers.tun.last_packets import move_last_packets, noticing_death
from workers.tun.packet import Malformed, Packet, parse_packet
from workers.tun.policy import Drop, FastPath, Perimeter, drop_reasons, is_oversized_syn
from workers.tun.pump import Device, Direction
from workers.tun.syn_gate import SynGate

log = logging.getLogger(__name__)

# Linux repeats an unanswered SYN 1, 3 and 7 s after the first: if the inner kernel loses an
# admitted one (a full backlog), these still pass without a second dial.
_REMEMBERED_SECONDS: Final = 8.0
_MAX_REMEMBERED: Final = 4096


class Inspector:
    """The full check of each packet the fast path does not recognise, with its counters."""

    def __init__(self, network: Network, proxies: int, counters: dict[str, int]) -> None:
        self._counters: Final = counters
        self._proxies: Final = proxies
        self._perimeter = Perimeter(network, proxies)
        self.doorkeeper: Doorkeeper | None = None
        self.outer_path: Final = FastPath()
        self.inner_path: Final = FastPath()
        counters.update(dict.fromkeys(drop_reasons(), 0))

    def replace_network(self, network: Network) -> None:
        """Ranges were added or removed."""
        self._perimeter = Perimeter(network, self._proxies)
        self.outer_path.forget()
        self.inner_path.forget()

    def inspect_from_outer(self, data: bytes) -> bool:
        """Whether this packet goes to the inner device now; a SYN goes to the doorkeeper."""
        packet = self._parse(data)
        if packet is None:
            return False
        drop = self._perimeter.check_from_outer(packet)
        if drop is not None:
            return self._drop(drop)
        if self._perimeter.is_gated(packet):
            if is_oversized_syn(data):
                return self._drop(Drop.OVERSIZED_SYN)
            assert self.doorkeeper is not None, "set before the pump starts"
            self.doorkeeper.receive_syn(data, packet)
            return False
        self.outer_path.approve(packet)
        return True

    def inspect_from_inner(self, data: bytes) -> bool:
        """Whether this packet goes to the outer device."""
        packet = self._parse(data)
        if packet is None:
            return False
        drop = self._perimeter.check_from_inner(packet)
        if drop is not None:
            return self._drop(drop)
        self.inner_path.approve(packet)
        return True

    def _parse(self, data: bytes) -> Packet | None:
        packet = parse_packet(data)
        if isinstance(packet, Malformed):
            self._counters[f"malformed_{packet}"] += 1
            self._drop(Drop.MALFORMED)
            return None
        return packet

    def _drop(self, reason: Drop) -> bool:
        self._counters[f"dropped_{reason}"] += 1
        return False


async def main(runtime: Runtime[ConfigureTun]) -> None:
    """Runs until the supervisor says stop or drain. Descriptors: [outer device, inner device]."""
    loop = asyncio.get_running_loop()
    config, counters = runtime.config, runtime.counters
    outer = Device("outer", runtime.descriptors[0], counters)
    inner = Device("inner", runtime.descriptors[1], counters)
    inspector = Inspector(config.network, config.common.proxies, counters)

    # The bus needs the doorkeeper's ear and the doorkeeper the bus's mouth; nothing is received
    # before this coroutine waits for the first time.
    def on_bus_message(sender: Sender, message: AnyMessage) -> None:
        doorkeeper.receive_message(sender, message)

    bus = runtime.serve_bus(on_bus_message)
    doorkeeper = Doorkeeper(
        gate=_build_gate(config),
        proxies=config.common.proxies,
        dns_ipv4=config.network.dns_ipv4,
        send=bus.send,
        write_inner=inner.write,
        write_outer=outer.write,
        counters=counters,
        loop=loop,
    )
    inspector.doorkeeper = doorkeeper

    def on_message(message: AnyMessage, _descriptors: list[int]) -> None:
        if isinstance(message, NetworkChanged):
            inspector.replace_network(message.network)
            log.info("virtual ranges: %s", ", ".join(message.network.ranges))

    runtime.on_message = on_message
    directions = (
        Direction(outer, inner, inspector.outer_path.recogniser(), inspector.inspect_from_outer),
        Direction(inner, outer, inspector.inner_path.recogniser(), inspector.inspect_from_inner),
    )

    async def work() -> None:
        await runtime.taken_over()
        for direction in directions:
            direction.start(loop)
        runtime.ready()
        await runtime.draining.wait()

    try:
        with noticing_death(loop, runtime.lost_supervisor):
            await runtime.until_stopped(work())
            if runtime.is_orphaned:
                await move_last_packets()
    finally:
        for direction in directions:
            direction.stop()
        doorkeeper.stop()
    if runtime.draining.is_set():
        bus.close()
        runtime.handed_over()


def _build_gate(config: ConfigureTun) -> SynGate:
    return SynGate(
        max_pending=config.max_pending,
        pending_seconds=config.pending_seconds,
        max_remembered=_MAX_REMEMBERED,
        remembered_seconds=_REMEMBERED_SECONDS,
        # A verdict meant for a predecessor must not name a flow of ours: ids start anywhere below
        # 2**62 and have as many again before they run out.
        first_flow_id=secrets.randbits(62),
    )

"""The TUN worker: puts pump, policy, SYN gate and bus together.

It borrows the TUN descriptors from the supervisor and keeps no state that matters: when it dies,
established connections wait in the devices' queues for its successor, and programs send their SYN
again. So it is when it drains: it reads no more and ends at once.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ipc.bus import Sender
from ipc.messages import (
    AnyMessage,
    ConfigureTun,
    DataPlaneKind,
    NetworkChanged,
    RedirectsChanged,
)
from workers.runtime import Runtime
from workers.tun.doorkeeper import Doorkeeper
from workers.tun.inspector import Inspector
from workers.tun.last_packets import move_last_packets, noticing_death
from workers.tun.pump import Device, Direction
from workers.tun.rewriting_inspector import RewritingInspector
from workers.tun.syn_gate import SynGate

log = logging.getLogger(__name__)

# Linux repeats an unanswered SYN 1, 3 and 7 s after the first: if the inner kernel loses an
# admitted one (a full backlog), these still pass without a second dial.
_REMEMBERED_SECONDS: Final = 8.0
_MAX_REMEMBERED: Final = 4096


@dataclass(frozen=True, slots=True)
class _Plane:
    """The devices, and what becomes of the packets on them."""

    inspector: Inspector | RewritingInspector
    directions: tuple[Direction, ...]
    let_in: Callable[[bytes], None]  # a connection attempt that a proxy has admitted
    write_outer: Callable[[bytes], None]


def _join(
    config: ConfigureTun,
    descriptors: list[int],
    counters: dict[str, int],
    clock: Callable[[], float],
) -> _Plane:
    """Packets cross between two devices unchanged."""
    outer = Device("outer", descriptors[0], counters)
    inner = Device("inner", descriptors[1], counters)
    inspector = Inspector(config.network, config.common.proxies, counters, clock, outer.write)
    directions = (
        Direction(outer, inner, inspector.outer_path.recogniser(), inspector.inspect_from_outer),
        Direction(inner, outer, inspector.inner_path.recogniser(), inspector.inspect_from_inner),
    )
    return _Plane(inspector, directions, inner.write, outer.write)


def _turn(
    config: ConfigureTun,
    descriptors: list[int],
    counters: dict[str, int],
    clock: Callable[[], float],
) -> _Plane:
    """Packets go back, rewritten, to the device they came from."""
    has_header = config.has_family_header
    outer = Device("outer", descriptors[0], counters, has_family_header=has_header)
    inspector = RewritingInspector(config.network, config.common.proxies, counters, clock)
    direction = Direction(outer, outer, inspector.flows.rewriter(), inspector.inspect)

    def let_in(syn: bytes) -> None:
        if (packet := inspector.admitted(syn)) is not None:
            outer.write(packet)

    return _Plane(inspector, (direction,), let_in, outer.write)


async def main(runtime: Runtime[ConfigureTun]) -> None:
    """Runs until the supervisor says stop or drain. Descriptors: see ConfigureTun."""
    loop = asyncio.get_running_loop()
    config, counters = runtime.config, runtime.counters
    plane = (
        _turn(config, runtime.descriptors, counters, loop.time)
        if config.data_plane is DataPlaneKind.REWRITING
        else _join(config, runtime.descriptors, counters, loop.time)
    )
    inspector = plane.inspector

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
        write_inner=plane.let_in,
        write_outer=plane.write_outer,
        counters=counters,
        loop=loop,
    )
    inspector.doorkeeper = doorkeeper
    knows_redirects = asyncio.Event()

    def on_message(message: AnyMessage, _descriptors: list[int]) -> None:
        if isinstance(message, NetworkChanged):
            inspector.replace_network(message.network)
            log.info("virtual ranges: %s", ", ".join(message.network.ranges))
        elif isinstance(message, RedirectsChanged) and isinstance(inspector, RewritingInspector):
            inspector.change_redirects(message.redirects)
            if message.is_complete:
                knows_redirects.set()

    runtime.on_message = on_message

    async def work() -> None:
        if isinstance(inspector, RewritingInspector):
            # Without them it would reset connections that its predecessor has left.
            await knows_redirects.wait()
        await runtime.taken_over()
        for direction in plane.directions:
            direction.start(loop)
        runtime.ready()
        await runtime.draining.wait()

    try:
        with noticing_death(loop, runtime.lost_supervisor):
            await runtime.until_stopped(work())
            if runtime.is_orphaned:
                await move_last_packets(doorkeeper.have_proxies_gone)
    finally:
        for direction in plane.directions:
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

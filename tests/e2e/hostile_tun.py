"""A tun worker that attacks when a packet with TRIGGER in it comes from the outer device."""

import random
from collections.abc import Callable

import hostile_trigger

from ipc import codec
from ipc import messages as m
from ipc.bus import BusServer, Sender
from ipc.messages import AnyMessage, ConfigureTun
from workers.runtime import Runtime
from workers.tun import worker as real
from workers.tun.inspector import Inspector


class Attacker:
    """The bus socket of tun, and the proxies that have joined it; used in the loop's thread."""

    def __init__(self) -> None:
        self.bus: BusServer
        self.peers: dict[str, Sender] = {}

    def say(self, *datagrams: bytes) -> None:
        for sender in self.peers.values():
            for datagram in datagrams:
                self.bus._driven.socket.send_multipart([sender.route, datagram])


def dial(flow_id: int, chance: random.Random) -> bytes:
    request = m.DialRequest(
        flow_id=flow_id,
        source=b"\x64\x40\0\1",
        source_port=chance.randrange(65536),
        destination=b"\x64" + bytes([chance.randrange(64, 128)]) + chance.randbytes(2),
        destination_port=chance.randrange(65536),
    )
    return codec.encode(request)


def dial_requests(attacker: Attacker) -> None:
    """Connections that nobody has begun."""
    chance = random.Random(1)
    attacker.say(*(dial(2**61 + number, chance) for number in range(3000)))


def flow_ids_again(attacker: Attacker) -> None:
    """One id for many connections, and each given up at once."""
    chance = random.Random(1)
    given_up = codec.encode(m.DialAbandoned(flow_id=7))
    for _ in range(500):
        attacker.say(dial(7, chance), dial(7, chance), given_up, given_up)


def own_words_of_proxies(attacker: Attacker) -> None:
    attacker.say(codec.encode(m.ProxyHello()))


def words_of_dns(attacker: Attacker) -> None:
    attacker.say(codec.encode(m.ResolveName(request_id=1, name="echo.teleport.e2e.test")))


def random_bytes(attacker: Attacker) -> None:
    attacker.say(*(random.Random(number).randbytes(number) for number in range(300)))


def many_parts(attacker: Attacker) -> None:
    for sender in attacker.peers.values():
        attacker.bus._driven.socket.send_multipart([sender.route, *[b"part"] * 20_000])


ATTACKS: dict[str, Callable[[Attacker], None]] = {
    attack.__name__: attack
    for attack in (
        dial_requests,
        flow_ids_again,
        own_words_of_proxies,
        words_of_dns,
        random_bytes,
        many_parts,
    )
}


async def main(runtime: Runtime[ConfigureTun]) -> None:
    attacker = Attacker()
    serve, inspect = runtime.serve_bus, Inspector.inspect_from_outer

    def serve_bus(on_message: Callable[[Sender, AnyMessage], None]) -> BusServer:
        def hear(sender: Sender, message: AnyMessage) -> None:
            attacker.peers[sender.slot] = sender
            on_message(sender, message)

        attacker.bus = serve(hear)
        return attacker.bus

    def inspect_from_outer(self: Inspector, data: bytes) -> bytes | None:
        where = bytes(data).find(hostile_trigger.TRIGGER)
        if where < 0:
            return inspect(self, data)
        name = hostile_trigger.name_in(bytes(data[where:]))
        if name:
            hostile_trigger.run(name, ATTACKS[name], attacker)
        return None

    runtime.serve_bus = serve_bus  # type: ignore[method-assign]
    Inspector.inspect_from_outer = inspect_from_outer  # type: ignore[method-assign]
    await real.main(runtime)

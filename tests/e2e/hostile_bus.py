"""What a compromised worker does to its peers on the bus, with sockets of its own.

Each attack gets an `Attacker` and ends within seconds. It runs in a thread of the worker, which is
confined.
"""

import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq

from ipc import codec
from ipc import messages as m
from ipc.curve import make_key_pair

QUESTION = codec.encode(m.ResolveName(request_id=1, name="echo.teleport.e2e.test"))
FOREIGN = codec.encode(m.ResolveName(request_id=2, name="nobody.upstream.test"))
# How long connections are held and floods last.
SECONDS = 2.0


class Attacker:
    """A worker's keys, and the paths of those it attacks."""

    def __init__(self, common: m.Common, targets: list[str]) -> None:
        self.keys = common.keys
        self.bus_dir = Path(common.bus_dir)
        self.targets = targets

    @contextlib.contextmanager
    def dealers(
        self, keys: tuple[str, str] | None = None, routing_id: bytes = b""
    ) -> Iterator[list["zmq.Socket[bytes]"]]:
        """One connection to each target."""
        public, secret = keys or (self.keys.public, self.keys.secret)
        context = zmq.Context()
        made = []
        try:
            for target in self.targets:
                end = context.socket(zmq.DEALER)
                end.linger = 500
                end.sndtimeo = 1000
                if routing_id:
                    end.setsockopt(zmq.ROUTING_ID, routing_id)
                end.curve_publickey, end.curve_secretkey = public.encode(), secret.encode()
                end.curve_serverkey = self.keys.peers.get(target, public).encode()
                end.connect(f"ipc://{self.bus_dir / target}")
                made.append(end)
            yield made
        finally:
            context.destroy()

    def say(self, *datagrams: bytes, routing_id: bytes = b"") -> None:
        """Each to everybody, in order."""
        with self.dealers(routing_id=routing_id) as ends, contextlib.suppress(zmq.Again):
            for datagram in datagrams:
                for end in ends:
                    end.send(datagram)

    def connect(self) -> Iterator[socket.socket]:
        """Plain connections to the targets' sockets, one after the other, as many as there may be."""
        with contextlib.suppress(OSError):
            while True:
                for target in self.targets:
                    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    end.settimeout(1)
                    end.connect(str(self.bus_dir / target))
                    yield end


def random_bytes(attacker: Attacker) -> None:
    chance = random.Random(1)
    attacker.say(*(chance.randbytes(chance.randrange(2000)) for _ in range(500)))


def huge(attacker: Attacker) -> None:
    attacker.say(bytes(codec.MAX_MESSAGE_BYTES + 1))
    attacker.say(bytes(64 << 20))


def many_parts(attacker: Attacker) -> None:
    with attacker.dealers() as ends, contextlib.suppress(zmq.Again):
        for end in ends:
            end.send_multipart([QUESTION] * 20_000)


def replay(attacker: Attacker) -> None:
    """The same valid questions, with the same numbers, as fast as they go."""
    with attacker.dealers() as ends:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            for end in ends:
                with contextlib.suppress(zmq.Again):
                    end.send(QUESTION, zmq.NOBLOCK)
                    end.send(FOREIGN, zmq.NOBLOCK)
                while end.poll(0):
                    end.recv_multipart()


def deaf(attacker: Attacker) -> None:
    """Asks as fast as it goes and reads no answer."""
    with attacker.dealers() as ends:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            for end in ends:
                with contextlib.suppress(zmq.Again):
                    end.send(QUESTION, zmq.NOBLOCK)


def answers_nobody_asked(attacker: Attacker) -> None:
    resolved = m.NameResolved(
        request_id=1, outcome=m.NameOutcome.ADDRESS, ipv4=b"\x64\x40\1\1", valid_seconds=3600
    )
    attacker.say(codec.encode(resolved))


def a_verdict(attacker: Attacker) -> None:
    attacker.say(codec.encode(m.DialVerdict(flow_id=1)))


def another_slot(attacker: Attacker) -> None:
    """Says to be tun, and what tun says."""
    request = m.DialRequest(
        flow_id=1,
        source=b"\x64\x40\0\1",
        source_port=1,
        destination=b"\x64\x40\1\1",
        destination_port=1,
    )
    attacker.say(codec.encode(request), routing_id=b"tun")


def unknown_key(attacker: Attacker) -> None:
    with attacker.dealers(keys=make_key_pair()) as ends:
        for end in ends:
            end.send(QUESTION)
        time.sleep(SECONDS)


def _mechanism(set_up: Callable[["zmq.Socket[bytes]"], None]) -> Callable[[Attacker], None]:
    def attack(attacker: Attacker) -> None:
        context = zmq.Context()
        try:
            for target in attacker.targets:
                end = context.socket(zmq.DEALER)
                end.linger = 0
                set_up(end)
                end.connect(f"ipc://{attacker.bus_dir / target}")
                end.send(QUESTION)
            time.sleep(SECONDS)
        finally:
            context.destroy(linger=0)

    return attack


def _plain(end: "zmq.Socket[bytes]") -> None:
    end.plain_username = end.plain_password = b"dns"


no_mechanism = _mechanism(lambda _end: None)
plain_password = _mechanism(_plain)


def many_connections(attacker: Attacker) -> None:
    """Holds as many connections as the worker may have descriptors; none says anything."""
    held = list(attacker.connect())
    time.sleep(SECONDS)
    for end in held:
        end.close()


def half_handshakes(attacker: Attacker) -> None:
    """The greeting of ZMTP 3.1 (RFC 37) with CURVE, and then no more."""
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\3\1" + b"CURVE".ljust(20, b"\0") + bytes(32)
    held = []
    for end in attacker.connect():
        end.sendall(greeting)
        held.append(end)
        if len(held) >= 200:
            break
    time.sleep(SECONDS)
    for end in held:
        end.close()


def many_handshakes(attacker: Attacker) -> None:
    """With its own key, again and again."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        attacker.say(QUESTION)


def garbage_on_the_wire(attacker: Attacker) -> None:
    chance = random.Random(2)
    for number, end in enumerate(attacker.connect()):
        with end, contextlib.suppress(OSError):
            end.sendall(chance.randbytes(5000))
        if number > 200:
            break


ATTACKS: dict[str, Callable[[Attacker], None]] = {
    attack.__name__: attack
    for attack in (
        random_bytes,
        huge,
        many_parts,
        replay,
        deaf,
        answers_nobody_asked,
        a_verdict,
        another_slot,
        unknown_key,
        many_connections,
        half_handshakes,
        many_handshakes,
        garbage_on_the_wire,
    )
} | {"no_mechanism": no_mechanism, "plain_password": plain_password}

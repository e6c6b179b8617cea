"""What a compromised worker does to its channel, its log and its standard error.

Each is a behaviour for `pretend_worker`: the worker is confined like a real one and becomes ready first,
unless the name says otherwise.
"""

import array
import asyncio
import logging
import os
import pickle
import random
import socket
import struct
import threading
from collections.abc import Callable

import msgspec
import pretend_worker
from pretend_worker import AnyRuntime, Behaviour

from ipc import codec, logpipe
from ipc import messages as m
from ipc.permits import Role, role_of

ADDRESS = b"\x64\x40\3\4"
HEARTBEAT = codec.encode(m.Heartbeat(counters={}))
FORGED = "2026-01-31T12:00:00.000Z INFO proxy-0[1]: all is well"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\r"


class Boom:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (self._path, os.O_CREAT | os.O_WRONLY)


def _channel(runtime: AnyRuntime) -> socket.socket:
    return runtime._channel._socket


def _log_descriptor() -> int:
    return next(
        handler.queue._descriptor
        for handler in logging.getLogger().handlers
        if isinstance(handler, logpipe.WorkerLogHandler)
    )


def _then(action: Callable[[AnyRuntime], None]) -> Behaviour:
    """Becomes ready, does it, and lives on like a good worker."""

    async def behave(runtime: AnyRuntime) -> None:
        if role_of(runtime.config.common.slot) is Role.PROXY:
            runtime.send(m.ClustersReported(clusters=[]))
        runtime.ready()
        await asyncio.sleep(0.05)
        action(runtime)
        await runtime.stopping.wait()

    return behave


def _send(*datagrams: bytes) -> Behaviour:
    return pretend_worker.send_raw(*datagrams)


def _before_ready(*datagrams: bytes) -> Behaviour:
    async def behave(runtime: AnyRuntime) -> None:
        for datagram in datagrams:
            _channel(runtime).send(datagram)
        await runtime.stopping.wait()

    return behave


def _random(runtime: AnyRuntime) -> None:
    chance = random.Random(4)
    for _ in range(50):
        _channel(runtime).send(chance.randbytes(chance.randrange(1, 4000)))


def _huge(runtime: AnyRuntime) -> None:
    end = _channel(runtime)
    end.setblocking(True)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    end.send(bytes(codec.MAX_MESSAGE_BYTES + 1))


def _attach(runtime: AnyRuntime) -> None:
    """As many descriptors as the kernel takes, again and again."""
    end = _channel(runtime)
    end.setblocking(True)
    given = array.array("i", [0] * 250)
    try:
        for _ in range(300):
            end.sendmsg([HEARTBEAT], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)])
    except OSError:
        pass  # hung up by then


def _attach_itself(runtime: AnyRuntime) -> None:
    """The channel in the channel: a cycle that only the kernel can collect."""
    end = _channel(runtime)
    socket.send_fds(end, [HEARTBEAT], [end.fileno()])


def _nested(runtime: AnyRuntime) -> None:
    """A map in a map in a map ..."""
    _channel(runtime).send(b"\x81\xa1a" * 50_000)


def _map_of(count: int) -> bytes:
    return msgspec.msgpack.encode({f"counter{number}": number for number in range(count)})


CHANNEL: dict[str, Behaviour] = {
    "random bytes": _then(_random),
    "huge": _then(_huge),
    "deeply nested": _then(_nested),
    "ready twice": _send(codec.encode(m.Ready())),
    "handed over unasked": _send(codec.encode(m.HandedOver())),
    "another listener": _send(codec.encode(m.OpenListener(address=ADDRESS, port=80))),
    "an order": _send(codec.encode(m.TakeOver())),
    "words of the bus": _send(codec.encode(m.DialVerdict(flow_id=1))),
    "too many counters": _send(HEARTBEAT[:-1] + _map_of(600)),
    "a counter below zero": _send(HEARTBEAT[:-1] + b"\x81\xa1a\xff"),
    "a counter above all": _send(HEARTBEAT[:-1] + b"\x81\xa1a\xcf" + b"\xff" * 8),
    "handed over before ready": _before_ready(codec.encode(m.HandedOver())),
    "confined twice": _before_ready(
        codec.encode(
            m.Confined(
                uid=0, no_new_privs=True, capabilities=[], landlock=9, seccomp="no", missing=[]
            )
        )
    ),
    "descriptors": _then(_attach),
    "the channel itself": _then(_attach_itself),
    "accuses for ever": _send(*[codec.encode(m.PeerMisbehaved(slot="proxy-1", reason="x"))] * 40),
    "accuses itself": _send(codec.encode(m.PeerMisbehaved(slot="dns", reason="x"))),
}


def _pickle(runtime: AnyRuntime) -> None:
    body = pickle.dumps(Boom("/tmp/vnet-unpickled"))  # nobody makes it
    os.write(_log_descriptor(), struct.pack(">H", len(body)) + body)


def _queue_pickle(_runtime: AnyRuntime) -> None:
    """As a multiprocessing.Queue would frame it."""
    body = pickle.dumps(Boom("/tmp/vnet-unpickled"))  # nobody makes it
    os.write(_log_descriptor(), struct.pack(">i", len(body)) + body)


def _log_random(_runtime: AnyRuntime) -> None:
    os.write(_log_descriptor(), random.Random(5).randbytes(60_000))


def _wrong_types(_runtime: AnyRuntime) -> None:
    body = b"\x94\x01\x02\x03\x04"
    os.write(_log_descriptor(), struct.pack(">H", len(body)) + body)


LOG: dict[str, Behaviour] = {
    "a pickle": _then(_pickle),
    "a pickle of a queue": _then(_queue_pickle),
    "random bytes": _then(_log_random),
    "wrong types": _then(_wrong_types),
}


async def half_a_record(runtime: AnyRuntime) -> None:
    """The rest never comes: the worker ends in the middle of it."""
    runtime.ready()
    await asyncio.sleep(0.05)
    os.write(_log_descriptor(), struct.pack(">H", 4000) + b"half")
    os._exit(7)


async def forge(runtime: AnyRuntime) -> None:
    """Lines that look like another worker's, in the log and on standard error."""
    logging.getLogger(__name__).warning("one\n%s %s", FORGED, ESCAPES)
    logging.getLogger("proxy-0]: forged").warning("end")
    os.write(2, f"{FORGED}\n{ESCAPES}\n".encode())
    await pretend_worker.work(runtime)


def flood_log(*, standard_error: bool) -> Behaviour:
    """Writes as fast as it can for ever, and is otherwise a good worker."""

    async def behave(runtime: AnyRuntime) -> None:
        record = logging.makeLogRecord({"msg": "x" * 1000, "levelno": 30, "name": "flood"})
        data = b"y" * 999 + b"\n" if standard_error else logpipe.encode(record)
        descriptor = 2 if standard_error else _log_descriptor()
        os.set_blocking(descriptor, True)

        def write() -> None:
            while True:
                os.write(descriptor, data * 3)

        threading.Thread(target=write, daemon=True).start()
        await pretend_worker.work(runtime)

    return behave

"""A worker whose peer sends a message of very many parts is ended by its own limit, not the machine's."""

import contextlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from ipc import codec
from ipc import messages as m
from ipc.curve import make_key_pair
from workers import memory_limit
from workers.memory_limit import BASE_BYTES, CONNECTION_BYTES, most_bytes

ROOT = Path(__file__).parent.parent.parent
GIGABYTE = 1 << 30
COMMON = m.Common(
    slot="tun",
    proxies=1,
    bus_dir="/run/vnet/bus",
    keys=m.BusKeys(public="p" * 40, secret="s" * 40, peers={}),
    heartbeat_seconds=1.0,
    log_level="INFO",
)
# More than the process has when it is ready.
ROOM_BYTES = 32 << 20
RECEIVER = """
import asyncio, resource, sys
from pathlib import Path
import msgspec
from ipc import messages as m
from ipc.bus import BusContext
from workers import memory_limit

async def main():
    directory, keys, room = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    context = BusContext(directory, "tun", msgspec.json.decode(keys, type=m.BusKeys))
    context.serve(lambda *_: print("heard", flush=True), lambda *_: None)
    _, resident, *_, data, _ = map(int, Path("/proc/self/statm").read_text().split())
    page = resource.getpagesize()
    memory_limit.limit_memory(data * page + room)
    print(resident * page, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def proxy(connections: int) -> m.ConfigureProxy:
    """A configuration with that many connections; the rest does not matter."""
    values = dict.fromkeys(m.ConfigureProxy.__struct_fields__)
    return m.ConfigureProxy(**values | {"max_connections": connections})


@pytest.mark.parametrize("machine", [GIGABYTE // 4, GIGABYTE, 4 * GIGABYTE, 64 * GIGABYTE])
def test_an_honest_worker_has_room_and_a_machine_keeps_half_of_its_memory(machine):
    configuration = m.ConfigureDns(common=COMMON, network=None, upstream=[], ttl_seconds=1)  # type: ignore[arg-type]
    assert most_bytes(configuration, machine) == BASE_BYTES
    assert most_bytes(m.ConfigureMetrics(common=COMMON), machine) == BASE_BYTES // 2
    wanted = BASE_BYTES + 10_000 * CONNECTION_BYTES
    assert most_bytes(proxy(10_000), machine) == max(BASE_BYTES, min(wanted, machine // 2))
    assert most_bytes(proxy(1_000_000), machine) <= max(BASE_BYTES, machine // 2)


def test_a_lower_limit_stays():
    code = (
        "import resource; from workers import memory_limit as limit\n"
        "limit.limit_memory(300 << 20); limit.limit_memory(900 << 20)\n"
        "print(resource.getrlimit(resource.RLIMIT_DATA))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == str((300 << 20, 300 << 20))


def test_the_machine_has_memory():
    assert memory_limit.machine_bytes() > 64 << 20


@pytest.mark.parametrize(
    "part",
    # Together twice what there is room for; each part of the small ones takes 64 bytes.
    [bytes(codec.MAX_MESSAGE_BYTES // 2), b"x"],
    ids=["large", "small"],
)
def test_a_message_of_too_many_parts_takes_no_more_than_the_limit(tmp_path, part):
    server, client = make_key_pair(), make_key_pair()
    keys = m.BusKeys(public=server[0], secret=server[1], peers={"proxy-0": client[0]})
    with subprocess.Popen(
        [
            *(sys.executable, "-c", RECEIVER),
            *(str(tmp_path), msgspec.json.encode(keys).decode(), str(ROOM_BYTES)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            before = int(process.stdout.readline())
            highest = Highest(process.pid)
            number = 2 * ROOM_BYTES // max(64, len(part))
            with dealer(tmp_path / "tun", server[0], client) as end:
                end.send_multipart([part] * number)
                # libzmq ends the connection, or the process where it cannot do without memory.
                highest.watch(lambda: has_lost(end) or process.poll() is not None)
            # Code that is used for the first time is mapped, and does not count.
            assert highest.rss_bytes < before + ROOM_BYTES + (8 << 20)
            with dealer(tmp_path / "tun", server[0], client) as end:
                end.send(codec.encode(m.ProxyHello()))
                if process.stdout.readline() != b"heard\n":
                    assert process.wait(10) == -signal.SIGABRT
        finally:
            process.kill()


class Highest:
    """The most memory that a process was seen to have."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/statm")
        self.rss_bytes = 0

    def watch(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not until():
            assert time.monotonic() < deadline, f"at {self.rss_bytes} bytes"
            with contextlib.suppress(OSError, IndexError):
                pages = int(self._path.read_text().split()[1])
                self.rss_bytes = max(self.rss_bytes, pages * resource.getpagesize())
            time.sleep(0.002)


def has_lost(end: "zmq.Socket[bytes]") -> bool:
    """Whether its connection has ended, after the handshake."""
    monitor = end.get_monitor_socket()
    return bool(monitor.poll(0)) and (
        recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
    )


@contextlib.contextmanager
def dealer(path: Path, server: str, pair: tuple[str, str]) -> Iterator["zmq.Socket[bytes]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        end = context.socket(zmq.DEALER)
        end.linger = 0
        end.curve_publickey, end.curve_secretkey = (key.encode() for key in pair)
        end.curve_serverkey = server.encode()
        end.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        end.connect(f"ipc://{path}")
        yield end
    finally:
        context.destroy(linger=0)

"""Whose a connection is: what the question costs a connect, with few sockets open and with many.

Asked as a proxy does, about sockets that wait for the answer to their SYN. The refusals are those of
a whole VNet, as another user sees them: connect to "connection refused".
"""

import contextlib
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

from bench_bed import BACKENDS, Bed, name_of
from bench_figures import Aim, Compare, Figure, percentile

from ipc.messages import Access, DialRequest, Network
from ipc.socket_owner import SocketDiag
from workers.proxy.who import Doorbell, make_doorbell

SOCKETS = 5000
WAITING = 200
QUESTIONS = 20_000
REFUSALS = 500
# Who is nobody's and nothing's; not the user that VNet runs for.
STRANGER = 64_999
TIMEOUT_SECONDS = 20.0
AIM = Aim(Compare.VALUE, most=5)

_NETWORK = Network(
    interface="",
    mtu=0,
    ranges=[],
    tun_ipv4=bytes(4),
    dns_ipv4=bytes(4),
    ipv6_prefix=None,
    tun_ipv6=None,
    dns_ipv6=None,
)


def measure(_bed: Bed) -> list[Figure]:
    """Without more sockets than there are, and with SOCKETS more."""
    with _many_descriptors(), ExitStack() as closing:
        requests = list(_waiting(closing))
        bell = make_doorbell(_NETWORK, Access(uids=[os.geteuid()]), [SocketDiag.open().detach()])
        closing.callback(bell.close)
        few, few_refused = _ask(bell, requests), _refused()
        _open_sockets(closing)
        many, many_refused = _ask(bell, requests), _refused()
    baseline = f"without {SOCKETS} sockets"
    return [
        Figure(
            f"{what} p{percent}, {SOCKETS} sockets",
            "ms",
            percentile(found, percent) * 1e3,
            percentile(before, percent) * 1e3,
            baseline,
            aim if percent == 99 else None,
        )
        for what, found, before, aim in (
            ("who connects", many, few, AIM),
            ("refused stranger", many_refused, few_refused, None),
        )
        for percent in (50, 99)
    ]


def _ask(bell: Doorbell, requests: list[DialRequest]) -> list[float]:
    taken = []
    for number in range(QUESTIONS):
        begin = time.perf_counter()
        stranger = bell.stranger(requests[number % len(requests)])
        taken.append(time.perf_counter() - begin)
        if stranger is not None:
            raise RuntimeError(f"a connection of this process is a stranger's: {stranger.why}")
    return taken


def _waiting(closing: ExitStack) -> Iterator[DialRequest]:
    """Connections that nobody accepts, after those that the kernel accepts for the listener."""
    full = closing.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    place = full.getsockname()
    loopback = socket.inet_aton("127.0.0.1")
    for number in range(WAITING + 2):
        end = closing.enter_context(socket.socket())
        end.setblocking(False)
        end.connect_ex(place)
        if number >= 2:
            yield DialRequest(
                flow_id=number,
                source=loopback,
                source_port=end.getsockname()[1],
                destination=loopback,
                destination_port=place[1],
            )


def _open_sockets(closing: ExitStack) -> None:
    server = closing.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
    for _ in range(SOCKETS // 2):
        closing.enter_context(socket.create_connection(server.getsockname()))
        closing.enter_context(server.accept()[0])


def _refused() -> list[float]:
    """Seconds of each refusal, measured in a process of the stranger's."""
    place = (socket.gethostbyname(name_of("redis")), BACKENDS["redis"])
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            with os.fdopen(writer, "w") as pipe:
                json.dump([_seconds_until_refused(place) for _ in range(REFUSALS)], pipe)
            status = 0
        except (OSError, RuntimeError) as error:
            print(f"bench: the stranger: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError("a stranger was not refused")
    return list(json.loads(text))


def _seconds_until_refused(place: tuple[str, int]) -> float:
    begin = time.perf_counter()
    try:
        socket.create_connection(place, TIMEOUT_SECONDS).close()
    except ConnectionRefusedError:
        return time.perf_counter() - begin
    raise RuntimeError("it could connect")


@contextlib.contextmanager
def _many_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = SOCKETS + WAITING + 500
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], min(wanted, before[1])), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

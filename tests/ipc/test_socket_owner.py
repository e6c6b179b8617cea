"""Which user a socket belongs to, asked of this machine's kernel, and answers that it never gives."""

import errno
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import macos_sockets
from ipc.socket_owner import SYN_SENT, UNKNOWN, Owner, SocketDiag, answer_in

ROOT = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
ESTABLISHED, TIME_WAIT, UNCONNECTED = 1, 6, 7
OTHER = 12345
KINDS = ["IPv4", "IPv6", "IPv4 by an IPv6 socket"]


@pytest.fixture
def diag():
    with SocketDiag.open() as kernel:
        yield SocketDiag(kernel)


def packed(end: socket.socket, name: tuple) -> tuple[bytes, int]:
    text = name[0].removeprefix("::ffff:")
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text), name[1]


def ends_of(end: socket.socket) -> tuple[bytes, int, bytes, int]:
    return (*packed(end, end.getsockname()), *packed(end, end.getpeername()))


def far_end(kind: str, sort: socket.SocketKind) -> socket.socket:
    family = socket.AF_INET6 if kind == "IPv6" else socket.AF_INET
    end = socket.socket(family, sort)
    end.bind(("::1" if kind == "IPv6" else "127.0.0.1", 0))
    if sort == socket.SOCK_STREAM:
        end.listen(1)
    return end


def near_end(kind: str, sort: socket.SocketKind) -> socket.socket:
    return socket.socket(socket.AF_INET if kind == "IPv4" else socket.AF_INET6, sort)


def where(kind: str, far: socket.socket) -> tuple[str, int]:
    host, port = far.getsockname()[:2]
    return (f"::ffff:{host}" if kind.startswith("IPv4 by") else host), port


@LINUX
@pytest.mark.parametrize("kind", KINDS)
def test_a_tcp_connection_is_found_from_the_side_that_is_asked_about(diag, kind):
    with (
        far_end(kind, socket.SOCK_STREAM) as far,
        near_end(kind, socket.SOCK_STREAM) as near,
    ):
        near.connect(where(kind, far))
        ends = ends_of(near)
        own = Owner(os.geteuid(), os.fstat(near.fileno()).st_ino, ESTABLISHED)
        assert diag.tcp_owner(*ends) == own
        # It does not connect any more.
        assert diag.tcp_owner(*ends, states=SYN_SENT) == own._replace(uid=UNKNOWN)
        # The listener has the port, but not the connection.
        source, port, destination, destination_port = ends
        assert diag.tcp_owner(destination, destination_port, source, port ^ 1) is None
        assert diag.tcp_owner(source, port ^ 1, destination, destination_port) is None


@LINUX
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_connected", [False, True])
def test_a_udp_socket_is_found_by_where_it_sends(diag, kind, is_connected):
    with far_end(kind, socket.SOCK_DGRAM) as far, near_end(kind, socket.SOCK_DGRAM) as near:
        far_address, far_port = packed(far, far.getsockname())
        if is_connected:
            near.connect(where(kind, far))
        else:
            near.bind(("", 0))
        port = near.getsockname()[1]
        owner = diag.udp_owner(far_address, port, far_address, far_port)
        state = ESTABLISHED if is_connected else UNCONNECTED
        assert owner == Owner(os.geteuid(), os.fstat(near.fileno()).st_ino, state)
        elsewhere = diag.udp_owner(far_address, port, far_address, far_port ^ 1)
        assert elsewhere == (None if is_connected else owner)
        near.close()
        assert diag.udp_owner(far_address, port, far_address, far_port) is None


@LINUX
def test_what_no_process_has_any_more_is_nobodys_and_not_roots(diag):
    with far_end("IPv4", socket.SOCK_STREAM) as far:
        near = socket.create_connection(far.getsockname())
        accepted, _ = far.accept()
        ends = ends_of(near)
        near.close()  # first, so that it waits
        with accepted:
            orphan = diag.tcp_owner(*ends)
        assert orphan is not None
        assert (orphan.uid, orphan.inode) == (UNKNOWN, 0)
        waits = diag.tcp_owner(*ends)
        assert waits == Owner(UNKNOWN, 0, TIME_WAIT)


OF_ANOTHER = """
import os, socket, sys
os.setgroups([])
os.setuid(int(sys.argv[1]))
kind = getattr(socket, sys.argv[3])
end = socket.socket(socket.AF_INET, kind)
end.connect(("127.0.0.1", int(sys.argv[2])))
print(end.getsockname()[1], flush=True)
sys.stdin.read()
"""


@LINUX
@AS_ROOT
@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
def test_the_user_of_another_process_is_told(diag, kind):
    with far_end("IPv4", getattr(socket, kind)) as far:
        port = far.getsockname()[1]
        with subprocess.Popen(
            [sys.executable, "-c", OF_ANOTHER, str(OTHER), str(port), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            own_port = int(process.stdout.readline())
            ask = diag.tcp_owner if kind == "SOCK_STREAM" else diag.udp_owner
            owner = ask(b"\x7f\0\0\1", own_port, b"\x7f\0\0\1", port)
            assert owner is not None
            assert owner.uid == OTHER
            process.communicate("")


@LINUX
@AS_ROOT
def test_a_socket_that_is_bound_to_an_interface_is_found_on_that_one(diag):
    loopback = socket.if_nametoindex("lo")
    with far_end("IPv4", socket.SOCK_STREAM) as far, socket.socket() as near:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        near.connect(far.getsockname())
        ends = ends_of(near)
        assert diag.tcp_owner(*ends) is None
        diag.interface = loopback
        found = diag.tcp_owner(*ends)
        assert found is not None
        assert found.uid == os.geteuid()


@LINUX
def test_a_kernel_that_does_not_say_is_no_absent_socket():
    kernel = SocketDiag.open()
    diag = SocketDiag(kernel)
    kernel.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        diag.tcp_owner(b"\x7f\0\0\1", 1, b"\x7f\0\0\1", 2)


class PretendKernel:
    """Gives answers that were made before; `answers` may change the sequence number of the question."""

    def __init__(self, *answers) -> None:
        self._answers = list(answers)
        self._question = b""

    def setblocking(self, _is_blocking: bool) -> None:
        pass

    def send(self, question: bytes) -> None:
        self._question = question

    def recv(self, _size: int) -> bytes:
        if not self._answers:
            raise BlockingIOError(errno.EAGAIN, "nothing is there")
        answer = self._answers.pop(0)
        return answer(self._question) if callable(answer) else answer


ENDS = (b"\x0a\0\0\1", 1000, b"\x0a\0\0\2", 2000)


def answer(question: bytes, *, later: int = 0, kind=20, uid=1000, inode=4711, state=2) -> bytes:
    sequence = struct.unpack_from("=I", question, 8)[0] + later
    body = bytes([2, state, 0, 0]) + question[24:] + struct.pack("=IIIII", 0, 0, 0, uid, inode)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, sequence, 0) + body


def failure(question: bytes, number: int) -> bytes:
    sequence = struct.unpack_from("=I", question, 8)[0]
    return struct.pack("=IHHIIi", 20, 2, 0, sequence, 0, -number)


def asked(*answers, states: int = SYN_SENT) -> Owner | None:
    return SocketDiag(PretendKernel(*answers)).tcp_owner(*ENDS, states=states)  # type: ignore[arg-type]


def test_only_the_answer_to_this_question_counts():
    stale = [
        lambda q: answer(q, later=-1, uid=0),
        lambda q: answer(q, later=1, uid=0),
        b"",
        b"x" * 15,
    ]
    assert asked(*stale, answer) == Owner(1000, 4711, 2)
    assert asked(lambda q: answer(q, kind=3), answer) == Owner(1000, 4711, 2)
    assert asked(lambda q: answer(q, state=1)) == Owner(UNKNOWN, 4711, 1)
    assert asked(lambda q: answer(q, inode=0, uid=0)) == Owner(UNKNOWN, 0, 2)
    assert asked(lambda q: failure(q, errno.ENOENT)) is None
    with pytest.raises(PermissionError):
        asked(lambda q: failure(q, errno.EPERM))
    with pytest.raises(BlockingIOError):
        asked(*stale)
    with pytest.raises(OSError, match="no answer"):
        asked(*[b""] * 1000)


def test_the_ends_of_the_answer_are_compared():
    for at in (24, 26, 28, 44):  # ports, first bytes of the addresses
        assert asked(lambda q, at=at: answer(q[:at] + bytes([q[at] ^ 1]) + q[at + 1 :])) is None


def test_addresses_of_two_families_are_no_connection(diag):
    with pytest.raises(ValueError, match="family"):
        diag.tcp_owner(b"\x0a\0\0\1", 1, bytes(16), 2)


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_any_answer_is_read_or_left_out(data, sequence):
    try:
        found = answer_in(data, sequence)
    except OSError:
        return
    assert found is None or len(found[1]) == 36


# -- macOS --


def part(kind: int, size: int, **fields: tuple[int, bytes]) -> bytes:
    data = bytearray(size)
    struct.pack_into("=II", data, 0, size, kind)
    for at, value in fields.values():
        data[at : at + len(value)] = value
    return bytes(data) + bytes(-size % 8)


def record(ends: tuple[bytes, int, bytes, int], uid: int, state: int | None) -> bytes:
    """As XNU writes it: one part of each kind, those that are not read among them."""
    address, port, peer, peer_port = ends
    inp = part(
        0x10,
        104,
        ports=(16, struct.pack("!HH", peer_port, port)),
        version=(44, bytes([2 if len(address) == 16 else 1])),
        peer=(64 - len(peer), peer),
        local=(80 - len(address), address),
    )
    so = part(1, 100, uid=(64, struct.pack("=I", uid)), pid=(68, struct.pack("=I", 77)))
    buffers = part(2, 36) + part(4, 36) + part(8, 140)
    tcp = b"" if state is None else part(0x20, 204, state=(36, struct.pack("=I", state)))
    return inp + so + buffers + tcp


END = struct.pack("=IIQQ", 24, 2, 1, 1)
V6 = (bytes(15) + b"\1", 5, bytes(15) + b"\2", 6)


def test_the_table_of_macos_is_read(monkeypatch):
    table = END + record(ENDS, 501, 2) + record(V6, 502, 4) + END
    assert list(macos_sockets.entries(table)) == [(*ENDS, 501, 2), (*V6, 502, 1)]
    monkeypatch.setattr(macos_sockets, "_table", {"net.inet.tcp.pcblist_n": table}.__getitem__)
    kernel = macos_sockets.SocketTable()
    assert kernel.tcp_owner(*ENDS, states=SYN_SENT) == Owner(501, 0, 2)
    assert kernel.tcp_owner(*V6, states=SYN_SENT) == Owner(UNKNOWN, 0, 1)
    assert kernel.tcp_owner(*V6) == Owner(502, 0, 1)
    assert kernel.tcp_owner(ENDS[2], ENDS[3], ENDS[0], ENDS[1]) is None


def test_udp_sockets_of_macos_are_found_when_one_user_has_them(monkeypatch):
    source, port, destination, destination_port = ENDS
    any_one = (bytes(4), port, bytes(4), 0)
    tables = {"net.inet.udp.pcblist_n": END + record(any_one, 501, None) + END}
    monkeypatch.setattr(macos_sockets, "_table", tables.__getitem__)
    kernel = macos_sockets.SocketTable()
    assert kernel.udp_owner(*ENDS) == Owner(501, 0, 7)
    assert kernel.udp_owner(source, port + 1, destination, destination_port) is None
    tables["net.inet.udp.pcblist_n"] += record(ENDS, 502, None)
    assert kernel.udp_owner(*ENDS) == Owner(501, 0, 7)  # what follows the end is not read
    tables["net.inet.udp.pcblist_n"] = END + record(any_one, 501, None) + record(ENDS, 502, None)
    assert kernel.udp_owner(*ENDS) == Owner(UNKNOWN, 0, 7)


@given(st.binary(max_size=400))
def test_any_table_of_macos_is_read_or_left_out(data):
    for table in (data, END + data, END + record(ENDS, 501, 2) + data):
        for entry in macos_sockets.entries(table):
            assert len(entry.address) in (4, 16)

"""The embedded cluster's ProxySSH alone: one stream to a node that is no SSH server but a source or sink.

The client is VNet's own layer for it, in this process, over blocking TLS.
"""

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

from bench_programs import cpu_seconds
from bench_ssh_bed import ADDRESSES, NODES_ZONE, USER, Bed

from workers.proxy.dial_plan import SshTarget
from workers.proxy.layers import Plain
from workers.proxy.ssh_stream import SshStream
from workers.proxy.teleport.names import encode_cluster_name

ALPN = "teleport-proxy-ssh-grpc"
BLOCK_BYTES = 128 * 1024
READ_BYTES = 256 * 1024
MOST_PENDING_BYTES = 1 << 20
TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Speed:
    """MB/s, and CPU seconds of the cluster per gigabyte."""

    megabytes: float
    cluster: float


def measure(bed: Bed, node: str, seconds: float) -> Speed:
    """The node `source` is read from, `sink` written to."""
    with _connected(bed, node) as (connection, stream):
        turn = _read if node == "source" else _write
        turn(connection, stream, 1.0)
        begin, spent = time.monotonic(), -cpu_seconds([bed.cluster.pid])
        moved = turn(connection, stream, seconds)
        elapsed = time.monotonic() - begin
        spent += cpu_seconds([bed.cluster.pid])
    return Speed(moved / elapsed / 1e6, spent / moved * 1e9)


@contextlib.contextmanager
def _connected(bed: Bed, node: str) -> Iterator[tuple[ssl.SSLSocket, SshStream]]:
    context = ssl.create_default_context(cafile=str(bed.keys / "cas" / f"{NODES_ZONE}.pem"))
    context.load_cert_chain(bed.keys / f"{USER}.crt", bed.keys / f"{USER}.key")
    context.set_alpn_protocols([ALPN])
    plain = socket.create_connection((ADDRESSES[NODES_ZONE], 443), TIMEOUT_SECONDS)
    name = encode_cluster_name(NODES_ZONE)
    with plain, context.wrap_socket(plain, server_hostname=name) as connection:
        stream = SshStream(Plain(), SshTarget(f"{node}:0", NODES_ZONE, "18.0.0"))
        is_open = stream.handshake(b"")
        while not is_open:
            connection.sendall(stream.take_records())
            is_open = stream.handshake(_received(connection))
        yield connection, stream


def _received(connection: ssl.SSLSocket) -> bytes:
    if data := connection.recv(READ_BYTES):
        return data
    raise RuntimeError("the cluster has closed the connection")


def _read(connection: ssl.SSLSocket, stream: SshStream, seconds: float) -> int:
    moved, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        moved += len(stream.decrypt(_received(connection)))
        if records := stream.take_records():
            connection.sendall(records)
    return moved


def _write(connection: ssl.SSLSocket, stream: SshStream, seconds: float) -> int:
    block = memoryview(bytes(BLOCK_BYTES))
    moved, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        if stream.pending_bytes > MOST_PENDING_BYTES or _has_come(connection):
            stream.decrypt(_received(connection))
            connection.sendall(stream.take_records())
        else:
            connection.sendall(stream.encrypt(block))
            moved += len(block)
    return moved


def _has_come(connection: ssl.SSLSocket) -> bool:
    return bool(connection.pending() or select.select([connection], [], [], 0)[0])

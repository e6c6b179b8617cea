"""Throughput, connection rate and memory of the relay beside compiled relays, in one run.

    load --plain--> relay under test --TLS--> nginx --plain--> far end      vnet, nginx, socat
    load ---------------------------TLS-----> nginx --plain--> far end      direct

Load and far end move large blocks with plain blocking calls, so that OpenSSL and the kernel do
their work in C. All of it runs on the loopback of a network namespace of its own, with Reno: a
local path needs no BBR. Needs root, nginx with its stream module, and socat.

    python tests/benchmarks/relay_bench.py [--seconds 4] [--paths direct,vnet,nginx,socat]
"""

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import socket
import ssl
import statistics
import struct
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import bench_programs as programs
import psutil
import uvloop
from bench_programs import Programs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from workers.proxy.dial import dial
from workers.proxy.dial_plan import DialPlan, TlsPlan
from workers.proxy.reactor import Reactor
from workers.proxy.relay import Relay

BLOCK = memoryview(os.urandom(1024 * 1024))
TLS_PORT, FAR_PORT = 9443, 9001
PORTS = {"direct": TLS_PORT, "vnet": 9002, "nginx": 9003, "socat": 9004}
ALPN = "teleport-tcp"
HOST = "127.0.0.1"


# --- certificates -----------------------------------------------------------------------------


def write_certificates(directory: Path) -> None:
    """ca.pem, server.pem and client.pem (with their keys), all ECDSA P-256."""
    ca_key, ca = issue("bench CA", None, None)
    (directory / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    for name in ("server", "client"):
        key, certificate = issue("localhost", ca_key, ca)
        (directory / f"{name}.pem").write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )


def issue(name: str, ca_key: ec.EllipticCurvePrivateKey | None, ca: x509.Certificate | None):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca.subject if ca else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    )
    return key, builder.sign(ca_key or key, hashes.SHA256())


def client_context(directory: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    context.load_cert_chain(directory / "client.pem")
    context.set_alpn_protocols([ALPN])
    return context


# --- far end ----------------------------------------------------------------------------------


def far_end(ready) -> None:
    """Serves one command byte per connection: U takes all, D sends for ever, E answers a byte."""
    listener = socket.create_server((HOST, FAR_PORT), backlog=2048)
    ready.set()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def serve(connection: socket.socket) -> None:
    buffer = bytearray(len(BLOCK))
    with connection, contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        command = connection.recv(1)
        if command == b"D":
            while True:
                connection.sendall(BLOCK)
        if command == b"E":
            connection.sendall(b"e")
        while connection.recv_into(buffer):
            pass


# --- relays -----------------------------------------------------------------------------------


def run_vnet(directory: Path, ready) -> None:
    uvloop.run(relay_forever(directory, ready))


async def relay_forever(directory: Path, ready) -> None:
    loop = asyncio.get_running_loop()
    reactor = Reactor(loop)
    plan = DialPlan(HOST, TLS_PORT, TlsPlan(client_context(directory), "localhost"))
    listener = socket.create_server((HOST, PORTS["vnet"]), backlog=2048)
    listener.setblocking(False)
    relays: set[Relay] = set()
    tasks: set[asyncio.Task[None]] = set()
    signal.signal(signal.SIGUSR1, lambda *_: gc.collect())

    async def join(local: socket.socket) -> None:
        upstream = await dial(plan, 10, reactor)
        relay = Relay(reactor, local, upstream, lambda _: relays.discard(relay))
        relays.add(relay)
        relay.start()

    ready.set()
    while True:
        local, _ = await loop.sock_accept(listener)
        task = asyncio.create_task(join(local))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def start_nginx_relay(started: Programs, directory: Path) -> int:
    address, upstream = f"{HOST}:{PORTS['nginx']}", f"{HOST}:{TLS_PORT}"
    server = programs.nginx_tls_relay(address, upstream, certificate=directory / "client.pem")
    return started.start("nginx", programs.nginx(directory, "relay", server))


def start_far_nginx(started: Programs, directory: Path) -> int:
    server = programs.nginx_tls_server(
        f"{HOST}:{TLS_PORT}",
        f"{HOST}:{FAR_PORT}",
        certificate=directory / "server.pem",
        client_ca=directory / "ca.pem",
        alpn=ALPN,
    )
    return started.start("far", programs.nginx(directory, "far-nginx", server))


def start_socat(started: Programs, directory: Path) -> int:
    upstream = programs.socat_tls(
        f"{HOST}:{TLS_PORT}",
        certificate=directory / "client.pem",
        ca=directory / "ca.pem",
        name="localhost",
    )
    listen = programs.socat_listen(HOST, PORTS["socat"])
    return started.start("socat", ["socat", programs.SOCAT_BLOCK, listen, upstream])


# --- load -------------------------------------------------------------------------------------


def connect(path: str, context: ssl.SSLContext) -> socket.socket:
    connection = socket.create_connection((HOST, PORTS[path]), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if path == "direct":
        return context.wrap_socket(connection, server_hostname="localhost")
    return connection


def throughput(path: str, context: ssl.SSLContext, command: bytes, streams: int, seconds: float):
    """Gbit/s over all streams, after a second of warming up."""
    totals = [0] * streams
    stop = time.monotonic() + seconds + 1
    connections = [connect(path, context) for _ in range(streams)]

    def move(index: int) -> None:
        connection, buffer = connections[index], bytearray(256 * 1024)
        connection.sendall(command)
        while time.monotonic() < stop:
            if command == b"D":
                totals[index] += connection.recv_into(buffer)
            else:
                connection.sendall(BLOCK)
                totals[index] += len(BLOCK)

    threads = [threading.Thread(target=move, args=(index,)) for index in range(streams)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    begin, before = time.monotonic(), sum(totals)
    time.sleep(seconds)
    moved, elapsed = sum(totals) - before, time.monotonic() - begin
    for thread in threads:
        thread.join()
    for connection in connections:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    return moved * 8 / elapsed / 1e9, moved


def connections(path: str, context: ssl.SSLContext, seconds: float) -> dict[str, float]:
    """Connect, one byte each way, close; by four clients at a time, and then by one for latency."""
    stop = time.monotonic() + seconds
    counts = [0] * 4

    def once() -> float:
        begin = time.monotonic()
        with connect(path, context) as connection:
            connection.sendall(b"E")
            assert connection.recv(1) == b"e"
            return time.monotonic() - begin

    def repeat(index: int) -> None:
        while time.monotonic() < stop:
            once()
            counts[index] += 1

    begin = time.monotonic()
    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = sum(counts) / (time.monotonic() - begin)
    latencies = sorted(once() for _ in range(200))
    return {
        "connections_per_second": round(rate, 1),
        "latency_p50_ms": round(statistics.median(latencies) * 1e3, 2),
        "latency_p99_ms": round(latencies[197] * 1e3, 2),
    }


def idle_memory(path: str, context: ssl.SSLContext, pid: int, count: int) -> dict[str, float]:
    """Growth of one relay process by `count` connections that had a byte each way."""
    before = psutil.Process(pid).memory_full_info().uss
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(connect(path, context))
            connection.sendall(b"E")
            connection.recv(1)
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)
        after = psutil.Process(pid).memory_full_info().uss
    return {"idle_connections": count, "idle_growth_mb": round((after - before) / 1e6, 1)}


# --- the run ----------------------------------------------------------------------------------


def with_children(pid: int | None) -> list[int]:
    if pid is None:
        return []
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def measure(path: str, pid: int | None, directory: Path, arguments: argparse.Namespace):
    context = client_context(directory)
    result: dict[str, float] = {}
    for streams in arguments.streams:
        for command, direction in ((b"U", "up"), (b"D", "down")):
            pids = with_children(pid)
            cpu = programs.cpu_seconds(pids)
            gbits, moved = throughput(path, context, command, streams, arguments.seconds)
            cpu = programs.cpu_seconds(pids) - cpu
            result[f"{direction}_{streams}_gbits"] = round(gbits, 2)
            if path not in {"direct", "socat"}:  # socat forks: its children are gone by now
                warm = (arguments.seconds + 1) / arguments.seconds
                result[f"{direction}_{streams}_cpu_s_per_gb"] = round(cpu / moved / warm * 1e9, 2)
    if arguments.rate:
        result |= connections(path, context, arguments.seconds)
    if path == "vnet" and arguments.idle:
        result |= idle_memory(path, context, pid, arguments.idle)
    return result


def run(arguments: argparse.Namespace, directory: Path) -> dict[str, dict[str, float]]:
    write_certificates(directory)
    spawn = multiprocessing.get_context("spawn")
    processes = []
    pids: dict[str, int | None] = {"direct": None}
    ready = spawn.Event()
    processes.append(spawn.Process(target=far_end, args=(ready,), daemon=True))
    processes[-1].start()
    ready.wait(20)
    started = Programs(directory)
    start_far_nginx(started, directory)
    for name, start in (("nginx", start_nginx_relay), ("socat", start_socat)):
        if name in arguments.paths:
            pids[name] = start(started, directory)
    try:
        if "vnet" in arguments.paths:
            ready = spawn.Event()
            processes.append(spawn.Process(target=run_vnet, args=(directory, ready), daemon=True))
            processes[-1].start()
            ready.wait(20)
            pids["vnet"] = processes[-1].pid
        for path in arguments.paths:
            programs.wait_for_port(HOST, PORTS[path])
        results: dict[str, dict[str, list[float]]] = {path: {} for path in arguments.paths}
        for _ in range(arguments.rounds):
            for path in arguments.paths:
                for key, value in measure(path, pids[path], directory, arguments).items():
                    results[path].setdefault(key, []).append(value)
        return {
            path: {key: statistics.median(values) for key, values in figures.items()}
            for path, figures in results.items()
        }
    finally:
        for process in processes:
            process.terminate()
        started.stop_all()


def enter_namespace() -> None:
    """Runs this program again in a network namespace of its own."""
    setup = (
        "ip link set lo up && sysctl -qw net.ipv4.tcp_congestion_control=reno && "
        'IN_NAMESPACE=1 exec "$@"'
    )
    os.execvp("unshare", ["unshare", "--net", "sh", "-c", setup, "sh", sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=1, help="rounds over all paths; the median")
    parser.add_argument("--paths", type=lambda text: text.split(","), default=list(PORTS))
    parser.add_argument(
        "--streams", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8]
    )
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--no-rate", dest="rate", action="store_false")
    arguments = parser.parse_args()
    if "IN_NAMESPACE" not in os.environ:
        enter_namespace()
    directory = Path(tempfile.mkdtemp(prefix="relay-bench-"))
    directory.chmod(0o755)
    try:
        results = run(arguments, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    keys = list(dict.fromkeys(key for figures in results.values() for key in figures))
    print(f"{'':24}" + "".join(f"{path:>10}" for path in results), file=sys.stderr)
    for key in keys:
        row = "".join(f"{figures.get(key, '-'):>10}" for figures in results.values())
        print(f"{key:24}{row}", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

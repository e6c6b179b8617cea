"""Throughput of the TUN worker alone: iperf3 through it, beside iperf3 over loopback.

    python tests/workers/tun/pump_bench.py [--seconds 4] [--mtu 65535] [--batch 32]

Runs as root, in namespaces of its own (see tun_bed); needs iperf3. Prints one JSON line per path:
Gbit/s received, CPU seconds of the worker per gigabyte, packets it moved and lost. Every
connection is admitted by a proxy that is a function in the worker's process.
"""

import argparse
import asyncio
import functools
import json
import multiprocessing
import subprocess
import time
from multiprocessing.connection import Connection

import uvloop
from fake_runtime import FakeBus, admit, running_worker
from tun_bed import Bed, make_bed

from workers.tun import worker
from workers.tun.pump import Direction

PATHS = {
    "up": ("100.64.0.9", []),
    "down": ("100.64.0.9", ["-R"]),
    "up IPv6": ("fd60:67ec:4325::6440:9", []),
    "8 up": ("100.64.0.9", ["-P", "8"]),
    "8 down": ("100.64.0.9", ["-P", "8", "-R"]),
}


def run_worker(bed: Bed, batch: int, end: Connection) -> None:
    """The child: the worker until the parent speaks; then sends its counters and CPU seconds."""
    worker.Direction = functools.partial(Direction, batch=batch)  # type: ignore[misc,assignment]

    async def main() -> None:
        async with running_worker([bed.outer_tun, bed.inner_tun], FakeBus(admit)) as runtime:
            end.send("ready")
            await asyncio.to_thread(end.recv)
            end.send((runtime.counters, time.process_time()))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def measure(namespace: str, address: str, options: list[str], seconds: int) -> float:
    """Gbit/s received."""
    command = ["ip", "netns", "exec", namespace, "iperf3", "-J", "-c", address, "-t", str(seconds)]
    result = subprocess.run([*command, *options], capture_output=True, check=True)
    return float(json.loads(result.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9


def measure_worker(bed: Bed, name: str, seconds: int, batch: int) -> dict[str, object]:
    """One path through a fresh worker."""
    address, options = PATHS[name]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=run_worker, args=(bed, batch, theirs))
    child.start()
    ours.recv()
    rate = measure(bed.host, address, options, seconds)
    ours.send("stop")
    counters, cpu = ours.recv()
    child.join()
    moved = counters["bytes_to_inner"] + counters["bytes_to_outer"]
    return {
        "path": name,
        "gbit_per_second": round(rate, 2),
        "cpu_seconds_per_gigabyte": round(cpu / moved * 1e9, 2),
        "packets": counters["packets_to_inner"] + counters["packets_to_outer"],
        "dropped": {k: v for k, v in counters.items() if v and k.startswith("dropped")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--mtu", type=int, default=65535)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    with make_bed(options.mtu) as bed:
        server = subprocess.Popen(
            ["ip", "netns", "exec", bed.inner, "iperf3", "-s"], stdout=subprocess.DEVNULL
        )
        try:
            time.sleep(0.5)
            for name in PATHS:
                print(json.dumps(measure_worker(bed, name, options.seconds, options.batch)))
            rate = measure(bed.inner, "127.0.0.1", [], options.seconds)
            print(json.dumps({"path": "loopback, no worker", "gbit_per_second": round(rate, 2)}))
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()

"""The embedded clusters of the benchmarks, each cluster file in a process of its own."""

import asyncio
import contextlib
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from demo import linux
from demo.cluster.config import ClusterFile
from demo.cluster.server import EmbeddedCluster

START_SECONDS = 60.0

Prepare = Callable[[EmbeddedCluster], None]


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """The process of a cluster file's clusters."""

    pid: int
    give_up_addresses: Callable[[], None]


def join_login(home: Path, other_home: Path, proxy_host: str) -> None:
    """Puts a login of another tsh home into this one, which may be in use."""
    profile = f"{proxy_host}.yaml"
    shutil.copytree(other_home / "keys" / proxy_host, home / "keys" / proxy_host)
    shutil.copy(other_home / profile, home / profile)


@contextlib.contextmanager
def running_cluster(
    file: ClusterFile,
    home: Path,
    addresses: Mapping[str, str],
    prepare: Prepare = lambda _cluster: None,
) -> Iterator[RunningCluster]:
    """Runs the clusters, logged in to in `home`.

    `addresses` are those of the proxies by cluster; `prepare` is called in the other process.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    arguments = (file, home, addresses, prepare, theirs)
    process = context.Process(target=_run, args=arguments, daemon=True)
    process.start()
    theirs.close()
    _expect(ours, "ready")

    def give_up_addresses() -> None:
        ours.send("give up the addresses")
        _expect(ours, "done")

    try:
        assert process.pid is not None
        yield RunningCluster(process.pid, give_up_addresses)
    finally:
        process.terminate()
        process.join()


def _expect(pipe: Connection, word: str) -> None:
    said = pipe.recv() if pipe.poll(START_SECONDS) else "nothing"
    if said != word:
        raise RuntimeError(f"the embedded cluster says {said}")


def _run(
    file: ClusterFile, home: Path, addresses: Mapping[str, str], prepare: Prepare, pipe: Connection
) -> None:
    linux.die_with_parent()
    asyncio.run(_serve(file, home, addresses, prepare, pipe))


async def _serve(
    file: ClusterFile, home: Path, addresses: Mapping[str, str], prepare: Prepare, pipe: Connection
) -> None:
    home.mkdir(mode=0o700)
    async with EmbeddedCluster(file, home, bind_hosts=addresses) as cluster:
        prepare(cluster)
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        cluster.stop_listening()
        pipe.send("done")
        await asyncio.Event().wait()

"""Whether one slow cluster slows another: names, with a login to a cluster that hangs beside.

alone        the only login is that to the cluster whose names are asked
silent       a second login's cluster has never answered (measured after the first seconds)
hung         a second login's cluster has told its zones, and then stopped answering

In each of them new names of the healthy cluster's apps and foreign names are asked for, each once
and one after the other. The second login comes first in the order of precedence. Names of a zone
that both clusters claim are asked for too: VNet has to give the first one a moment there.
"""

import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_cluster import join_login, running_cluster
from bench_dns import latencies
from bench_figures import Aim, Compare, Figure, percentile
from bench_programs import Programs, wait_for
from bench_vnet import FORWARDED_ZONE, Vnet, start_upstream_dns, start_vnet

from demo.cluster.config import App, Cluster, ClusterFile, check_clusters
from ipc.messages import ClusterState

HEALTHY, OTHER = "healthy.test", "another.test"
SHARED_ZONE = "shared.test"
ADDRESSES = {HEALTHY: "127.0.1.1", OTHER: "127.0.1.2"}
# In each situation and round; a question of the shared zone takes a quarter of a second.
NAMES, SHARED_NAMES, FIRST_NAMES = 100, 16, 8
# So many that every proxy is asked for some of them.
OTHER_NAMES = 12
MAX_ROUNDS = 4
SETTLE_SECONDS, RETRY_SECONDS = 60.0, 0.5
OWN_AIM = Aim(Compare.RATIO, most=1.2)
FOREIGN_AIM = Aim(Compare.EXCESS, most=1)

_BESIDE = {
    "silent": "beside a cluster that never answered",
    "hung": "beside a cluster that stopped answering",
}
_KINDS = {"own": ("fresh name", OWN_AIM), "foreign": ("foreign name", FOREIGN_AIM)}

# "<situation> <kind>" -> milliseconds of each question.
Found = dict[str, list[float]]


def measure(directory: Path, rounds: int) -> list[Figure]:
    """Rounds of all situations."""
    names = _Names()
    found: Found = {}
    with _running(directory) as beds:
        for _ in range(min(rounds, MAX_ROUNDS)):
            for key, taken in _round(*beds, names):
                found.setdefault(key, []).extend(taken)
    return list(_figures(found))


class _Names:
    """Names that nobody has asked for yet."""

    def __init__(self) -> None:
        addresses = [app.public_addr for app in _healthy_apps()]
        self.own = iter([name for name in addresses if name.endswith(HEALTHY)])
        self.shared = iter([name for name in addresses if name.endswith(SHARED_ZONE)])
        self.other = iter([app.public_addr for app in _other_apps()])
        self.foreign = (f"foreign-{number}.{FORWARDED_ZONE}" for number in itertools.count())


def _healthy_apps() -> tuple[App, ...]:
    own = _apps("own", HEALTHY, MAX_ROUNDS * (3 * NAMES + FIRST_NAMES))
    return (*own, *_apps("shared", SHARED_ZONE, MAX_ROUNDS * 2 * SHARED_NAMES))


def _other_apps() -> tuple[App, ...]:
    return tuple(_apps("other", SHARED_ZONE, MAX_ROUNDS * OTHER_NAMES))


def _apps(label: str, zone: str, count: int) -> Iterator[App]:
    for number in range(count):
        name = f"{label}-{number:04d}"
        yield App(name=name, uri="tcp://127.0.0.1:9", public_addr=f"{name}.{zone}")


@contextlib.contextmanager
def _running(directory: Path) -> Iterator[tuple[Vnet, Path]]:
    """A VNet that is logged in to the healthy cluster, and the home of the other's login."""
    home, other_home = directory / "tsh", directory / "other-tsh"
    with Programs(directory) as started:
        proxies = {_host(name): address for name, address in ADDRESSES.items()}
        start_upstream_dns(started, directory, proxies)
        with (
            running_cluster(_cluster(HEALTHY, _healthy_apps()), home, ADDRESSES),
            running_cluster(_cluster(OTHER, _other_apps()), other_home, ADDRESSES),
        ):
            authorities = directory / "web-ca.pem"
            authorities.write_bytes(
                b"".join((path / "web-ca.pem").read_bytes() for path in (home, other_home))
            )
            yield start_vnet(started, directory, authorities), other_home


def _host(cluster: str) -> str:
    return f"teleport.{cluster}"


def _cluster(name: str, apps: tuple[App, ...]) -> ClusterFile:
    cluster = Cluster(
        name=name,
        proxy_addr=f"{_host(name)}:443",
        custom_dns_zones=(name, SHARED_ZONE),
        apps=apps,
    )
    return check_clusters(ClusterFile(clusters=(cluster,)))


def _round(vnet: Vnet, other_home: Path, names: _Names) -> Iterator[tuple[str, list[float]]]:
    yield from _situation("alone", vnet, names)
    faults = other_home / "faults"
    _hang(faults)
    with _second_login(vnet, other_home):
        yield from _first_moment(vnet, names)
        wait_for(lambda: _is_given_up(vnet), "the other cluster answers", SETTLE_SECONDS)
        yield from _situation("silent", vnet, names)
        faults.unlink()
        unasked = list(itertools.islice(names.other, OTHER_NAMES))
        wait_for(lambda: _know(vnet, unasked), "the other cluster does not answer", SETTLE_SECONDS)
        _hang(faults)
        yield from _situation("hung", vnet, names)
        faults.unlink()


def _situation(situation: str, vnet: Vnet, names: _Names) -> Iterator[tuple[str, list[float]]]:
    asked = [("own", names.own, NAMES), ("foreign", names.foreign, NAMES)]
    if situation != "silent":  # of which VNet does not know the zones
        asked.append(("shared", names.shared, SHARED_NAMES))
    for kind, unasked, count in asked:
        taken = latencies(vnet.dns_address, list(itertools.islice(unasked, count)))
        yield f"{situation} {kind}", taken


def _first_moment(vnet: Vnet, names: _Names) -> Iterator[tuple[str, list[float]]]:
    """The names that are asked for as soon as VNet has seen the new login."""
    own, foreign = (
        list(itertools.islice(kind, FIRST_NAMES)) for kind in (names.own, names.foreign)
    )
    with ThreadPoolExecutor() as pool:
        asked = {
            kind: pool.submit(latencies, vnet.dns_address, these)
            for kind, these in (("own", own), ("foreign", foreign))
        }
        for kind, taken in asked.items():
            yield f"first {kind}", taken.result()


def _hang(faults: Path) -> None:
    """From the next moment on the other cluster answers nothing."""
    faults.write_text("hang\n")


@contextlib.contextmanager
def _second_login(vnet: Vnet, other_home: Path) -> Iterator[None]:
    """A login to the other cluster, which VNet has seen when the block begins."""
    host = _host(OTHER)
    join_login(vnet.home, other_home, host)
    wait_for(lambda: _other(vnet) is not None, "the login is not seen", SETTLE_SECONDS)
    try:
        yield
    finally:
        (vnet.home / f"{host}.yaml").unlink()
        shutil.rmtree(vnet.home / "keys" / host)
        wait_for(lambda: _other(vnet) is None, "the logout is not seen", SETTLE_SECONDS)


def _other(vnet: Vnet) -> ClusterState | None:
    states = {cluster.name: cluster.state for cluster in vnet.status().clusters or ()}
    return states.get(OTHER)


def _is_given_up(vnet: Vnet) -> bool:
    return _other(vnet) is ClusterState.UNREACHABLE


def _know(vnet: Vnet, names: list[str]) -> bool:
    """Whether the proxies know these names, and with them the zone they are in."""
    try:
        latencies(vnet.dns_address, names)
    except RuntimeError:
        time.sleep(RETRY_SECONDS)
        return False
    return True


def _figures(found: Found) -> Iterator[Figure]:
    for situation, beside in _BESIDE.items():
        for kind, (label, aim) in _KINDS.items():
            for percent in (50, 99):
                yield _figure(
                    f"{label} p{percent}, {beside}",
                    percentile(found[f"{situation} {kind}"], percent),
                    percentile(found[f"alone {kind}"], percent),
                    aim if percent == 50 else None,
                )
    yield _figure(
        "  in a zone that both claim, p50",
        percentile(found["hung shared"], 50),
        percentile(found["alone shared"], 50),
    )
    for kind, (label, _) in _KINDS.items():
        yield _figure(
            f"  slowest {label} right after a login to a silent cluster",
            max(found[f"first {kind}"]),
            percentile(found[f"alone {kind}"], 50),
        )


def _figure(name: str, value: float, alone: float, aim: Aim | None = None) -> Figure:
    return Figure(name, "ms", value, alone, "alone", aim)

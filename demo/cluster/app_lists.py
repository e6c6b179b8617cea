"""Apps beside the cluster file's: generated ones, and those of the apps file.

The apps file has the `[[apps]]` tables of the cluster file, each with a `cluster` key. While it is
there it replaces the apps of every cluster it names; `clusters = ["..."]` at its top names
clusters that may be left without an app. Parsing is pure; the watcher is a loop around it.
"""

import asyncio
import logging
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from demo.cluster.config import BUILTIN_SUFFIX, App, Cluster, ClusterFile, check_clusters
from demo.cluster.errors import ClusterFileError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
_MAX_FILE_BYTES = 4 * 1024 * 1024

Apps = Mapping[str, tuple[App, ...]]


class _AppsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    clusters: tuple[str, ...] = ()
    apps: tuple[dict[str, Any], ...] = ()


def generated_apps(cluster: Cluster) -> tuple[App, ...]:
    """`app-00000`, `app-00001`, ... in the cluster's first zone, each an echo of its own."""
    zone = cluster.custom_dns_zones[0] if cluster.custom_dns_zones else cluster.proxy_host
    uri = f"tcp://echo{BUILTIN_SUFFIX}:7"
    return tuple(
        App(name=f"app-{number:05d}", uri=uri, public_addr=f"app-{number:05d}.{zone}")
        for number in range(cluster.generated_apps)
    )


def parse_apps(text: str, clusters: ClusterFile) -> Apps:
    """The apps of every cluster, by name; `clusters` has those of clusters `text` does not name.

    Raises:
        ClusterFileError: and nothing else; the message names the key.
    """
    try:
        file = msgspec.convert(tomllib.loads(text), _AppsFile, strict=True)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ClusterFileError(str(error)) from error
    known = {cluster.name for cluster in clusters.clusters}
    given: dict[str, list[App]] = {name: [] for name in file.clusters}
    for index, table in enumerate(file.apps):
        name = table.get("cluster")
        fields = {key: value for key, value in table.items() if key != "cluster"}
        try:
            app = msgspec.convert(fields, App, strict=True)
        except msgspec.ValidationError as error:
            raise ClusterFileError(f"apps[{index}]: {error}") from error
        if not isinstance(name, str):
            raise ClusterFileError(f"apps[{index}].cluster: name the cluster of this app")
        given.setdefault(name, []).append(app)
    for name in given:
        if name not in known:
            raise ClusterFileError(f"cluster {name!r} is none of the cluster file")
    replaced = tuple(
        msgspec.structs.replace(cluster, apps=tuple(given[cluster.name]))
        if cluster.name in given
        else cluster
        for cluster in clusters.clusters
    )
    checked = check_clusters(ClusterFile(clusters=replaced))
    return {cluster.name: cluster.apps for cluster in checked.clusters}


async def watch_apps(path: Path, clusters: ClusterFile, apply: Callable[[Apps], None]) -> None:
    """Calls `apply` whenever the file changes, for ever. No file means the cluster file's apps.

    A file that cannot be read as one is logged once and changes nothing.
    """
    current = b""
    while True:
        found = _read(path)
        if found != current:
            current = found
            try:
                apps = parse_apps(found.decode("utf-8", "replace"), clusters)
            except ClusterFileError as error:
                logger.warning("%s: %s", path, error)
            else:
                apply(apps)
        await asyncio.sleep(POLL_SECONDS)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except OSError:
        return b""

"""What can be reached, in all clusters of a tsh home: `vnet ls`. Needs no running VNet."""

from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path

from workers.proxy.every_cluster import AskedCluster, Connect, Survey, ask_every_cluster
from workers.proxy.resource_rows import MAX_ROWS, RESOURCE_TYPES, Kind, Listing, Rows
from workers.proxy.teleport.errors import RefusedError

MAX_NAMED_CLUSTERS = 10


class NoSuchClusterError(Exception):
    """No login leads to a cluster of this name. The text says which there are."""


def require_cluster(name: str, survey: Survey) -> None:
    """Raises NoSuchClusterError if `name` is no cluster's, as far as all could be asked."""
    if not name or name in survey.clusters or survey.problems:
        return
    known = sorted(survey.clusters)
    more = len(known) - MAX_NAMED_CLUSTERS
    shown = ", ".join(known[:MAX_NAMED_CLUSTERS]) + (f" and {more} more" if more > 0 else "")
    raise NoSuchClusterError(f"no cluster {name!r}: your logins lead to {shown}")


async def list_resources(
    directory: Path,
    connect: Connect,
    now: datetime,
    *,
    kinds: Collection[Kind] = tuple(Kind),
    cluster: str = "",
    words: Sequence[str] = (),
    max_rows: int = MAX_ROWS,
) -> Listing:
    """All resources of these kinds that contain all words, without case; of one cluster if named.

    Pages are taken as they come: only the rows are in memory.

    Raises:
        NoSuchClusterError: there is no such cluster.
    """
    rows = Rows(words, max_rows)

    async def ask(asked: AskedCluster) -> None:
        for kind in kinds:
            try:
                if not await _collect(asked, kind, words, rows):
                    asked.note(f"more than {max_rows} resources: name some with --search")
                    return
            except RefusedError as error:
                asked.note(f"{RESOURCE_TYPES[kind]}: {error}")

    survey = await ask_every_cluster(directory, connect, now, ask, only=cluster)
    require_cluster(cluster, survey)
    return Listing(resources=rows.sorted(), problems=survey.problems)


async def _collect(asked: AskedCluster, kind: Kind, words: Sequence[str], rows: Rows) -> bool:
    """Whether there was room for all."""
    async for resource in asked.api.resources(RESOURCE_TYPES[kind], search=words):
        if not rows.add(resource, asked.place):
            return False
    return True

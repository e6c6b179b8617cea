"""What clusters said last, on disk, so that their ranges are known before they can be asked.

Without it the names of a cluster that sets a range of its own could not be reached after a start
with the cluster down. The file is the supervisor's alone: no worker can write it.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ipc.messages import Cluster

MAX_BYTES = 16 * 1024 * 1024


class ClusterMemory:
    """One file. Losing it costs nothing but the above, so nothing here raises."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: bytes | None = None

    def read(self) -> list[Cluster]:
        """What was kept last; empty when there is no such file or it cannot be used."""
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                return []
            return msgspec.json.decode(data, type=list[Cluster])
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
            return []

    def write(self, clusters: Sequence[Cluster]) -> None:
        """Keeps these clusters, as far as they have been asked themselves."""
        data = msgspec.json.encode(
            # What changes by the minute is of no use later and would be written each time.
            [
                msgspec.structs.replace(cluster, problem="", expires=None)
                for cluster in clusters
                if cluster.is_configured
            ]
        )
        if data == self._written or len(data) > MAX_BYTES:
            return
        temporary = self._path.with_name(f".{self._path.name}.new")
        with contextlib.suppress(OSError):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            temporary.replace(self._path)
            self._written = data

"""Notices that a path leads to something else than when the Landlock rule for it was made."""

import os
from collections.abc import Sequence
from pathlib import Path

from supervisor.confinement.landlock_rules import FileRule


class Awaited:
    """The awaited paths of a worker, as they were when it was confined."""

    def __init__(self, rules: Sequence[FileRule]) -> None:
        self._seen = {rule.path: _identity(rule.path) for rule in rules if rule.is_awaited}

    def __len__(self) -> int:
        return len(self._seen)

    def what_is_new(self) -> Path | None:
        """A path that now leads to a file this process was given no rule for. May block (NFS)."""
        for path, before in self._seen.items():
            now = _identity(path)
            # One that has gone: there is nothing to be read.
            if now is not None and now != before:
                return path
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  # as plain as what it is compared with
    except OSError:
        return None
    # A number is not given out again while a rule holds the file.
    return found.st_dev, found.st_ino

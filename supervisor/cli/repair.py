"""`vnet repair`: undoes what a VNet that died has left in the operating system's settings."""

import os
import sys
from pathlib import Path

from supervisor.exits import ExitStatus
from supervisor.osconfig import macos_resolver
from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.journal import InUseError, Journal, Outcome, Undone
from supervisor.osconfig.os_settings import undo_calls


class RepairError(Exception):
    """Nothing can be repaired; the text is one line."""

    def __init__(self, status: ExitStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


def repair(state_dir: Path) -> ExitStatus:
    """Says what was undone and what was left, and why.

    Returns OK, DEGRADED if something was left as it is, INTERNAL if something could not be undone.

    Raises:
        RepairError: a right is missing, or a VNet runs.
    """
    if os.geteuid() != 0:
        raise RepairError(ExitStatus.NOT_PERMITTED, "only root may do this: use sudo")
    outcomes = _undo(state_dir) if state_dir.is_dir() else []
    if sys.platform == "darwin":
        removed = macos_resolver.remove_own(macos_resolver.DIRECTORY)
        outcomes += [Undone(Outcome.UNDONE, f"{path} is removed.") for path in removed]
    for undone in outcomes:
        print(f"{undone.outcome}: {undone.text}")
    if not outcomes:
        print("there is nothing to undo")
    found = {undone.outcome for undone in outcomes}
    if Outcome.FAILED in found:
        return ExitStatus.INTERNAL
    return ExitStatus.DEGRADED if Outcome.LEFT in found else ExitStatus.OK


def _undo(state_dir: Path) -> list[Undone]:
    try:
        journal = Journal(state_dir, undo_calls())
    except InUseError as error:
        raise RepairError(
            ExitStatus.CONFLICT, f"{error}, which undoes its own changes: stop it first (vnet stop)"
        ) from error
    except OSError as error:
        raise RepairError(
            ExitStatus.NOT_PERMITTED, f"{state_dir} cannot be used ({error.strerror}): use sudo"
        ) from error
    try:
        return journal.undo()
    except (OSError, OsConfigError) as error:
        raise RepairError(ExitStatus.INTERNAL, f"{state_dir} cannot be used: {error}") from error
    finally:
        journal.close()

"""What `vnet log-level --next-start` leaves for the next start, in the state directory."""

import contextlib
from pathlib import Path

from supervisor.log_book import LEVELS

_FILE = "next-log-level"


def keep_log_level(state_dir: Path, level: str) -> None:
    """The next start takes `level`. Raises OSError."""
    path = state_dir / _FILE
    temporary = path.with_suffix(".new")
    temporary.write_text(f"{level}\n")
    temporary.replace(path)


def log_level(state_dir: Path) -> str | None:
    """The level that was left for this start, or None."""
    try:
        with (state_dir / _FILE).open(encoding="ascii") as file:
            text = file.read(32).strip()
    except (OSError, ValueError):
        return None
    return text if text in LEVELS else None


def forget_log_level(state_dir: Path) -> None:
    """This start has taken it; the one after it does not."""
    with contextlib.suppress(OSError):
        (state_dir / _FILE).unlink(missing_ok=True)

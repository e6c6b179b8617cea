"""The fault file: one fault per line, taken over while the cluster runs.

Parsing is pure; the watcher is a loop around it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

# Half of the 100 ms in which a change has to take effect.
POLL_SECONDS = 0.05
_MAX_FILE_BYTES = 64 * 1024

_SWITCHES = frozenset(
    {"auth_down", "proxy_down", "refuse_certs", "close_apps", "expire_login"},
)


@dataclass(frozen=True, slots=True)
class Faults:
    """Which faults are on. `slow_list_seconds` delays each listing."""

    auth_down: bool = False
    proxy_down: bool = False
    refuse_certs: bool = False
    close_apps: bool = False
    expire_login: bool = False
    slow_list_seconds: float = 0.0
    leaf_offline: frozenset[str] = frozenset()


NO_FAULTS = Faults()


def parse_faults(text: str) -> tuple[Faults, tuple[str, ...]]:
    """The faults in `text`, and the lines that are none. Empty lines and `#` comments are skipped."""
    switches: dict[str, bool] = {}
    slow_list_seconds = 0.0
    leaf_offline: set[str] = set()
    unknown: list[str] = []
    for line in text.splitlines():
        match line.partition("#")[0].split():
            case []:
                continue
            case [name] if name in _SWITCHES:
                switches[name] = True
            case ["slow_list", seconds] if (delay := _seconds(seconds)) is not None:
                slow_list_seconds = delay
            case ["leaf_offline", name]:
                leaf_offline.add(name)
            case _:
                unknown.append(line.strip())
    faults = Faults(
        slow_list_seconds=slow_list_seconds, leaf_offline=frozenset(leaf_offline), **switches
    )
    return faults, tuple(unknown)


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 3600 else None


async def watch_faults(path: Path, apply: Callable[[Faults], Awaitable[None]]) -> None:
    """Calls `apply` whenever the faults in `path` change, for ever. No file means no faults."""
    current, logged = NO_FAULTS, frozenset[str]()
    while True:
        faults, unknown = parse_faults(_read(path))
        for line in frozenset(unknown) - logged:
            logger.warning("%s: %r is no fault this cluster knows", path, line)
        logged = frozenset(unknown)
        if faults != current:
            try:
                await apply(faults)
            except OSError as error:
                # Tried again at the next look: a port may be taken for a moment.
                logger.warning("faults cannot be taken over: %s", error)
            else:
                logger.info("faults are now %s", faults)
                current = faults
        await asyncio.sleep(POLL_SECONDS)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""

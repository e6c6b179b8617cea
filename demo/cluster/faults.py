"""The fault file: one fault per line, taken over while the cluster runs.

Parsing is pure; the watcher is a loop around it.
"""

import asyncio
import dataclasses
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Half of the 100 ms in which a change has to take effect.
POLL_SECONDS = 0.05
_MAX_FILE_BYTES = 64 * 1024

TAKEN_SUFFIX = ".taken"

# A user's name becomes a file name in the tsh home.
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._+-]{0,63}", re.ASCII)
_MAX_CLOCK_SECONDS = 10 * 365 * 86400

# What can be wrong with the host certificates of SSH nodes; `plain_key`: there is none.
HOST_CERTIFICATE_FAULTS = frozenset(
    {"expired", "not_yet_valid", "wrong_principal", "wrong_ca", "user_type", "plain_key"}
)


@dataclass(frozen=True, slots=True)
class Faults:
    """Which faults are on. The user's documentation says what each does.

    `slow_list_seconds` delays each listing, `clock_seconds` is how far the clusters' clocks are
    ahead, `deny` is the text GenerateUserCerts refuses with, `other_user` who is logged in,
    `host_certificate` what is wrong with those of SSH nodes.
    """

    auth_down: bool = False
    proxy_down: bool = False
    refuse_certs: bool = False
    close_apps: bool = False
    expire_login: bool = False
    logout: bool = False
    unavailable: bool = False
    hang: bool = False
    mfa_refused: bool = False
    rotate_ca: bool = False
    no_vnet_config: bool = False
    slow_list_seconds: float = 0.0
    clock_seconds: float = 0.0
    deny: str = ""
    other_user: str = ""
    host_certificate: str = ""
    node_offline: frozenset[str] = frozenset()
    leaf_offline: frozenset[str] = frozenset()


_SWITCHES = frozenset(
    spec.name for spec in dataclasses.fields(Faults) if isinstance(spec.default, bool)
)


NO_FAULTS = Faults()


def parse_faults(text: str) -> tuple[Faults, tuple[str, ...]]:
    """The faults in `text`, and the lines that are none. Empty lines and `#` comments are skipped."""
    faults = NO_FAULTS
    unknown: list[str] = []
    for line in text.splitlines():
        content = line.partition("#")[0].strip()
        changed = _with_fault(faults, content) if content else faults
        if changed is None:
            unknown.append(line.strip())
        else:
            faults = changed
    return faults, tuple(unknown)


def _with_fault(faults: Faults, line: str) -> Faults | None:
    match line.split():
        case [name] if name in _SWITCHES:
            switched: dict[str, Any] = {name: True}
            return replace(faults, **switched)
        case ["slow_list", text] if (seconds := _number(text, 0, 3600)) is not None:
            return replace(faults, slow_list_seconds=seconds)
        case ["clock", text] if (
            seconds := _number(text, -_MAX_CLOCK_SECONDS, _MAX_CLOCK_SECONDS)
        ) is not None:
            return replace(faults, clock_seconds=seconds)
        case ["leaf_offline", name]:
            return replace(faults, leaf_offline=faults.leaf_offline | {name})
        case ["node_offline", name]:
            return replace(faults, node_offline=faults.node_offline | {name})
        case ["host_certificate", kind] if kind in HOST_CERTIFICATE_FAULTS:
            return replace(faults, host_certificate=kind)
        case ["other_user", name] if _USER.fullmatch(name):
            return replace(faults, other_user=name)
        case ["deny", _, *_]:
            return replace(faults, deny=line.removeprefix("deny").strip())
    return None


def _number(text: str, lowest: float, highest: float) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if lowest <= value <= highest else None


async def watch_faults(path: Path, apply: Callable[[Faults], Awaitable[None]]) -> None:
    """Calls `apply` whenever the faults in `path` change, for ever. No file means no faults.

    What was taken over last is in the file of the same name with the suffix TAKEN_SUFFIX.
    """
    current, taken, logged = NO_FAULTS, "", frozenset[str]()
    shown = path.with_suffix(TAKEN_SUFFIX)
    shown.unlink(missing_ok=True)  # of a cluster that has ended
    while True:
        text = _read(path)
        faults, unknown = parse_faults(text)
        for line in frozenset(unknown) - logged:
            logger.warning("%s: %r is no fault this cluster knows", path, line)
        logged = frozenset(unknown)
        try:
            if faults != current:
                await apply(faults)
                logger.info("faults are now %s", faults)
                current = faults
            if text != taken:
                shown.write_text(text)
                taken = text
        except OSError as error:
            # Tried again at the next look: a port may be taken for a moment.
            logger.warning("faults cannot be taken over: %s", error)
        await asyncio.sleep(POLL_SECONDS)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""

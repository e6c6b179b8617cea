"""What the shell offers after TAB: names of workers, apps and profiles, of which VNet or the clusters know.

Whatever goes wrong, nothing is offered and nothing is said. Only plain words are: a shell evaluates what it gets.
"""

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

# A prompt that waits longer is a nuisance.
ANSWER_SECONDS = 0.5
LIST_SECONDS = 3.0
MAX_WORDS = 500

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_LEVELS = ("debug", "info", "warning", "error")
_KINDS = ("app", "db", "node")


def levels(incomplete: str) -> list[str]:
    """Log levels."""
    return _beginning(incomplete, _LEVELS)


def kinds(incomplete: str) -> list[str]:
    """What `vnet ls` lists."""
    return _beginning(incomplete, _KINDS)


def workers(incomplete: str) -> list[str]:
    """What `vnet restart` takes."""
    return _beginning(incomplete, [*_workers(), "all"])


def speakers(incomplete: str) -> list[str]:
    """Whose lines are in the log."""
    return _beginning(incomplete, ["supervisor", *_workers()])


def profiles(incomplete: str) -> list[str]:
    """Proxies of the tsh home."""
    from supervisor.cli.teleport_access import CommandError, find_access  # noqa: PLC0415  # only after TAB

    with contextlib.suppress(OSError, CommandError):
        home = find_access(None, os.environ).home
        return _beginning(incomplete, (path.stem for path in home.glob("*.yaml")))
    return []


def apps(incomplete: str) -> list[str]:
    """Apps and databases, as their clusters list them within `LIST_SECONDS`."""
    with contextlib.suppress(Exception):  # a shell that waits for words wants no reasons
        return _beginning(incomplete, _apps())
    return []


def _workers() -> list[str]:
    from supervisor import control_messages as cm  # noqa: PLC0415  # only after TAB
    from supervisor import settings  # noqa: PLC0415
    from supervisor.cli.control_client import AskError, ask_status  # noqa: PLC0415

    with contextlib.suppress(AskError):
        where = settings.run_dir(_named_run_dir(), os.environ)
        found, _ = ask_status(where, cm.Status(), ANSWER_SECONDS)
        # One that is replaced has two processes of its name.
        return list(dict.fromkeys(worker.name for worker in found.workers or ()))
    return []


def _named_run_dir() -> Path | None:
    """Of the line that is typed; bash gives its words, the others the whole line."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    named = re.search(r"--run-dir[=\s]\s*(\S+)\s", line)
    return Path(named[1]) if named else None


def _apps() -> list[str]:
    import asyncio  # noqa: PLC0415  # only after TAB
    from datetime import UTC, datetime  # noqa: PLC0415

    from supervisor.cli.teleport_access import find_access, run  # noqa: PLC0415
    from workers.proxy.listing import list_resources  # noqa: PLC0415
    from workers.proxy.resource_rows import Kind  # noqa: PLC0415
    from workers.proxy.teleport.auth_client import Connector  # noqa: PLC0415

    access = find_access(None, os.environ)

    async def ask() -> list[str]:
        connect = Connector(
            ca_file=access.ca_file, insecure=access.insecure, environment=os.environ
        )
        async with asyncio.timeout(LIST_SECONDS):
            listing = await list_resources(
                access.home,
                connect,
                datetime.now(UTC),
                kinds=[Kind.APP, Kind.DATABASE],
                cluster="",
                words=[],
            )
        return [row.name for row in listing.resources]

    return run(ask)


def _beginning(incomplete: str, words: Iterable[str]) -> list[str]:
    found = [w for w in dict.fromkeys(words) if w.startswith(incomplete) and _WORD.fullmatch(w)]
    return found[:MAX_WORDS]

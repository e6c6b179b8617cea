"""Asks every proxy of a running VNet for its connections: see `ipc.connection_list`."""

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ipc import connection_list as c
from ipc.prompts import PROMPTS_DIRECTORY
from supervisor.cli.connection_report import Told
from supervisor.cli.control_client import TIMEOUT_SECONDS, AskError
from supervisor.exits import ExitStatus

# Proxies, and those that finish beside their successors.
MAX_SOURCES = 256


class _LostError(Exception):
    """A proxy has gone, has sent this command away, or talks nonsense."""


@dataclass(slots=True, eq=False)
class _Source:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    told: Told = field(default_factory=lambda: Told("", (), ()))
    revision: int | None = None

    async def look(self) -> bool:
        """Whether something is new. Raises _LostError."""
        targets: list[c.TargetTold] = []
        connections: list[c.ConnectionTold] = []
        try:
            self.writer.write(c.encode(c.Look(known=self.revision)))
            while True:
                match c.decode_from_proxy(await self.reader.readuntil(b"\n")):
                    case c.Unchanged():
                        return False
                    case c.TargetTold() as target:
                        targets.append(target)
                    case c.ConnectionTold() as connection:
                        connections.append(connection)
                    case c.Complete() as done:
                        break
                if max(len(targets), len(connections)) > c.MAX_LINES:
                    raise _LostError
        except (
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            msgspec.MsgspecError,
            OSError,
        ) as error:
            raise _LostError from error
        self.told = Told(done.slot, targets, connections)
        self.revision = done.revision
        return True


@dataclass(slots=True)
class Sources:
    """The proxies of the VNet in `run_dir`. `problems` are those of the last `look`, sentences."""

    run_dir: Path
    problems: list[str] = field(default_factory=list)
    looked_at: float = 0.0  # monotonic; when the last look began
    _open: dict[str, _Source] = field(default_factory=dict)
    _slots: dict[str, str] = field(default_factory=dict)  # of those that have answered once

    def __len__(self) -> int:
        """How many answer."""
        return len(self._open)

    @property
    def told(self) -> Sequence[Told]:
        """What each has told last."""
        return [source.told for source in self._open.values()]

    async def look(self, seconds: float = TIMEOUT_SECONDS, *, again: bool = False) -> bool:
        """Asks all, with `again` those alone that have answered. Takes `seconds` at most.

        Returns whether something is new.

        Raises:
            AskError: this user may not ask.
        """
        self.problems = []
        self.looked_at = time.monotonic()
        before = len(self._open)
        paths = [path for path in self._paths() if path in self._open or not again]
        for path in [path for path in self._open if path not in paths]:
            self._drop(path)
        self._slots = {path: slot for path, slot in self._slots.items() if path in paths}
        outcomes = await asyncio.gather(*(self._look_at(path, seconds) for path in paths))
        self.problems.sort()
        return any(outcomes) or before != len(self._open)

    async def _look_at(self, path: str, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                source = self._open.get(path)
                if source is None:
                    source = await _connected(path)
                    if source is None:
                        return False
                    self._open[path] = source
                is_new = await source.look()
                self._slots[path] = source.told.worker
                return is_new
        except _LostError:
            pass  # it is connected to again at the next look, if it is there
        except TimeoutError:
            slot = self._slots.get(path, "a proxy")
            self.problems.append(f"{slot} does not answer: vnet status may say why")
        self._drop(path)
        return False

    def _drop(self, path: str) -> None:
        source = self._open.pop(path, None)
        if source is not None:
            source.writer.transport.abort()

    def _paths(self) -> list[str]:
        directory = self.run_dir / PROMPTS_DIRECTORY
        try:
            with os.scandir(directory) as entries:
                found = sorted(e.path for e in entries if e.name.endswith(c.SOCKET_ENDING))
        except PermissionError as error:
            raise _not_permitted(directory) from error
        except OSError:
            return []
        return found[:MAX_SOURCES]

    async def close(self) -> None:
        """Ends the conversations."""
        writers = [source.writer for source in self._open.values()]
        self._open.clear()
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _connected(path: str) -> _Source | None:
    """None when nobody listens there (any more, or yet). Raises AskError."""
    try:
        return _Source(*await asyncio.open_unix_connection(path, limit=c.MAX_LINE_BYTES))
    except PermissionError as error:
        raise _not_permitted(Path(path)) from error
    except OSError:
        return None


def _not_permitted(path: Path) -> AskError:
    return AskError(
        ExitStatus.NOT_PERMITTED, f"{path} may not be opened: run as root or as the VNet user"
    )

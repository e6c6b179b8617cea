"""`vnet mfa`: answers prompts for second factors in the terminal, by code or security key.

Talks with every proxy over its socket in `<run dir>/mfa` (`ipc.prompts`); what is said and done is
decided in `mfa_dialog`.
"""

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, assert_never

import msgspec

from ipc import prompts as p
from supervisor import control_messages as cm
from supervisor.cli import mfa_dialog as d
from supervisor.cli.browser import open_page
from supervisor.cli.control_client import AskError, ask_status
from supervisor.cli.dialog_keys import DialogKeys, FromKey
from supervisor.cli.line_input import Line, LineInput
from supervisor.cli.orderly_run import run_in_order
from supervisor.exits import ExitStatus

# Proxies come and go; their sockets are looked for this often.
LOOK_SECONDS = 0.5
# A proxy alone is back sooner than that.
MISSED_LOOKS = 3
# A proxy that is being replaced is back by then.
START_SECONDS = 5.0
# 64 that are numbered, `ssh`, and one that finishes beside its successor.
MAX_PROXIES = 66


@dataclass(frozen=True, slots=True)
class _Heard:
    source: int
    message: p.FromProxy


@dataclass(frozen=True, slots=True)
class _Gone:
    source: int


@dataclass(frozen=True, slots=True)
class _Look:
    """Time to look for new proxies."""


_Event: TypeAlias = _Heard | _Gone | Line | _Look | FromKey


def run(run_dir: Path, *, watch: bool) -> ExitStatus:
    """Answers what waits; with `watch` also what comes, until Ctrl-C.

    Raises:
        AskError: VNet is not running, or does not listen to this user.
    """
    try:
        # A terminal that hides what is typed must not stay like that.
        return run_in_order(_Mfa(run_dir / p.PROMPTS_DIRECTORY, watch=watch).run())
    except KeyboardInterrupt:
        print()
        return ExitStatus.OK


class _Mfa:
    def __init__(self, directory: Path, *, watch: bool) -> None:
        self._directory = directory
        self._is_watching = watch
        self._dialog = d.Dialog()
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        # By the number of the socket's file, which it keeps when a proxy steps aside.
        self._connections: dict[int, _Connection] = {}
        self._numbers = iter(range(sys.maxsize))
        self._was_heard = False
        self._missed_looks = 0
        self._has_told_of_restart = False
        self._input = LineInput(self._put)
        self._keys = DialogKeys(self._put)

    async def run(self) -> ExitStatus:
        self._loop = asyncio.get_running_loop()
        looking: asyncio.Task[None] | None = None
        try:
            await self._connect_first()
            if self._is_watching:
                looking = asyncio.create_task(self._look_again())
                print("waiting for prompts; Ctrl-C ends", flush=True)
            while self._is_watching or not self._dialog.is_done:
                event = await self._events.get()
                if event == Line(None) and self._input.is_terminal:
                    print()
                    return ExitStatus.OK  # Ctrl-D
                await self._take(event)
            return self._outcome()
        finally:
            if looking is not None:
                looking.cancel()
            self._keys.drop()
            self._input.close()
            for connection in self._connections.values():
                connection.close()

    def _outcome(self) -> ExitStatus:
        if not self._dialog.has_shown:
            print("no prompt is waiting")
        if self._dialog.unanswered and self._input.has_ended:
            print(f"{self._dialog.unanswered} still waiting: no code was left on standard input")
            return ExitStatus.DEGRADED
        return ExitStatus.OK

    # -- proxies --

    async def _connect_first(self) -> None:
        """Connects to the proxies that are there, or finds out why there is none."""
        deadline = self._loop.time() + START_SECONDS
        while not await self._connect_new():
            ask_status(self._directory.parent, cm.Status())
            if self._loop.time() >= deadline:
                raise AskError(
                    ExitStatus.DEGRADED, "no proxy is running: vnet status says what is wrong"
                )
            await asyncio.sleep(LOOK_SECONDS)

    async def _connect_new(self) -> bool:
        """Connects to what it is not connected to; whether there is any connection."""
        for inode, path in self._sockets():
            if inode in self._connections:
                continue
            try:
                reader, writer = await asyncio.open_unix_connection(path, limit=p.MAX_LINE_BYTES)
            except PermissionError as error:
                raise _not_permitted(path) from error
            except OSError:
                continue  # of a proxy that is gone, or not yet there
            source = next(self._numbers)
            task = self._loop.create_task(self._listen(source, inode, reader))
            self._connections[inode] = _Connection(source, writer, task)
            self._perform(self._dialog.connected(source))
        return bool(self._connections)

    def _sockets(self) -> list[tuple[int, str]]:
        try:
            with os.scandir(self._directory) as entries:
                found = [(e.inode(), e.path) for e in entries if e.name.endswith(".sock")]
        except PermissionError as error:
            raise _not_permitted(str(self._directory)) from error
        except OSError:
            return []
        return found[:MAX_PROXIES]

    async def _listen(self, source: int, inode: int, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = p.decode_from_proxy(await reader.readuntil(b"\n"))
                self._events.put_nowait(_Heard(source, message))
        except (
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            msgspec.MsgspecError,
            OSError,
        ):
            self._connections.pop(inode).close()
            self._events.put_nowait(_Gone(source))

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._events.put_nowait(_Look())

    # -- what happens --

    async def _take(self, event: _Event) -> None:
        match event:
            case _Heard(source, message):
                self._was_heard = True
                self._perform(self._dialog.heard(source, message))
            case _Gone(source):
                if not self._was_heard and not self._connections:
                    raise _not_heard()
                self._perform(self._dialog.gone(source))
            case Line(None):
                self._perform(self._dialog.end_of_input())
            case Line(str(text)):
                self._input.took(event)
                self._perform(self._dialog.line(text))
            case _Look():
                self._tell_of_restart(is_there=await self._connect_new())
            case FromKey():
                self._perform(self._keys.take(self._dialog, event))

    def _tell_of_restart(self, *, is_there: bool) -> None:
        """Once each: that nobody is there to listen to, and that somebody is again."""
        self._missed_looks = 0 if is_there else self._missed_looks + 1
        if self._missed_looks == MISSED_LOOKS:
            print("VNet is not running, or starts anew: waiting", flush=True)
            self._has_told_of_restart = True
        elif is_there and self._has_told_of_restart:
            self._has_told_of_restart = False
            print("VNet is there again; waiting for prompts", flush=True)

    def _perform(self, commands: list[d.Command]) -> None:
        for command in commands:
            match command:
                case d.Say(text):
                    print(text, flush=True)
                case d.AskLine(text, is_secret):
                    # First: whoever sees the question may type at once.
                    self._input.want(is_secret=is_secret)
                    print(text, end="", flush=True)
                case d.Send(source, message):
                    self._send(source, message)
                case d.UseKey(challenge):
                    self._keys.use(challenge)
                case d.DropKey():
                    self._keys.drop()
                case d.ShowPage(url):
                    open_page(url)
                case d.GivePin(pin):
                    self._keys.give_pin(pin)
                case _:
                    assert_never(command)

    def _send(self, source: int, message: p.FromUser) -> None:
        for connection in self._connections.values():
            if connection.source == source:
                connection.writer.write(p.encode(message))

    def _put(self, event: _Event) -> None:
        """Called in other threads."""
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


@dataclass(frozen=True, slots=True)
class _Connection:
    source: int
    writer: asyncio.StreamWriter
    task: "asyncio.Task[None]"

    def close(self) -> None:
        self.writer.close()
        if self.task is not asyncio.current_task():
            self.task.cancel()


def _not_heard() -> AskError:
    return AskError(
        ExitStatus.INTERNAL,
        "no proxy lets this command take part: end the other vnet mfa that are running, or see the"
        " log of VNet",
    )


def _not_permitted(path: str) -> AskError:
    return AskError(
        ExitStatus.NOT_PERMITTED, f"{path} may not be opened: run as root or as the VNet user"
    )

"""`vnet connections`: what connects, through what, how fast, and why not.

Asks the proxies themselves (`connection_sources`), so that a supervisor that is busy or replaced is not in the
way. Whose a connection is this process finds out on its own (`socket_owners`): the proxies may look neither at
other processes nor at sockets.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from ipc.connection_list import LIVE, ConnectionState
from supervisor import control_messages as cm
from supervisor.cli import connection_view as view
from supervisor.cli.connection_report import ConnectionList, Told, ends_of, merge
from supervisor.cli.connection_sources import Sources
from supervisor.cli.control_client import TIMEOUT_SECONDS, AskError, ask_status
from supervisor.cli.orderly_run import run_in_order
from supervisor.cli.screen import Screen, has_colour, is_terminal, width_of
from supervisor.cli.socket_owners import MAX_QUESTIONS, SocketOwner, owners
from supervisor.exits import ExitStatus

WATCH_SECONDS = 1.0
# A proxy that starts just now is waited for so long, and looked for so often.
START_SECONDS = 1.0
STEP_SECONDS = 0.1
# Whose a connection is is found out at once, or a moment later, or not: a container's, for example.
MAX_TRIES = 3


def run(run_dir: Path, *, watch: bool, as_json: bool) -> ExitStatus:
    """Prints the connections; with `watch` again when they have changed, until Ctrl-C.

    Raises:
        AskError: VNet is not running, does not answer, or not this user.
    """
    command = _Connections(run_dir, as_json=as_json)
    # Without a terminal there is nothing to put right, and the kernel ends this process also while a
    # reader does not read.
    is_in_order = watch and not as_json and is_terminal(sys.stdout)
    live = run_in_order if is_in_order else asyncio.run
    try:
        return live(command.watch() if watch else command.show())
    except KeyboardInterrupt:
        return ExitStatus.OK


class _Connections:
    def __init__(self, run_dir: Path, *, as_json: bool) -> None:
        self._sources = Sources(run_dir)
        self._run_dir = run_dir
        self._as_json = as_json
        self._owners = _Owners()

    async def show(self) -> ExitStatus:
        """Once."""
        sources = self._sources
        try:
            await self._find()
            problems = list(sources.problems)
            if any(_lacks_rates(told) for told in sources.told):
                # A rate takes two looks, a second apart. Perhaps one has kept the others waiting, which is
                # not waited for again.
                await asyncio.sleep(sources.looked_at + WATCH_SECONDS - time.monotonic())
                await sources.look(again=True)
                problems += sources.problems
            found = self._report(problems)
        finally:
            await sources.close()
        if self._as_json:
            _print_json(found)
        else:
            print("\n".join(_lines(found)), flush=True)
        for problem in problems:
            print(f"vnet: {problem}", file=sys.stderr)
        return ExitStatus.DEGRADED if problems else ExitStatus.OK

    async def watch(self) -> ExitStatus:
        """Until Ctrl-C; a restart of VNet is part of what is watched."""
        sources = self._sources
        try:
            await self._find()
            with Screen(
                "vnet connections", is_for_people=not self._as_json, minds_signals=False
            ) as screen:
                await self._watch(screen)
        finally:
            await sources.close()

    async def _watch(self, screen: Screen) -> NoReturn:
        sources = self._sources
        is_new, said = True, list(sources.problems)
        while True:
            self._show_again(screen, self._report(said), is_new=is_new)
            for step in screen.steps(WATCH_SECONDS):
                await asyncio.sleep(step)
            before = said
            is_new = await sources.look()
            said = sources.problems if len(sources) else [_why_nobody_answers(sources)]
            is_new = is_new or said != before

    async def _find(self) -> None:
        """Returns when a proxy has answered. Raises AskError."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            await self._sources.look()
            if len(self._sources):
                return
            if self._sources.problems:
                raise AskError(
                    ExitStatus.INTERNAL,
                    f"no proxy answered within {TIMEOUT_SECONDS:g} s: vnet status may say why",
                )
            ask_status(self._run_dir, cm.Status())
            if time.monotonic() >= deadline:
                raise AskError(ExitStatus.DEGRADED, _NOBODY)
            await asyncio.sleep(STEP_SECONDS)

    def _report(self, problems: Sequence[str]) -> ConnectionList:
        told = self._sources.told
        return merge(told, self._owners.of(told), problems)

    def _show_again(self, screen: Screen, found: ConnectionList, *, is_new: bool) -> None:
        if self._as_json:
            if is_new:
                _print_json(found)
        elif is_new or screen.is_in_place:
            width = width_of(sys.stdout)
            problems = [line for text in found.problems for line in view.sentence(text, width)]
            screen.show([*problems, *_lines(found)])


_NOBODY = "no proxy tells of its connections: end other vnet connections that are running, or see vnet status"


def _why_nobody_answers(sources: Sources) -> str:
    """A sentence. Raises AskError: this user may not ask."""
    if sources.problems:
        return sources.problems[0]
    try:
        ask_status(sources.run_dir, cm.Status())
    except AskError as error:
        if error.status is ExitStatus.NOT_PERMITTED:
            raise
        return f"{error}; waiting"
    return _NOBODY


class _Owners:
    """Whose the connections are; remembered for those that end while they are watched."""

    def __init__(self) -> None:
        self._known: dict[str, SocketOwner] = {}
        self._tries: dict[str, int] = {}

    def of(self, told: Sequence[Told]) -> dict[str, SocketOwner]:
        """By the id of the connection."""
        ids = {connection.id for proxy in told for connection in proxy.connections}
        self._known = {key: owner for key, owner in self._known.items() if key in ids}
        self._tries = {key: tries for key, tries in self._tries.items() if key in ids}
        asked = {
            connection.id: ends_of(connection)
            for proxy in told
            for connection in proxy.connections
            if connection.state in LIVE and self._tries.get(connection.id, 0) < MAX_TRIES
        }
        # The newest: those that were asked for in vain are asked for no more, and make room.
        asked = dict(list(asked.items())[-MAX_QUESTIONS:])
        found = owners(asked.values())
        for key, ends in asked.items():
            owner = found.get(ends)
            if owner is not None:
                self._known[key] = owner
            is_settled = owner is not None and owner.pid is not None
            self._tries[key] = MAX_TRIES if is_settled else self._tries.get(key, 0) + 1
        return self._known


def _lacks_rates(told: Told) -> bool:
    return any(
        connection.state is ConnectionState.ACTIVE and connection.sent_per_second is None
        for connection in told.connections
    )


def _lines(found: ConnectionList) -> list[str]:
    out = sys.stdout
    return view.lines(found, width_of(out), time.time(), has_colour=has_colour(out))


def _print_json(found: ConnectionList) -> None:
    print(msgspec.json.encode(found).decode(), flush=True)

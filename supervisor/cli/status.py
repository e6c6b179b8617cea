"""`vnet status`: once, until it is healthy, or again and again."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from supervisor import control_messages as cm
from supervisor.cli import status_view
from supervisor.cli.control_client import AskError, ask_status
from supervisor.cli.screen import Screen, has_colour, width_of
from supervisor.exits import ExitStatus
from supervisor.status import EXIT_OF_HEALTH, Health, Status, Summary

WATCH_SECONDS = 1.0
WAIT_STEP_SECONDS = 0.1
# With the start of Python before it the whole command takes 2 s at most.
ANSWER_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line says. `wait` is in seconds."""

    as_json: bool = False
    wait: float = 0.0
    run_dir: Path | None = None


def plain_wish(arguments: Sequence[str]) -> Wish | None:
    """What `vnet status` with these arguments means; None if it takes more than a look to say so.

    A health check runs often: without the parser of all commands it takes a third of the time.
    """
    as_json, run_dir = False, None
    rest = list(arguments)
    while rest:
        first = rest.pop(0)
        if first == "--json":
            as_json = True
        elif first == "--run-dir" and rest and not rest[0].startswith("-"):
            run_dir = Path(rest.pop(0))
        else:
            return None
    return Wish(as_json=as_json, run_dir=run_dir)


def show(run_dir: Path, *, wait: float, as_json: bool) -> ExitStatus:
    """Prints the status; with `wait` when it is healthy, or after so many seconds.

    Raises:
        AskError: there is none.
    """
    found, raw = (
        _healthy(run_dir, wait) if wait else ask_status(run_dir, cm.Status(), ANSWER_SECONDS)
    )
    _print(raw.decode().rstrip("\n") if as_json else "\n".join(_lines(found)))
    return EXIT_OF_HEALTH[found.health]


def _healthy(run_dir: Path, seconds: float) -> tuple[Status, bytes]:
    """The first healthy status, else what there is at the end. Raises AskError.

    Each answer may take as long as one that nobody waits for, the last one too: that a wait is nearly over
    makes a busy machine no faster.
    """
    from supervisor.cli.progress import Progress  # noqa: PLC0415  # a health check does without

    deadline = time.monotonic() + seconds
    with Progress("waiting until VNet is healthy"):
        while True:
            try:
                found = ask_status(run_dir, cm.Status(), ANSWER_SECONDS)
            except AskError:
                if time.monotonic() >= deadline:
                    raise
            else:
                if found[0].health is Health.HEALTHY or time.monotonic() >= deadline:
                    return found
            time.sleep(WAIT_STEP_SECONDS)


def watch(run_dir: Path, *, as_json: bool) -> NoReturn:
    """Shows it every second until Ctrl-C, over restarts of VNet as well."""
    try:
        if as_json:
            while True:
                _print(_json(run_dir))
                time.sleep(WATCH_SECONDS)
        with Screen("vnet status") as screen:
            while True:
                screen.show(_view(run_dir))
                screen.pause(WATCH_SECONDS)
    except KeyboardInterrupt:
        raise SystemExit(int(ExitStatus.OK)) from None


def _json(run_dir: Path) -> str:
    try:
        return ask_status(run_dir, cm.Status(), ANSWER_SECONDS)[1].decode().strip()
    except AskError as error:
        return msgspec.json.encode(_without_answer(error)).decode()


def _view(run_dir: Path) -> list[str]:
    try:
        found, _ = ask_status(run_dir, cm.Status(), ANSWER_SECONDS)
    except AskError as error:
        summary = _without_answer(error)
        found = Status(health=summary.health, reasons=summary.reasons)
    return _lines(found)


def _without_answer(error: AskError) -> Summary:
    """A restart of VNet is part of what is watched."""
    stopped = error.status is ExitStatus.NOT_RUNNING
    return Summary(
        health=Health.STOPPED if stopped else Health.DEGRADED,
        reasons=[f"{str(error)[:1].upper()}{str(error)[1:]}; waiting."],
    )


def _lines(found: Status) -> list[str]:
    out = sys.stdout
    return list(status_view.lines(found, width_of(out), has_colour=has_colour(out)))


def _print(text: str) -> None:
    print(text, flush=True)

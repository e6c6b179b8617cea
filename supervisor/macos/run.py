"""Runs the commands of `supervisor.macos.commands`, one after the other."""

import errno
import subprocess
from collections.abc import Callable
from typing import Final

from supervisor.macos.commands import ROUTE, Command
from supervisor.macos.output import route_error

# They ask the kernel only, and nobody else waits for the supervisor that long.
COMMAND_SECONDS: Final = 5.0

Run = Callable[[Command], str]


def run(command: Command) -> str:
    """Standard output of a command. Raises OSError: it has failed, or says that it has done nothing."""
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_SECONDS,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, f"{shown}: no end after {COMMAND_SECONDS:g} s") from error
    text = done.stdout.decode(errors="replace")
    if command[0] == ROUTE and (failure := route_error(text)) is not None:
        raise failure
    if done.returncode != 0:
        said = " ".join(text.split())[:300] or f"status {done.returncode}"
        raise OSError(errno.EIO, f"{shown}: {said}")
    return text

"""Output of the system's own programs, for the report: bounded in time and size."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import IO, Final

from supervisor.diag.model import AttemptStatus, CommandAttempt

SECONDS: Final = 4.0
MAX_BYTES: Final = 64 * 1024
# Not the caller's PATH: root runs them.
PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
ROUTES: Final = (("ip", "route", "show"), ("ip", "-6", "route", "show"), ("ip", "rule", "show"))
RESOLVER: Final = (("resolvectl", "status"),)


def find(program: str) -> str | None:
    """Where a program of the system is."""
    return shutil.which(program, path=PATH)


def run(arguments: Sequence[str]) -> CommandAttempt:
    """What the program writes to standard output, cut at MAX_BYTES; never raises."""
    command = " ".join(arguments)
    path = find(arguments[0])
    if path is None:
        error = f"{arguments[0]} is not installed"
        return CommandAttempt(status=AttemptStatus.ERROR, error=error, command=command, output="")
    # A bus of the caller's choice is asked by VNet as well.
    bus = "DBUS_SYSTEM_BUS_ADDRESS"
    environment = {"PATH": PATH, "LC_ALL": "C", "SYSTEMD_PAGER": "cat", "NO_COLOR": "1"}
    environment |= {bus: os.environ[bus]} if bus in os.environ else {}
    error = ""
    # Files have no reader that a full pipe could wait for.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            status = subprocess.run(
                [path, *arguments[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                timeout=SECONDS,
                check=False,
            ).returncode
            if status:
                error = f"exit status {status}\n{_head(errors)}".rstrip()
        except subprocess.TimeoutExpired:
            error = f"it was ended after {SECONDS:g} s"
        except OSError as failure:
            error = f"it cannot be run: {failure.strerror}"
        text = _head(output)
    status_of = AttemptStatus.ERROR if error else AttemptStatus.OK
    return CommandAttempt(status=status_of, error=error, command=command, output=text)


def _head(file: IO[bytes]) -> str:
    file.seek(0)
    data = file.read(MAX_BYTES + 1)
    more = "\n[cut here]" if len(data) > MAX_BYTES else ""
    return data[:MAX_BYTES].decode(errors="replace").rstrip() + more

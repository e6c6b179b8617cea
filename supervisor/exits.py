"""Exit statuses of `vnet` and `vnet-supervisor`, and the errors that lead to them."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """What an exit status means; fixed, scripts rely on it."""

    OK = 0
    DEGRADED = 1  # degraded, starting, or issues found
    USAGE = 2  # wrong usage or configuration
    NOT_RUNNING = 3
    NOT_PERMITTED = 4
    INTERNAL = 5  # internal error, or no answer within 2 s
    CONFLICT = 6  # second instance, interface name or address taken


class StartupError(Exception):
    """VNet cannot run here. The text is one line: what is wrong, and what to do."""

    status = ExitStatus.INTERNAL


class NotPermittedError(StartupError):
    """A right is missing; the text names it and how to get it."""

    status = ExitStatus.NOT_PERMITTED


class ConflictError(StartupError):
    """Something else has what VNet needs."""

    status = ExitStatus.CONFLICT


class MisconfiguredError(StartupError):
    """The configuration is wrong; `problems` has one line each."""

    status = ExitStatus.USAGE

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems

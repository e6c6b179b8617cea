"""What the commands that talk to clusters themselves share: `vnet ls`, `vnet proxy`.

They need no running VNet. The Teleport client is imported when one of them runs, not before.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from supervisor import config as configuration
from supervisor import settings
from supervisor.exits import ExitStatus, MisconfiguredError

T = TypeVar("T")


class CommandError(Exception):
    """The command cannot do what it was asked. The text is one line: why, and what to do."""

    def __init__(self, status: ExitStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Access:
    """Where the logins are and whom to trust. `home` is a tsh home."""

    home: Path
    ca_file: str
    insecure: bool


def find_access(config_path: Path | None, environment: Mapping[str, str]) -> Access:
    """What environment and configuration say; the default configuration counts if readable.

    Raises:
        CommandError: the configuration is wrong, or a named one cannot be read.
    """
    try:
        config = configuration.Config()
        default = configuration.DEFAULT_PATH
        if config_path is not None or os.access(default, os.R_OK):
            config = configuration.read(config_path)
        user = settings.find_user(None, environment)
    except MisconfiguredError as error:
        raise CommandError(ExitStatus.USAGE, str(error)) from error
    ca_file = config.teleport.ca_file
    if ca_file.startswith("~/"):
        ca_file = str(user.home / ca_file[2:])
    return Access(
        settings.teleport_home(config, user, environment), ca_file, config.teleport.insecure
    )


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a command's coroutine.

    Raises:
        CommandError: also for what is wrong with VNet itself.
    """
    # What the client logs is for the log of a worker; here errors are told once, by the command.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())
    except CommandError:
        raise
    except Exception as error:
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        text = f"internal error: {type(first).__name__}: {first}"
        raise CommandError(ExitStatus.INTERNAL, text) from error

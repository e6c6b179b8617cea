"""`vnet-supervisor`: flags, environment and file into settings, then the run.

argparse and not the library of `vnet`: this process lives long and forks, so it stays small.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from supervisor import (
    access,
    config,
    handover,
    logs,
    next_start,
    reload_plan,
    settings,
    standard_streams,
    upgrade,
)
from supervisor.exits import ExitStatus, MisconfiguredError, StartupError
from supervisor.handover import Handover
from supervisor.notify import Notifier, take_stored
from supervisor.settings import Settings

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process with an ExitStatus."""
    flags = make_parser().parse_args(arguments)
    try:
        handed = upgrade.take_descriptor(os.environ)
        status = _check(flags, handed) if flags.check_config else _run(flags, handed)
    except MisconfiguredError as error:
        for problem in error.problems:
            print(f"vnet-supervisor: {problem}", file=sys.stderr)
        status = error.status
    except StartupError as error:
        print(f"vnet-supervisor: {error}", file=sys.stderr)
        status = error.status
    raise SystemExit(int(status))


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(int(ExitStatus.USAGE), f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """The flags, which the manual page is made from as well."""
    parser = _Parser(
        prog="vnet-supervisor",
        description="Runs VNet in the foreground until SIGINT or SIGTERM.",
        epilog="example: sudo vnet-supervisor --user alice",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="instead of vnet.toml")
    parser.add_argument("--user", metavar="NAME", help="whose Teleport credentials are used")
    parser.add_argument(
        "--not-root", action="store_true", help="refuse to use root's Teleport credentials"
    )
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="control socket and lock")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="address book")
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        help="else what vnet log-level --next-start has left, else info",
    )
    parser.add_argument("--log-format", choices=["text", "json"], default="text")
    parser.add_argument(
        "--check-config", action="store_true", help="only validate the configuration"
    )
    parser.add_argument("--version", action="version", version=f"VNet {settings.version()}")
    return parser


def _check(flags: argparse.Namespace, handed: int | None) -> ExitStatus:
    if handed is None:
        _settings(flags, None)
        print("the configuration is valid")
        return ExitStatus.OK
    # The running VNet asks whether this version can go on in its place.
    _settings(flags, handover.unseal(handed))
    try:
        upgrade.load_everything()
    except Exception as error:  # noqa: BLE001  # whatever is wrong with the program, it is said
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return ExitStatus.INTERNAL
    print(f"VNet {settings.version()}")
    return ExitStatus.OK


def _run(flags: argparse.Namespace, handed: int | None) -> ExitStatus:
    # First: they stand where the next descriptors would be opened.
    stored = take_stored(os.environ, os.getpid())
    standard_streams.fill_descriptors()
    state = None if handed is None else upgrade.adopt(handed)
    chosen = _settings(flags, state)
    handler = logs.set_up(chosen.log_level, chosen.log_format)
    if state is not None:
        handler.book.restore(state.log.name, state.log.last, state.log.lines)
    # Only a run needs netlink, TUN and psutil; --help and --check-config do without.
    from supervisor.link_store import LinkStore  # noqa: PLC0415
    from supervisor.supervisor import Supervisor  # noqa: PLC0415

    notifier = Notifier(os.environ)
    try:
        Supervisor(chosen, handler, notifier, LinkStore(notifier, stored), state).run()
    except StartupError:
        raise
    except Exception:  # the outermost frame of the process
        log.exception("VNet ends after an internal error")
        return ExitStatus.INTERNAL
    return ExitStatus.OK


def _settings(flags: argparse.Namespace, state: Handover | None) -> Settings:
    read = config.read(flags.config)
    if state is not None:
        # As with a reload: what needs a restart of VNet stays as it is.
        read = reload_plan.plan(handover.config_of(state), read).config
    user = settings.find_user(flags.user or read.user or None, os.environ)
    if state is None:
        # A running VNet goes on without accounts that were deleted, and says so.
        access.check(read.security)
    if flags.not_root and user.uid == 0:
        raise MisconfiguredError(
            [f"user: {user.name} is root, whose credentials are not used here: name another user"]
        )
    state_dir = (flags.state_dir or settings.DEFAULT_STATE_DIR).absolute()
    in_force = None if state is None else state.log_level.lower()
    log_level: str = in_force or flags.log_level or next_start.log_level(state_dir) or "info"
    return Settings(
        config=read,
        config_path=flags.config,
        user=user,
        # Absolute, because workers leave the present directory.
        teleport_home=settings.teleport_home(read, user, os.environ).absolute(),
        run_dir=settings.run_dir(flags.run_dir, os.environ).absolute(),
        state_dir=state_dir,
        log_level=log_level.upper(),
        log_format=flags.log_format,
    )


if __name__ == "__main__":
    main()

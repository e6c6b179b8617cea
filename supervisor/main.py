"""`vnet-supervisor`: flags, environment and file into settings, then the run.

argparse and not the library of `vnet`: this process lives long and forks, so it stays small.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from supervisor import config, logs, settings
from supervisor.exits import ExitStatus, MisconfiguredError, StartupError
from supervisor.notify import Notifier
from supervisor.settings import Settings

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process with an ExitStatus."""
    flags = _parser().parse_args(arguments)
    try:
        status = _check(flags) if flags.check_config else _run(flags)
    except MisconfiguredError as error:
        for problem in error.problems:
            print(f"vnet-supervisor: {problem}", file=sys.stderr)
        status = error.status
    except StartupError as error:
        print(f"vnet-supervisor: {error}", file=sys.stderr)
        status = error.status
    raise SystemExit(int(status))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vnet-supervisor",
        description="Runs VNet in the foreground until SIGINT or SIGTERM.",
        epilog="example: sudo vnet-supervisor --user alice",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="instead of vnet.toml")
    parser.add_argument("--user", metavar="NAME", help="whose Teleport credentials are used")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="control socket and lock")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="address book")
    parser.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], default="info"
    )
    parser.add_argument("--log-format", choices=["text", "json"], default="text")
    parser.add_argument(
        "--check-config", action="store_true", help="only validate the configuration"
    )
    parser.add_argument("--version", action="version", version=f"VNet {settings.version()}")
    return parser


def _check(flags: argparse.Namespace) -> ExitStatus:
    _settings(flags)
    print("the configuration is valid")
    return ExitStatus.OK


def _run(flags: argparse.Namespace) -> ExitStatus:
    chosen = _settings(flags)
    _fill_standard_descriptors()
    handler = logs.set_up(chosen.log_level, chosen.log_format)
    # Only a run needs netlink, TUN and psutil; --help and --check-config do without.
    from supervisor.supervisor import Supervisor  # noqa: PLC0415

    notifier = Notifier(os.environ)
    try:
        Supervisor(chosen, handler, notifier).run()
    except StartupError:
        raise
    except Exception:  # the outermost frame of the process
        log.exception("VNet ends after an internal error")
        return ExitStatus.INTERNAL
    return ExitStatus.OK


def _fill_standard_descriptors() -> None:
    """Opens those of 0, 1 and 2 that the caller closed: no socket may get such a number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _settings(flags: argparse.Namespace) -> Settings:
    read = config.read(flags.config)
    if read.dns.os_integration not in ("auto", "none"):
        raise MisconfiguredError(
            [f"dns.os_integration: {read.dns.os_integration!r} needs a later version: use 'none'"]
        )
    user = settings.find_user(flags.user or read.user or None, os.environ)
    return Settings(
        config=read,
        config_path=flags.config,
        user=user,
        # Absolute, because workers leave the present directory.
        teleport_home=settings.teleport_home(read, user, os.environ).absolute(),
        run_dir=settings.run_dir(flags.run_dir, os.environ).absolute(),
        state_dir=(flags.state_dir or settings.DEFAULT_STATE_DIR).absolute(),
        log_level=flags.log_level.upper(),
        log_format=flags.log_format,
    )


if __name__ == "__main__":
    main()

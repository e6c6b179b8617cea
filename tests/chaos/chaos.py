"""Lets things go wrong in a whole VNet under load, and sees what its users notice of it.

It runs in network, mount and process namespaces of its own and leaves nothing behind. What happens
goes to standard error, line by line; one line of JSON to standard output. The exit status is 1 when
a hard aim was missed. Needs root.

    scripts/chaos [--events N] [--seconds S] [--seed N] [--hang-seconds S] [--without KIND]
    scripts/chaos --above-limit [WORKER]
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import chaos_above_limit
import chaos_run
from chaos_bed import WORKERS, ChaosError
from chaos_report import missed, table
from chaos_run import Wish
from chaos_schedule import Kind

from demo.private_network import run_in_private_network

# Should anything hang, the kernel ends everything with the namespace's first process.
EXTRA_SECONDS = 300
MISSED, BROKEN = 1, 2


def main() -> int:
    """Reads the arguments and runs."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--events", type=int, default=200, metavar="N", help="end after so many")
    parser.add_argument(
        "--seconds", type=float, default=1500, metavar="S", help="end after so long"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="repeats the order of a run")
    parser.add_argument("--hang-seconds", type=float, default=5, metavar="S", help="of VNet")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=[str(kind) for kind in Kind],
        help="again for more",
    )
    parser.add_argument(
        "--above-limit",
        nargs="?",
        const="all",
        choices=["all", *WORKERS],
        metavar="WORKER",
        help="instead: kill a worker more often than it is restarted",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copies log and records there")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it makes network namespaces and TUN devices: run as root")
    seed = random.SystemRandom().randrange(10_000) if arguments.seed is None else arguments.seed
    wish = Wish(
        events=arguments.events,
        seconds=arguments.seconds,
        seed=seed,
        hang_seconds=arguments.hang_seconds,
        without=frozenset(map(Kind, arguments.without)),
        say=_say,
    )

    def work(directory: Path) -> int:
        signal.alarm(int(arguments.seconds) + EXTRA_SECONDS)
        # The process does not leave through the interpreter's end.
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        try:
            if arguments.above_limit is None:
                report = chaos_run.play(directory, wish)
            else:
                workers = WORKERS if arguments.above_limit == "all" else (arguments.above_limit,)
                report = chaos_above_limit.play(directory, wish, workers)
        except (ChaosError, OSError):
            traceback.print_exc()
            _show_log(directory)
            return BROKEN
        finally:
            if arguments.keep is not None:
                _keep(directory, arguments.keep)
        return _show(report)

    return run_in_private_network(work, _say, passes_interrupt=True)


def _say(text: str) -> None:
    print(f"chaos: {text}", file=sys.stderr, flush=True)


def _show(report: dict[str, Any]) -> int:
    aims = report["aims"]
    print(table(aims), file=sys.stderr)
    failed = missed(aims)
    print(json.dumps(report | {"aims": [aim.as_json() for aim in aims], "met": not failed}))
    return MISSED if failed else 0


def _show_log(directory: Path) -> None:
    log = directory / "vnet.log"
    for line in log.read_text(errors="replace").splitlines()[-30:] if log.exists() else ():
        _say(line)


def _keep(directory: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in ("vnet.log", "records"):
        if (directory / name).exists():
            shutil.copy(directory / name, target / name)


if __name__ == "__main__":
    sys.exit(main())

"""Runs a part of a test in a network namespace of its own."""

import os
import subprocess
import traceback
from collections.abc import Callable

from supervisor import namespace


def in_own_network(action: Callable[[], None]) -> None:
    """Runs `action` in a child whose network is its own and empty; fails when it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            namespace._check(namespace._libc.unshare(namespace.CLONE_NEWNET))
            action()
            os._exit(0)
        except BaseException:  # noqa: BLE001  # shown, and the parent fails
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def ip(*commands: str) -> str:
    """Runs `ip` with each of these command lines; the output of the last."""
    output = ""
    for command in commands:
        done = subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)
        output = done.stdout
    return output


def add_link(name: str, *addresses: str) -> None:
    """An interface of another program, up."""
    ip(f"tuntap add {name} mode tun", f"link set {name} up")
    ip(*(f"address add {address} dev {name}" for address in addresses))

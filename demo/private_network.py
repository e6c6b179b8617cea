"""Private network, mount, process and (for others than root) user namespaces of the demo.

    caller ── watcher ── init (process 1 of the demo) ── cluster, supervisor, COMMAND

Each dies with the one before it, and with init the kernel ends every process of its namespace
and forgets its mounts and interfaces: nothing is left, however the demo ends.
"""

import os
import re
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from demo import linux
from demo.errors import DemoError

# What is hidden by the demo's own file system must be empty, so that nothing is missed.
_MOUNT_POINTS = ("/mnt", "/media", "/srv", "/opt", "/boot")
_SIOCSIFFLAGS = 0x8914  # linux/sockios.h
_IFF_UP = 1
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# Exit status when the demo cannot be set up, like env(1) and timeout(1).
CANNOT_SET_UP = 125


def run_in_private_network(
    work: Callable[[Path], int], report: Callable[[str], None], *, passes_interrupt: bool
) -> int:
    """Runs `work(directory)` as the demo's init; returns its status.

    `directory` is an empty file system of the demo's own. `report` shows why the demo cannot be set
    up. SIGTERM and SIGHUP are passed on to init; SIGINT only if `passes_interrupt`, otherwise the
    terminal gives it to COMMAND itself.
    """
    watcher = os.fork()
    if watcher == 0:
        linux.die_with_parent()
        _leave(lambda: _watch(work, report), report)
    return _wait_passing_signals(watcher, passes_interrupt=passes_interrupt)


def _watch(work: Callable[[Path], int], report: Callable[[str], None]) -> int:
    uid, gid = os.getuid(), os.getgid()
    flags = linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWPID
    is_root = os.geteuid() == 0
    try:
        linux.unshare(flags if is_root else flags | linux.CLONE_NEWUSER)
        if not is_root:
            linux.map_own_user(uid, gid)
            linux.keep_capabilities_over_exec()
    except OSError as error:
        raise DemoError(
            f"private namespaces cannot be made ({error.strerror}): run as root, or allow"
            " unprivileged user namespaces"
        ) from error
    init = os.fork()
    if init == 0:
        linux.die_with_parent()
        _leave(lambda: work(_prepare_mounts()), report)
    return _wait_passing_signals(init, passes_interrupt=True)


def _leave(work: Callable[[], int], report: Callable[[str], None]) -> NoReturn:
    """Ends this forked process with the status of `work`."""
    status = CANNOT_SET_UP
    try:
        status = work()
    except DemoError as error:
        report(str(error))
    except OSError as error:
        report(f"the demo cannot be set up: {error}")
    except Exception:  # noqa: BLE001  # the outermost frame of the process
        traceback.print_exc()
    finally:
        os._exit(status)


def _wait_passing_signals(child: int, *, passes_interrupt: bool) -> int:
    def pass_on(number: int, _frame: FrameType | None) -> None:
        if passes_interrupt or number != signal.SIGINT:
            os.kill(child, number)

    before = {number: signal.signal(number, pass_on) for number in _FORWARDED}
    try:
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _prepare_mounts() -> Path:
    linux.mount("none", Path("/"), flags=linux.MS_REC | linux.MS_PRIVATE)
    secure = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    try:
        linux.mount("proc", Path("/proc"), "proc", secure)
    except OSError as error:
        raise DemoError(
            f"/proc cannot be mounted in a namespace ({error.strerror}): run as root, outside a"
            " container"
        ) from error
    for name in _MOUNT_POINTS:
        directory = Path(name)
        if _is_empty_directory(directory):
            linux.mount("vnet-demo", directory, "tmpfs", linux.MS_NOSUID, "mode=0755")
            return directory
    raise DemoError(f"no empty directory to mount on: empty one of {', '.join(_MOUNT_POINTS)}")


def _is_empty_directory(path: Path) -> bool:
    try:
        return path.is_dir() and not any(path.iterdir())
    except PermissionError:
        return False


def bring_up_loopback() -> None:
    """Makes 127.0.0.0/8 and ::1 usable in a new network namespace."""
    request = struct.pack("16sH14x", b"lo", _IFF_UP)
    import fcntl  # noqa: PLC0415  # does not exist on every system this module is imported on

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        fcntl.ioctl(end, _SIOCSIFFLAGS, request)


def use_own_resolver(directory: Path, nameserver: str) -> Path:
    """Makes programs of the demo ask `nameserver`; returns the file that says so.

    Programs must not ask the host's resolver by another way: name service modules such as
    nss-resolve, or the cache daemon, which answer over unix sockets.
    """
    resolv_conf = directory / "resolv.conf"
    resolv_conf.write_text(f"nameserver {nameserver}\n")
    target = Path("/etc/resolv.conf")
    if not target.exists():
        raise DemoError(f"{target} does not exist: create it (an empty file will do)")
    linux.mount(str(resolv_conf), target, flags=linux.MS_BIND)
    switch = Path("/etc/nsswitch.conf")
    if switch.exists():
        own = directory / "nsswitch.conf"
        text = switch.read_text(errors="replace")
        own.write_text(re.sub(r"(?m)^hosts:.*$", "hosts: files dns", text))
        linux.mount(str(own), switch, flags=linux.MS_BIND)
    for cache in (Path("/run/nscd"), Path("/var/run/nscd")):
        if cache.is_dir():
            linux.mount("none", cache, "tmpfs")
            break
    return resolv_conf

"""Makes this process look like Python on macOS, as far as VNet asks: a helper for programs of tests.

`sys.platform` says darwin, libraries and functions that only Linux has are gone. What the libraries that
macOS has do for it is loaded before, since they ask for the platform themselves.
"""

import fcntl
import importlib.abc
import os
import select
import signal
import socket
import sys
import sysconfig
import time

LINUX_LIBRARIES = {"pytun", "pyroute2", "pyseccomp", "asyncinotify", "jeepney"}
# What differs by platform inside of them.
LOADED_BEFORE = (
    "psutil",
    "fido2.hid",
    "uvloop",
    "zmq",
    "multiprocessing_logging",
    "asyncio",
    "grpclib",
    "prometheus_client",
)
LINUX_NAMES = {
    os: (
        *("memfd_create", "pipe2", "pidfd_open", "unshare", "setns", "eventfd", "splice"),
        *("setresuid", "setresgid", "getresuid", "getresgid", "sched_getaffinity"),
        *(name for name in dir(os) if name.startswith(("MFD_", "CLONE_", "EFD_"))),
    ),
    socket: (
        *("AF_NETLINK", "NETLINK_ROUTE", "SO_PEERCRED", "SOCK_CLOEXEC", "SOCK_NONBLOCK"),
        *("MSG_CMSG_CLOEXEC", "SO_BINDTODEVICE", "SO_MARK", "SO_DOMAIN", "SO_PROTOCOL"),
        *("TCP_USER_TIMEOUT", "TCP_QUICKACK", "TCP_CONGESTION", "TCP_INFO", "TCP_DEFER_ACCEPT"),
        *("AF_PACKET", "AF_VSOCK", "TCP_KEEPIDLE"),
    ),
    fcntl: (
        *("F_SETPIPE_SZ", "F_GETPIPE_SZ", "F_ADD_SEALS", "F_GET_SEALS"),
        *(name for name in dir(fcntl) if name.startswith("F_SEAL_")),
    ),
    select: tuple(name for name in dir(select) if name.lower().startswith("epoll")),
    signal: ("SIGPWR", "SIGSTKFLT", "SIGPOLL", "SIGRTMIN", "SIGRTMAX", "sigtimedwait"),
    time: ("CLOCK_BOOTTIME",),
}


class _Refuser(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in LINUX_LIBRARIES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def pretend() -> None:
    """Nothing of VNet may be loaded yet."""
    for name in LOADED_BEFORE:
        __import__(name)
    # Reads a file that is named after the platform, once.
    sysconfig.get_config_vars()
    sys.meta_path.insert(0, _Refuser())
    for module, names in LINUX_NAMES.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    sys.platform = "darwin"


if __name__ == "__main__":
    # on_macos.py MODULE ARGUMENTS...: runs `main` of the module.
    pretend()
    module = __import__(sys.argv[1], fromlist=["main"])
    sys.argv[:2] = [sys.argv[1]]
    module.main()

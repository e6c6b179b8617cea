"""Two private network namespaces joined by two TUN devices, as the supervisor would make them.

    host stand-in                                  inner namespace
    +---------------------------+                  +---------------------------------+
    | programs                  |                  | lo: local 100.64.0.0/10         |
    | vtun0  100.64.0.1         |--- the pump ---- |     local fd60:67ec:4325::/64   |
    |        fd60:67ec:4325::1  |                  | vtun1: route to .1 and ::1,     |
    |   route to the ranges     |                  |        in table local           |
    +---------------------------+                  +---------------------------------+

Names carry the pid, so that runs do not meet; everything is gone after the `with`.
"""

import fcntl
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from pyroute2 import netns

from ipc.messages import Network

T = TypeVar("T")

PREFIX = socket.inet_pton(socket.AF_INET6, "fd60:67ec:4325::")
TUN_IPV4, DNS_IPV4 = socket.inet_aton("100.64.0.1"), socket.inet_aton("100.64.0.2")
TUN_IPV6, DNS_IPV6 = PREFIX[:15] + b"\1", PREFIX[:15] + b"\2"
NETWORK = Network(
    interface="vtun0",
    mtu=65535,
    ranges=["100.64.0.0/10"],
    tun_ipv4=TUN_IPV4,
    dns_ipv4=DNS_IPV4,
    ipv6_prefix=PREFIX,
    tun_ipv6=TUN_IPV6,
    dns_ipv6=DNS_IPV6,
)

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


def skip_reason() -> str | None:
    """Why namespaces with TUN devices cannot be made here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    return None


def needs_tun(function: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that makes namespaces; skipped where that is impossible, unless E2E is a must."""
    reason = skip_reason() or ""
    skipped = bool(reason) and not os.environ.get("VNET_REQUIRE_E2E")
    marked: Callable[..., None] = pytest.mark.skipif(skipped, reason=reason)(function)
    rooted: Callable[..., None] = pytest.mark.root(marked)
    return rooted


@dataclass(frozen=True)
class Bed:
    """The namespaces' names and the TUN descriptors."""

    host: str
    inner: str
    outer_tun: int
    inner_tun: int

    def in_host(self, action: Callable[[], T]) -> T:
        """Runs `action` in a thread inside the host stand-in."""
        return in_namespace(self.host, action)

    def in_inner(self, action: Callable[[], T]) -> T:
        """Runs `action` in a thread inside the inner namespace."""
        return in_namespace(self.inner, action)

    def listen(self, address: str, port: int) -> socket.socket:
        """A listening socket in the inner namespace, as the supervisor opens them."""
        return self.in_inner(lambda: _listener(address, port))


def in_namespace(name: str, action: Callable[[], T]) -> T:
    """The result of `action`, run in a thread of its own that has entered the namespace."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            netns.setns(name)
            results.append(action())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def make_bed(mtu: int = 65535) -> Iterator[Bed]:
    """Both namespaces, set up; removed afterwards, descriptors closed."""
    host, inner = f"vtun-host-{os.getpid()}", f"vtun-inner-{os.getpid()}"
    descriptors: list[int] = []
    try:
        for name in (host, inner):
            _ip(f"netns add {name}")
        descriptors += [
            in_namespace(host, lambda: _open_tun("vtun0")),
            in_namespace(inner, lambda: _open_tun("vtun1")),
        ]
        _set_up(host, inner, mtu)
        yield Bed(host, inner, *descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        for name in (host, inner):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _set_up(host: str, inner: str, mtu: int) -> None:
    for command in (
        "link set lo up",
        f"link set vtun0 mtu {mtu} up",
        "addr add 100.64.0.1/32 dev vtun0",
        "route add 100.64.0.0/10 dev vtun0",
        "-6 addr add fd60:67ec:4325::1/64 dev vtun0 nodad",
    ):
        _ip(f"-n {host} {command}")
    for command in (
        "link set lo up",
        f"link set vtun1 mtu {mtu} up",
        "route add local 100.64.0.0/10 dev lo",
        "route add 100.64.0.1/32 dev vtun1 table local",
        "-6 route add local fd60:67ec:4325::/64 dev lo",
        "-6 route add fd60:67ec:4325::1/128 dev vtun1 table local",
    ):
        _ip(f"-n {inner} {command}")
    # A local path needs no BBR; it halves the throughput.
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    for name in (host, inner):
        in_namespace(name, lambda: control.write_text("reno"))


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def _open_tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(
        descriptor,
        _TUNSETIFF,
        struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI),
    )
    return descriptor


def _listener(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND; covers IPv6 too
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    listener.bind((address, port))
    listener.listen(128)
    return listener

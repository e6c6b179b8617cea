"""TUN devices, their addresses and routes (pytun, rtnetlink)."""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

from supervisor.exits import ConflictError, NotPermittedError, StartupError
from supervisor.host_link import Device, LinkState

if sys.platform == "linux":
    import pytun
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

TUN_PATH = Path("/dev/net/tun")
# linux/rtnetlink.h
RT_TABLE_LOCAL = 255
RT_TABLE_MAIN = 254
RTN_LOCAL = 2
RT_SCOPE_HOST = 254
RT_SCOPE_LINK = 253
IFA_F_NODAD = 0x02
IFF_UP = 0x1
# linux/if_tun.h, linux/if.h
TUNGETIFF = 0x800454D2
_IFREQ = struct.Struct("16sH22x")
_IFF_TUN, _IFF_TAP, _IFF_NO_PI = 0x1, 0x2, 0x1000
_KIND_FLAGS = _IFF_TUN | _IFF_TAP | _IFF_NO_PI


class TunDevice:
    """A TUN device behind a descriptor of ours; the interface goes with the last such descriptor."""

    def __init__(self, descriptor: int) -> None:
        """Takes the descriptor over."""
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def name(self) -> str:
        """The name of its interface in that interface's network namespace.

        Raises:
            OSError: the interface was deleted, or this is no TUN device as `make_tun` makes them.
        """
        if self._descriptor < 0:
            raise OSError(errno.EBADF, "the device is closed")
        answer = fcntl.ioctl(self._descriptor, TUNGETIFF, bytes(_IFREQ.size))
        name, flags = _IFREQ.unpack(answer)
        if flags & _KIND_FLAGS != _IFF_TUN | _IFF_NO_PI:
            raise OSError(errno.EINVAL, "it is a TUN device of another kind")
        return bytes(name).rstrip(b"\0").decode(errors="replace")


def make_tun(name: str) -> TunDevice:
    """A TUN device without packet information header, non-blocking.

    Raises:
        NotPermittedError: no CAP_NET_ADMIN, or no /dev/net/tun.
        ConflictError: the name is taken.
    """
    if not TUN_PATH.exists():
        raise NotPermittedError(
            f"{TUN_PATH} does not exist: load the module (modprobe tun), or give the container"
            " the device"
        )
    if name in (entry for _, entry in socket.if_nameindex()):
        raise ConflictError(
            f"the interface {name} exists already: stop what uses it, or set network.interface"
        )
    try:
        device = pytun.TunTapDevice(name=name, flags=_IFF_TUN | _IFF_NO_PI)
    except pytun.Error as error:
        raise _explain(name, error) from error
    try:
        # The library's own descriptor would be inherited by programs.
        descriptor = os.dup(device.fileno())
    finally:
        device.close()
    os.set_blocking(descriptor, False)
    return TunDevice(descriptor)


def _explain(name: str, error: "pytun.Error") -> StartupError:
    number = error.args[0] if error.args else 0
    if number in (errno.EPERM, errno.EACCES):
        return NotPermittedError(
            f"the TUN device {name} cannot be made: CAP_NET_ADMIN and access to {TUN_PATH} are"
            " needed; run as root (sudo vnet-supervisor)"
        )
    if number == errno.EBUSY:
        return ConflictError(f"the interface {name} is in use: set network.interface")
    return StartupError(f"the TUN device {name} cannot be made: {error}")


def delete_interface(device: Device) -> None:
    """Removes the interface of a device, whoever else has copies of the descriptor."""
    with contextlib.suppress(OSError):
        name = device.name()
        links = Links()
        try:
            links.remove(name)
        finally:
            links.close()


def write_setting(path: str, value: str) -> None:
    """Sets a sysctl of the current network namespace where the system has it."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/net", path).write_text(value)


def quiet_ipv6(interface: str) -> None:
    """Keeps the kernel from talking on the device: no link-local address, no solicitations."""
    write_setting(f"ipv6/conf/{interface}/addr_gen_mode", "1")
    write_setting(f"ipv6/conf/{interface}/accept_ra", "0")
    write_setting(f"ipv6/conf/{interface}/router_solicitations", "0")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """pyroute2's own error, which is no OSError, as the OSError it stands for."""
    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error


class Links:
    """rtnetlink in the network namespace it was made in. Everything raises OSError."""

    def __init__(self) -> None:
        self._netlink = IPRoute()

    def close(self) -> None:
        self._netlink.close()

    def addresses(self) -> set[bytes]:
        """All packed addresses that this host has."""
        with _translated():
            found = [message.get_attr("IFA_ADDRESS") for message in self._netlink.get_addr()]
        return {ip_network(text).network_address.packed for text in found if text}

    def bring_up(self, name: str, mtu: int | None = None) -> None:
        index = self._index(name)
        options = {} if mtu is None else {"mtu": mtu}
        with _translated():
            self._netlink.link("set", index=index, state="up", **options)

    def state_of(self, name: str) -> LinkState:
        """What the interface has; routes are those of the table `main`."""
        index = self._index(name)
        families = (socket.AF_INET, socket.AF_INET6)
        with _translated():
            [link] = self._netlink.get_links(index)
            addresses = list(self._netlink.get_addr(index=index))
            routes = [
                route
                for family in families
                for route in self._netlink.get_routes(family=family, oif=index)
            ]
        return LinkState(
            is_up=bool(link["flags"] & IFF_UP),
            addresses=frozenset(_text_of(message, "IFA_ADDRESS") for message in addresses),
            routes=frozenset(
                f"{_text_of(route, 'RTA_DST')}/{route['dst_len']}"
                for route in routes
                if route["table"] == RT_TABLE_MAIN
            ),
        )

    def remove(self, name: str) -> None:
        """Deletes the interface; its descriptors are of no use from then on."""
        index = self._index(name)
        with _translated():
            self._netlink.link("del", index=index)

    def add_address(self, name: str, address: bytes) -> None:
        """Adds one address without a subnet; an IPv6 one is usable at once (RFC 4862 5.4)."""
        version6 = len(address) == 16
        # The device may have it already; the same address on another is no error of the kernel's.
        with contextlib.suppress(FileExistsError), _translated():
            self._netlink.addr(
                "add",
                index=self._index(name),
                family=socket.AF_INET6 if version6 else socket.AF_INET,
                address=_text(address),
                prefixlen=128 if version6 else 32,
                **({"flags": IFA_F_NODAD} if version6 else {}),
            )

    def add_route(self, name: str, destination: str, source: bytes | None = None) -> None:
        """Routes a range into the device, with our address as source if there is one."""
        options = {} if source is None else {"prefsrc": _text(source)}
        self._route("add", name, destination, **options)

    def remove_route(self, name: str, destination: str) -> None:
        self._route("del", name, destination)

    def add_local(self, destination: str) -> None:
        """Makes every address of a range one of this namespace's own ("AnyIP")."""
        self._route(
            "add", "lo", destination, table=RT_TABLE_LOCAL, type=RTN_LOCAL, scope=RT_SCOPE_HOST
        )

    def remove_local(self, destination: str) -> None:
        self._route("del", "lo", destination, table=RT_TABLE_LOCAL, type=RTN_LOCAL)

    def add_exception(self, name: str, address: bytes) -> None:
        """Routes one address of a local range out through a device.

        It stands in the table `local`, because IPv6 looks there first and ends there.
        """
        length = 128 if len(address) == 16 else 32
        scope = {} if length == 128 else {"scope": RT_SCOPE_LINK}
        self._route("add", name, f"{_text(address)}/{length}", table=RT_TABLE_LOCAL, **scope)

    def _route(self, command: str, name: str, destination: str, **options: object) -> None:
        family = socket.AF_INET6 if ":" in destination else socket.AF_INET
        index = self._index(name)
        try:
            with _translated():
                self._netlink.route(command, dst=destination, oif=index, family=family, **options)
        except OSError as error:
            is_done = (
                error.errno == errno.EEXIST and self._has_route(index, family, destination)
                if command == "add"
                else error.errno == errno.ESRCH
            )
            if not is_done:
                raise

    def _has_route(self, index: int, family: int, destination: str) -> bool:
        """Whether the route that is in the way leads to this device and not to another."""
        wanted = ip_network(destination)
        with _translated():
            return any(
                route["dst_len"] == wanted.prefixlen
                and route.get_attr("RTA_DST") == str(wanted.network_address)
                and route.get_attr("RTA_OIF") == index
                for route in self._netlink.get_routes(family=family)
            )

    def _index(self, name: str) -> int:
        return socket.if_nametoindex(name)


class LinuxHost:
    """Linux as a `supervisor.host_link.Host`, in the network namespace of the caller."""

    has_family_header: Final = False

    def open_links(self) -> Links:
        return Links()

    def make_device(self, name: str) -> TunDevice:
        return make_tun(name)

    def adopt_device(self, descriptor: int) -> TunDevice:
        return TunDevice(descriptor)

    def delete_interface(self, device: Device) -> None:
        delete_interface(device)

    def quiet(self, interface: str) -> None:
        quiet_ipv6(interface)

    def restrict(self, end: socket.socket, interface: str) -> None:
        # That keeps other machines out. What a program of this one sends to the interface's address the
        # kernel takes for something that came through it.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())


def _text_of(message: Any, name: str) -> str:
    return str(message.get_attr(name) or "")


def _text(address: bytes) -> str:
    family = socket.AF_INET6 if len(address) == 16 else socket.AF_INET
    return socket.inet_ntop(family, address)

"""The kernel side of the data plane: two TUN devices and the inner network namespace.

    host's namespace                          inner namespace
    program ── outer TUN (.1, ::1)            lo: every virtual address is local
                  │                             │ listening sockets, DNS sockets
                  └──── tun worker ──── inner TUN (the way back to .1 and ::1)

The supervisor owns all of it; workers borrow descriptors. A socket keeps the namespace it was made in,
so a proxy accepts on virtual addresses and dials from the host's network.
"""

import contextlib
import logging
import os
import socket
from typing import Protocol

import pytun

from ipc.addresses import as_text
from ipc.messages import Network
from supervisor import devices
from supervisor.devices import Links
from supervisor.exits import ConflictError, NotPermittedError, StartupError
from supervisor.namespace import inside, make_network_namespace
from supervisor.network import dns_addresses, ipv6_range

log = logging.getLogger(__name__)

INNER_NAME = "vnet-inner"
DNS_PORT = 53
# Connections whose SYN was admitted and that a proxy has not accepted yet; also what waits while a
# proxy is restarted.
LISTEN_BACKLOG = 1024
IPV6_FREEBIND = 78  # linux/in6.h; Python has no name for it
IP_FREEBIND = 15  # linux/in.h
# A local path has no bottleneck to probe for: BBR, a common default, costs a third of the speed.
CONGESTION_CONTROL = b"reno"
# Bursts of queries wait here while the dns worker is restarted.
DNS_RECEIVE_BYTES = 1 << 20


class DataPlane(Protocol):
    """What the supervisor needs of a data plane, whichever way it is built."""

    @property
    def tun_descriptors(self) -> list[int]:
        """[outer device, inner device], for the tun worker."""
        ...

    @property
    def dns_descriptors(self) -> list[int]:
        """UDP sockets, then listening TCP sockets, IPv4 first; for the dns worker."""
        ...

    def open_listener(self, address: bytes, port: int) -> socket.socket:
        """A listening TCP socket on a virtual address. Raises OSError."""
        ...

    def set_ranges(self, ranges: list[str]) -> dict[str, OSError]:
        """Routes exactly these IPv4 ranges; returns those that could not be, and why."""
        ...

    def host_addresses(self) -> list[bytes]:
        """Packed addresses of this machine, VNet's own left out, and of its default gateways."""
        ...

    def close(self) -> None:
        """Removes everything; safe to call twice."""
        ...


class NamespaceDataPlane:
    """The data plane with an inner namespace (Linux)."""

    def __init__(self, network: Network) -> None:
        """Makes devices, addresses, routes and DNS sockets.

        Raises:
            NotPermittedError: a capability or /dev/net/tun is missing.
            ConflictError: the interface or one of the addresses is taken.
        """
        self._network = network
        self._ranges: list[str] = []
        self._closing = contextlib.ExitStack()
        try:
            self._build()
        except OSError as error:
            self.close()
            raise StartupError(f"the data plane cannot be made: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def tun_descriptors(self) -> list[int]:
        return [self._outer.fileno(), self._inner.fileno()]

    @property
    def dns_descriptors(self) -> list[int]:
        return [end.fileno() for end in self._dns_sockets]

    def open_listener(self, address: bytes, port: int) -> socket.socket:
        with inside(self._namespace):
            listener = _bound_socket(socket.SOCK_STREAM, address, port)
        try:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION_CONTROL)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listener.listen(LISTEN_BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener

    def set_ranges(self, ranges: list[str]) -> dict[str, OSError]:
        name, source = self._network.interface, self._network.tun_ipv4
        for gone in [old for old in self._ranges if old not in ranges]:
            self._outer_links.remove_route(name, gone)
            self._inner_links.remove_local(gone)
            self._ranges.remove(gone)
        failed: dict[str, OSError] = {}
        for new in [wanted for wanted in ranges if wanted not in self._ranges]:
            try:
                self._inner_links.add_local(new)
                self._outer_links.add_route(name, new, source)
            except OSError as error:
                failed[new] = error
            else:
                self._ranges.append(new)
        return failed

    def host_addresses(self) -> list[bytes]:
        own = {
            self._network.tun_ipv4,
            self._network.dns_ipv4,
            self._network.tun_ipv6,
            self._network.dns_ipv6,
        }
        try:
            found = self._outer_links.addresses() | self._outer_links.gateways()
        except OSError as error:
            log.warning("this machine's addresses cannot be read: %s", error)
            return []
        return sorted(found - own)

    def close(self) -> None:
        self._closing.close()

    def _build(self) -> None:
        self._outer_links = self._own_links()
        self._refuse_taken_addresses()
        self._outer = self._own_device(self._network.interface)
        try:
            self._namespace = make_network_namespace()
        except PermissionError as error:
            raise NotPermittedError(
                "a network namespace cannot be made: CAP_SYS_ADMIN is needed; run as root"
                " (sudo vnet-supervisor)"
            ) from error
        self._closing.callback(os.close, self._namespace)
        with inside(self._namespace):
            self._inner_links = self._own_links()
            self._inner = self._own_device(INNER_NAME)
            self._set_up_inner()
        self._set_up_outer()
        for text, reason in self.set_ranges(self._network.ranges).items():
            if isinstance(reason, FileExistsError):
                raise ConflictError(
                    f"the range {text} is routed to another interface: set network.ipv4_cidr_range"
                ) from reason
            raise reason

    def _own_links(self) -> Links:
        links = Links()
        self._closing.callback(links.close)
        return links

    def _own_device(self, name: str) -> pytun.TunTapDevice:
        device = devices.make_tun(name)
        self._closing.callback(device.close)
        return device

    def _refuse_taken_addresses(self) -> None:
        taken = self._outer_links.addresses()
        own = (self._network.tun_ipv4, self._network.dns_ipv4)
        for address in own:
            if address in taken:
                raise ConflictError(
                    f"the address {as_text(address)} is taken: set network.ipv4_cidr_range"
                )
        # Its prefix is random and kept in the state directory, so only another VNet can have it.
        if self._network.tun_ipv6 in taken:
            raise ConflictError(
                f"the address {as_text(self._network.tun_ipv6)} is taken: another VNet runs with"
                " this state directory; set --state-dir"
            )

    def _set_up_inner(self) -> None:
        network, links = self._network, self._inner_links
        for interface in ("all", "default", INNER_NAME):
            devices.write_setting(f"ipv4/conf/{interface}/rp_filter", "0")
        _quiet_ipv6(INNER_NAME)
        devices.write_setting("core/somaxconn", str(LISTEN_BACKLOG))
        # Every SYN was admitted, so a full backlog is no attack; cookies would lose options.
        devices.write_setting("ipv4/tcp_syncookies", "0")
        links.bring_up("lo")
        links.bring_up(INNER_NAME, network.mtu)
        links.add_exception(INNER_NAME, network.tun_ipv4)
        if (block := ipv6_range(network)) and network.tun_ipv6:
            links.add_local(str(block))
            links.add_exception(INNER_NAME, network.tun_ipv6)
        if network.dns_ipv6:
            # ICMPv6 errors need an address to come from; that a range is local gives them none.
            links.add_address("lo", network.dns_ipv6)
        # The DNS addresses are local before the range is, because sockets are bound now.
        links.add_local(f"{as_text(network.dns_ipv4)}/32")
        self._dns_sockets = [
            self._own_dns_socket(kind, address)
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)
            for address in dns_addresses(network)
        ]

    def _set_up_outer(self) -> None:
        network, links = self._network, self._outer_links
        _quiet_ipv6(network.interface)
        links.bring_up(network.interface, network.mtu)
        links.add_address(network.interface, network.tun_ipv4)
        if (block := ipv6_range(network)) and network.tun_ipv6:
            links.add_address(network.interface, network.tun_ipv6)
            links.add_route(network.interface, str(block), network.tun_ipv6)

    def _own_dns_socket(self, kind: socket.SocketKind, address: bytes) -> socket.socket:
        end = _bound_socket(kind, address, DNS_PORT)
        self._closing.callback(end.close)
        if kind == socket.SOCK_STREAM:
            end.listen(LISTEN_BACKLOG)
        else:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DNS_RECEIVE_BYTES)
        return end


def _bound_socket(kind: socket.SocketKind, address: bytes, port: int) -> socket.socket:
    version6 = len(address) == 16
    end = socket.socket(socket.AF_INET6 if version6 else socket.AF_INET, kind)
    try:
        end.setblocking(False)
        if version6:
            end.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        else:
            end.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        if kind == socket.SOCK_STREAM:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.bind((as_text(address), port))
    except OSError:
        end.close()
        raise
    return end


def _quiet_ipv6(interface: str) -> None:
    """Keeps the kernel from talking on the device: no link-local address, no solicitations."""
    devices.write_setting(f"ipv6/conf/{interface}/addr_gen_mode", "1")
    devices.write_setting(f"ipv6/conf/{interface}/accept_ra", "0")
    devices.write_setting(f"ipv6/conf/{interface}/router_solicitations", "0")

"""Looks at this machine for `vnet diag`. Everything may raise OSError; nothing is changed."""

import contextlib
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from ipaddress import IPv4Network, ip_address
from pathlib import Path
from typing import Final

import msgspec

from supervisor.diag.facts import (
    Ipv6Facts,
    LeftoverFacts,
    PortFacts,
    ResolverFacts,
    RouteFacts,
    SshFacts,
    Surroundings,
)
from supervisor.diag.model import CannotCheckError
from supervisor.diag.port_check import Listening, holders_of, parse_sockets
from supervisor.diag.route_check import is_stable, own_routes
from supervisor.diag.ssh_check import MAX_CONFIG_BYTES
from supervisor.network import DNS_HOST
from supervisor.osconfig.bus_facts import dbus_facts
from supervisor.osconfig.choose import Facts, choose
from supervisor.osconfig.journal import JOURNAL, LOCK
from supervisor.osconfig.networkmanager import DROP_IN
from supervisor.osconfig.os_settings import NSSWITCH
from supervisor.osconfig.resolv_conf import MARK, nameservers
from supervisor.osconfig.resolv_conf_backend import RESOLV_CONF
from supervisor.osconfig.resolvconf_backend import RECORD, find_resolvconf
from supervisor.osconfig.route_conflicts import HostRoutes
from supervisor.ssh_config_include import find_inclusion
from supervisor.status import NetworkStatus
from supervisor.this_system import HostNetwork

# How often routes are read until there are some of VNet's, and until they are what VNet says.
ROUTE_READS: Final = 3
ROUTE_PAUSE_SECONDS: Final = 0.5
MAX_TEXT_BYTES: Final = 256 * 1024
# /proc/net of a machine with many connections, and the journal.
MAX_LARGE_BYTES: Final = 16 << 20
SSH_CONFIG_NAME: Final = "vnet_ssh_config"
_RECORDS: Final = tuple(
    Path(folder) / RECORD
    for folder in (
        "/run/resolvconf/interface",
        "/run/resolvconf/interfaces",
        "/run/resolvconf/keys",
    )
)
_PROC_NET: Final = ("udp", "udp6", "tcp", "tcp6")


def gather_routes(network: NetworkStatus) -> RouteFacts:
    """Routes, read again while they are not what VNet says: at most 5 s."""
    with contextlib.closing(HostNetwork()) as kernel:
        names = {name for _, name in socket.if_nameindex()}
        if network.interface not in names:
            return RouteFacts(HostRoutes(), has_interface=False)
        for number in range(ROUTE_READS):
            if number:
                time.sleep(ROUTE_PAUSE_SECONDS)
            host = _read_routes(kernel, network.interface)
            if is_stable(host, network.interface, network.ipv4_cidr_ranges):
                break
        ways = []
        for text in network.ipv4_cidr_ranges:
            way = kernel.way_to(IPv4Network(text)[DNS_HOST + 1].packed)
            ways.append((text, way.interface, way.problem))
        for address in (text for text in network.dns_addresses if ":" in text):
            way = kernel.way_to(ip_address(address).packed)
            ways.append((network.ipv6_prefix or address, way.interface, way.problem))
    return RouteFacts(host, has_interface=True, ways=tuple(ways))


def _read_routes(kernel: HostNetwork, interface: str) -> HostRoutes:
    host = kernel.read()
    for _ in range(ROUTE_READS - 1):
        if own_routes(host, interface):
            break
        time.sleep(ROUTE_PAUSE_SECONDS)
        host = kernel.read()
    return host


def gather_ipv6(interface: str) -> Ipv6Facts:
    """The sysctl `disable_ipv6` of the machine and of an interface."""
    return Ipv6Facts(_switch("all"), _switch(interface))


def _switch(name: str) -> bool | None:
    try:
        return _read(Path("/proc/sys/net/ipv6/conf") / name / "disable_ipv6").strip() != "0"
    except OSError:
        # Without IPv6 in the kernel there is no such file.
        return None


def gather_ssh(user_home: Path, teleport_home: Path) -> SshFacts:
    """The user's configuration of OpenSSH.

    Raises:
        CannotCheckError: it is too large, or no UTF-8.
    """
    path, wanted = user_home / ".ssh" / "config", teleport_home / SSH_CONFIG_NAME
    try:
        data = _read_bytes(path, MAX_CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return SshFacts(path, wanted, None)
    if len(data) >= MAX_CONFIG_BYTES:
        raise CannotCheckError(f"{path} has {MAX_CONFIG_BYTES} bytes or more: make it smaller")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise CannotCheckError(f"{path} is no UTF-8: save it in that encoding") from error
    return SshFacts(path, wanted, text, find_inclusion(text, wanted, user_home))


def gather_resolver(wanted: str) -> ResolverFacts:
    """What VNet would use on this system with this `dns.os_integration`; asks the bus, 2 s at most."""
    installed = find_resolvconf()
    choice = choose(
        wanted,
        Facts(
            bus=dbus_facts(),
            target=str(RESOLV_CONF.resolve()) if RESOLV_CONF.is_symlink() else "",
            text=_read_or_empty(RESOLV_CONF),
            nsswitch=_read_or_empty(NSSWITCH),
            resolvconf=installed[1] if installed else None,
        ),
    )
    return ResolverFacts(choice.backend, choice.reasons, choice.problem)


def gather_leftovers(state_dir: Path) -> LeftoverFacts:
    """The journal and the files that VNet marks as its own."""
    marks = {}
    if MARK.strip() in _read_or_empty(RESOLV_CONF):
        marks["resolv.conf"] = str(RESOLV_CONF)
    if DROP_IN.exists():
        marks["networkmanager"] = str(DROP_IN)
    for record in _RECORDS:
        if record.exists():
            marks["resolvconf"] = str(record)
    changes: tuple[str, ...] | None
    try:
        changes = _read_changes(_read_bytes(state_dir / JOURNAL, MAX_LARGE_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        changes = ()
    except PermissionError:
        changes = None
    return LeftoverFacts(state_dir, changes, marks, _is_held(state_dir / LOCK))


def _read_changes(data: bytes) -> tuple[str, ...]:
    try:
        pages = msgspec.json.decode(data, type=dict[str, object])
        entries = msgspec.convert(pages.get("changes", []), list[dict[str, object]])
    except (msgspec.MsgspecError, ValueError):
        return ("a journal that cannot be read",)
    return tuple(str(entry.get("path") or entry.get("action") or "?") for entry in entries)


def _is_held(lock: Path) -> bool:
    """Whether a VNet has the state directory; False also if that may not be seen."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # Shared, and let go of at once: a VNet that starts tries for longer than that.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def gather_ports() -> PortFacts:
    """Sockets on port 53 of this network namespace, with their processes as far as they are seen."""
    sockets: list[Listening] = []
    for name in _PROC_NET:
        with contextlib.suppress(FileNotFoundError):
            text = _read_bytes(Path("/proc/net") / name, MAX_LARGE_BYTES).decode(errors="replace")
            sockets += parse_sockets(name, text)
    owners = _owners({found.inode for found in sockets}) if sockets else {}
    servers = tuple(address for address, _ in nameservers(_read_or_empty(RESOLV_CONF)))
    return PortFacts(tuple(holders_of(sockets, owners)), servers)


def _owners(inodes: set[int]) -> dict[int, tuple[int, str]]:
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, tuple[int, str]] = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        # Processes of others, and those that have just ended.
        with contextlib.suppress(OSError):
            for link in _links(process / "fd"):
                if link in wanted and wanted[link] not in found:
                    name = _read(process / "comm").strip()
                    found[wanted[link]] = int(process.name), name
        if len(found) == len(wanted):
            break
    return found


def _links(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            yield str(path.readlink())


def gather_surroundings() -> Surroundings:
    """Samples of what tells containers and WSL; each is left out where it may not be read."""
    init_environment = b""
    with contextlib.suppress(OSError):
        init_environment = _read_bytes(Path("/proc/1/environ"), MAX_TEXT_BYTES)
    containerenv = Path("/run/.containerenv")
    return Surroundings(
        kernel=_read_or_empty(Path("/proc/version")),
        init_environment=init_environment,
        manager=_read_or_empty(Path("/run/host/container-manager"))
        or _read_or_empty(Path("/run/systemd/container")),
        has_dockerenv=Path("/.dockerenv").exists(),
        containerenv=_read_or_empty(containerenv) if containerenv.exists() else None,
        has_openvz=Path("/proc/vz").exists() and not Path("/proc/bc").exists(),
        cgroups=_read_or_empty(Path("/proc/1/cgroup")),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        resolv_conf=_read_or_empty(RESOLV_CONF),
        mounts=_read_or_empty(Path("/proc/self/mountinfo")),
        has_tun=Path("/dev/net/tun").exists(),
        is_root=os.geteuid() == 0,
        capabilities=_capabilities(_read_or_empty(Path("/proc/self/status"))),
    )


def _capabilities(status: str) -> int | None:
    """The effective capabilities in the text of /proc/self/status."""
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return None


# -- files --


def _read_or_empty(path: Path) -> str:
    try:
        return _read(path)
    except OSError:
        return ""


def _read(path: Path) -> str:
    return _read_bytes(path, MAX_TEXT_BYTES).decode(errors="replace")


def _read_bytes(path: Path, limit: int) -> bytes:
    """At most `limit` bytes. Of anything but a regular file: an OSError, and no waiting."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:  # noqa: PTH123  # from a descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        return file.read(limit)

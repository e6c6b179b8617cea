"""Makes VNet's link, or goes on with one that is there: handed over, or kept by the service manager.

`VNET_DATA_PLANE` in the supervisor's environment says how packets get to the sockets: `namespace`,
`rewriting`, or `auto` (the default), which rewrites only where a namespace cannot be made.
"""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Network, ip_address
from pathlib import Path
from typing import Final

from ipc.messages import DataPlaneKind, Network
from supervisor import network, own_range, places, this_system
from supervisor.dataplane import DataPlane, KeptLink, UnfitLinkError
from supervisor.exits import MisconfiguredError, StartupError
from supervisor.handover import Handover
from supervisor.link_store import LinkStore
from supervisor.nameservers import find_servers
from supervisor.namespace_plane import NamespaceDataPlane, NoNamespaceError
from supervisor.rewriting_plane import RewritingDataPlane
from supervisor.settings import Settings

log = logging.getLogger(__name__)

WISH_VARIABLE: Final = "VNET_DATA_PLANE"
Upstream = Callable[[], list[tuple[str, int, str]] | None]


def make(
    settings: Settings, handed: Handover | None, store: LinkStore, upstream: Upstream
) -> tuple[DataPlane, Network]:
    """The data plane and the plan that is in force, with the ranges that are routed already.

    Raises:
        StartupError: it cannot be made.
    """
    if handed is not None:
        devices = handed.devices
        link = KeptLink(
            network=handed.network,
            outer=devices.outer,
            inner=devices.inner,
            namespace=devices.namespace,
            dns=tuple(devices.dns),
        )
        try:
            return _adopt(link), handed.network
        except UnfitLinkError as error:
            raise StartupError(f"the link cannot be taken over: {error}") from error
    wish = wished(os.environ)
    config = settings.config.network
    prefix = places.ipv6_prefix(settings.state_dir) if _has_ipv6(config.ipv6) else None
    plan = network.plan(config, prefix, _own_range(settings, store, upstream))
    stored = store.take(plan, wish)
    if stored is not None:
        try:
            adopted = _adopt(stored)
        except UnfitLinkError as error:
            log.warning("the link that the service manager kept is made anew: %s", error)
        else:
            log.info("the link that the service manager kept stays up")
            return adopted, adopted.keep().network
    made = _make(plan, wish)
    return made, made.keep().network if made.kind is DataPlaneKind.REWRITING else plan


def wished(environment: Mapping[str, str]) -> DataPlaneKind | None:
    """The kind that the environment asks for; None for whichever works.

    Raises:
        MisconfiguredError: it asks for something else.
    """
    text = environment.get(WISH_VARIABLE) or "auto"
    if text == "auto":
        return None if sys.platform == "linux" else DataPlaneKind.REWRITING
    try:
        return DataPlaneKind(text)
    except ValueError as error:
        known = ", ".join(["auto", *DataPlaneKind])
        raise MisconfiguredError([f"{WISH_VARIABLE}: {text!r} is none of {known}"]) from error


def _make(plan: Network, wish: DataPlaneKind | None) -> DataPlane:
    if wish is not DataPlaneKind.REWRITING:
        try:
            return NamespaceDataPlane(plan)
        except NoNamespaceError as error:
            if wish is not None:
                raise
            log.warning(
                "packets are rewritten, and a firewall has to let in what comes from %s: %s",
                plan.interface,
                error,
            )
    return RewritingDataPlane(plan, this_system.host())


def _adopt(link: KeptLink) -> DataPlane:
    """Raises UnfitLinkError."""
    if link.kind is DataPlaneKind.REWRITING:
        return RewritingDataPlane.adopt(link, this_system.host())
    return NamespaceDataPlane.adopt(link)


def _own_range(settings: Settings, store: LinkStore, upstream: Upstream) -> IPv4Network | None:
    """VNet's own range; None where the configuration alone says it.

    Raises:
        ConflictError: it is used by something else.
    """
    config, state_dir = settings.config, settings.state_dir
    is_auto = config.network.ipv4_cidr_range == "auto"
    kept = own_range.read(state_dir)
    if store.has_link:
        # It goes on; what has come in its way meanwhile is told like any other change.
        return kept if is_auto else None
    servers = find_servers(config.dns.upstream, upstream())
    addresses = [ip_address(address) for address, _, _ in servers]
    try:
        host = this_system.read_host()
    except OSError as error:
        raise StartupError(f"the routes of this machine cannot be read: {error}") from error
    chosen = own_range.choose(
        config.network,
        host,
        kept,
        settings.user.uid,
        [address for address in addresses if isinstance(address, IPv4Address)],
    )
    if is_auto:
        own_range.write(state_dir, chosen)
    return chosen


def _has_ipv6(wish: str) -> bool:
    if wish == "off":
        return False
    # Elsewhere there is no switch: what the interface does not take is found out when it is set up.
    has_it = sys.platform != "linux" or (
        Path("/proc/net/if_inet6").exists()
        and not any(
            _is_set(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6") for name in ("all", "default")
        )
    )
    if not has_it:
        level = logging.WARNING if wish == "on" else logging.INFO
        log.log(level, "this host has IPv6 switched off; VNet uses IPv4 only")
    return has_it


def _is_set(path: str) -> bool:
    try:
        return Path(path).read_text().strip() == "1"
    except OSError:
        return False

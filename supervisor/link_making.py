"""Makes VNet's link, or goes on with one that is there: handed over, or kept by the service manager."""

import logging
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, ip_address
from pathlib import Path

from ipc.messages import Network
from supervisor import host_network, network, own_range, places
from supervisor.dataplane import KeptLink, NamespaceDataPlane, UnfitLinkError
from supervisor.exits import StartupError
from supervisor.handover import Handover
from supervisor.link_store import LinkStore
from supervisor.nameservers import find_servers
from supervisor.settings import Settings

log = logging.getLogger(__name__)

Upstream = Callable[[], list[tuple[str, int, str]] | None]


def make(
    settings: Settings, handed: Handover | None, store: LinkStore, upstream: Upstream
) -> tuple[NamespaceDataPlane, Network]:
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
            return NamespaceDataPlane.adopt(link), handed.network
        except UnfitLinkError as error:
            raise StartupError(f"the link cannot be taken over: {error}") from error
    config = settings.config.network
    prefix = places.ipv6_prefix(settings.state_dir) if _has_ipv6(config.ipv6) else None
    plan = network.plan(config, prefix, _own_range(settings, store, upstream))
    stored = store.take(plan)
    if stored is not None:
        try:
            adopted = NamespaceDataPlane.adopt(stored)
        except UnfitLinkError as error:
            log.warning("the link that the service manager kept is made anew: %s", error)
        else:
            log.info("the link that the service manager kept stays up")
            return adopted, adopted.keep().network
    return NamespaceDataPlane(plan), plan


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
        host = host_network.read_host()
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
    has_it = Path("/proc/net/if_inet6").exists() and not any(
        _is_set(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6") for name in ("all", "default")
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

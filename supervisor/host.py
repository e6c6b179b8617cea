"""VNet's part in this machine, and what of the machine VNet follows.

    clusters  -->  zones, ranges  -->  the system's resolver, routes
    nameservers, routes of others, IPv6, suspend, accounts  -->  what workers are told

The link is made before, and outlives this.
"""

import contextlib
import logging
import selectors
import socket
from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol

import msgspec

from ipc import messages as m
from ipc.permits import Role
from supervisor import configure, network
from supervisor.access import Security
from supervisor.cluster_follower import ClusterFollower
from supervisor.dataplane import DataPlane
from supervisor.exits import StartupError
from supervisor.forwarding import ForwardedNetworks
from supervisor.link_store import LinkStore
from supervisor.nameservers import Nameservers
from supervisor.network_watch import HostChange, NetworkWatch, Outsider
from supervisor.osconfig.os_settings import OsSettings
from supervisor.osconfig.wish import ResolverWish
from supervisor.settings import Settings

log = logging.getLogger(__name__)

# Everybody but those who serve metrics.
_NETWORK_ROLES: Final = frozenset({Role.TUN, Role.DNS, Role.PROXY})
_SECURITY_ROLES: Final = frozenset({Role.DNS, Role.PROXY})


class Tell(Protocol):
    """Sends a message to every worker of some roles."""

    def __call__(self, message: m.Message, roles: Collection[Role]) -> None: ...


class Host:
    """See the module. `plan` is the network of the link, with all it could have.

    `is_served()` says whether anybody answers DNS questions: without, the system is better off when
    it does not know of VNet.
    """

    def __init__(
        self,
        settings: Settings,
        data_plane: DataPlane,
        plan: m.Network,
        *,
        os_settings: OsSettings,
        link_store: LinkStore,
        tell: Tell,
        is_served: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._data_plane = data_plane
        self._os_settings = os_settings
        self._link_store = link_store
        self._tell = tell
        self._is_served = is_served
        self._nameservers = Nameservers(
            settings.config.dns.upstream, network.dns_addresses(plan), os_settings.upstream
        )
        in_force = plan if data_plane.has_ipv6 else network.without_ipv6(plan)
        self.security = Security(settings.user)
        self.access = self._find_access(in_force.interface)
        self.forwarded = ForwardedNetworks(data_plane)
        self.network = self._with_forwarded(in_force)
        self.clusters = ClusterFollower(
            settings.state_dir / f"clusters-{settings.user.name}.json",
            data_plane,
            network=lambda: self.network,
            upstream=lambda: [server.address for server in self.upstream],
            in_the_way=lambda block, *, is_routed: self.watch.in_the_way(
                block, is_routed=is_routed
            ),
            use_ranges=self._use_ranges,
            forget_names=lambda: self._tell(m.NamesChanged(), {Role.DNS}),
        )

    def begin_watch(self, closing: contextlib.ExitStack, selector: selectors.BaseSelector) -> None:
        """Hears of changes of the machine's network from now on.

        Raises:
            StartupError: the system does not tell.
        """
        try:
            self.watch = NetworkWatch(
                self._data_plane,
                network=lambda: self.network,
                outsiders=self._outsiders,
                user=self._settings.user.uid,
                is_auto=self._settings.config.network.ipv4_cidr_range == "auto",
            )
        except OSError as error:
            raise StartupError(f"this machine's network cannot be watched: {error}") from error
        closing.callback(self.watch.close)
        selector.register(self.watch, selectors.EVENT_READ, lambda _events: self.watch.hear())

    @property
    def upstream(self) -> list[m.Upstream]:
        """The nameservers that questions for other names go to."""
        return self._nameservers.upstream

    def _outsiders(self) -> Sequence[Outsider]:
        """Who is reached through the host's network and never through VNet."""
        proxies = [a for cluster in self.clusters.known for a in cluster.proxy_addresses]
        return [
            *(("The nameserver", server.address) for server in self.upstream),
            *(("The Teleport proxy", address) for address in dict.fromkeys(proxies)),
        ]

    # -- what has changed --

    def tick(self, now: float) -> None:
        """Takes over what the resolver, the nameservers and the clusters have become."""
        self._follow_nameservers(now)
        self.want_resolver()
        if self.security.back_end != self._os_settings.backend_name:
            self._use_security()

    def _follow_nameservers(self, now: float) -> None:
        if self._nameservers.has_changed(now):
            self._tell(m.UpstreamChanged(upstream=self.upstream), {Role.DNS})
            self.clusters.follow()  # a range may cover the new ones

    def follow_network(self, now: float) -> None:
        """Takes over what the machine's network has become."""
        change = self.watch.tick(now)
        if change is None:
            return
        self._use_ipv6(change)
        self.clusters.follow()
        if change.has_moved:
            # Answers of another network's nameservers, and of before a long sleep.
            self._tell(m.NamesChanged(), {Role.DNS})

    def use_settings(self, settings: Settings, now: float) -> None:
        """Takes over what can change while VNet runs; all workers have been told of it then."""
        before, self._settings = self._settings.config, settings
        config = settings.config
        self._use_security()
        self._nameservers.configure(config.dns.upstream)
        self._follow_nameservers(now)
        listed = config.security.allow_forwarded_from
        # What could not be routed before may be now.
        if listed != before.security.allow_forwarded_from or self.forwarded.warnings:
            self._use_network(self.network)

    def want_resolver(self) -> None:
        """The system's resolver is to be as it should be now."""
        zones = tuple(self.clusters.zones) if self._is_served() else ()
        interface, addresses = self.network.interface, tuple(network.dns_addresses(self.network))
        self._os_settings.want(ResolverWish(interface, _index_of(interface), zones, addresses))

    # -- who may connect --

    def _use_security(self) -> None:
        """Also when the configuration is as it was: accounts and members of groups change."""
        self.access = self._find_access(self.network.interface)
        rules = configure.http_rules(self._settings.config)
        self._tell(m.SecurityChanged(access=self.access, http=rules), _SECURITY_ROLES)

    def _find_access(self, interface: str) -> m.Access:
        return self.security.look_up(
            self._settings.config.security, _index_of(interface), self._os_settings.backend_name
        )

    # -- the network in force --

    def _use_ipv6(self, change: HostChange) -> None:
        if change.has_ipv6 == (self.network.ipv6_prefix is not None):
            return
        whole = self._data_plane.keep().network
        ranges = self.network.ranges
        chosen = whole if change.has_ipv6 else network.without_ipv6(whole)
        log.info(
            "%s is %s IPv6 now", self.network.interface, "with" if change.has_ipv6 else "without"
        )
        self._use_network(msgspec.structs.replace(chosen, ranges=ranges))

    def _use_ranges(self, ranges: list[str]) -> None:
        self._use_network(msgspec.structs.replace(self.network, ranges=ranges))

    def _with_forwarded(self, changed: m.Network) -> m.Network:
        """The same with the forwarded networks that can be in force; the way back to them is routed."""
        listed = self._settings.config.security.allow_forwarded_from
        return self.forwarded.put_into_force(listed, changed)

    def _use_network(self, changed: m.Network) -> None:
        self.network = self._with_forwarded(changed)
        # The link keeps its IPv6 addresses while they are of no use.
        whole = self._data_plane.keep().network
        self._link_store.keep_plan(msgspec.structs.replace(whole, ranges=changed.ranges))
        self._tell(m.NetworkChanged(network=self.network), _NETWORK_ROLES)


def _index_of(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        return 0

"""What a name stands for. Pure; `workers.proxy.teleport.client` finds it out."""

from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import TypeAlias

from workers.proxy.teleport.apps import App
from workers.proxy.teleport.databases import Database


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose login it is. Connections made with a login end when it does."""

    profile: str
    user: str
    root_cluster: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a target is. `leaf` is empty for the root cluster; `ipv4_range` None for VNet's own."""

    profile: str
    root_cluster: str
    leaf: str
    ipv4_range: IPv4Network | None

    @property
    def cluster(self) -> str:
        """The cluster that has the target."""
        return self.leaf or self.root_cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class AppTarget(_Place):
    """A TCP app."""

    app: App


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseTarget(_Place):
    """A database at `<id>.db.<proxy>`."""

    database: Database


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterTarget(_Place):
    """A name below a cluster's: a host, or an app that does not exist yet. Decided per connection.

    `host` is what stands before the cluster's name.
    """

    host: str


@dataclass(frozen=True, slots=True)
class WebApp:
    """A web app's name: the ordinary DNS leads to the proxy, which serves it. None of VNet's."""

    profile: str
    name: str


@dataclass(frozen=True, slots=True)
class NotOurs:
    """None of VNet's business: forward the question upstream."""


@dataclass(frozen=True, slots=True)
class NoSuchName:
    """In VNet's own part of the name space, and nothing has it: NXDOMAIN."""


Target: TypeAlias = AppTarget | DatabaseTarget | ClusterTarget
Resolution: TypeAlias = Target | WebApp | NotOurs | NoSuchName

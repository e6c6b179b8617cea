"""Which role may say what on which conversation, as data. Pure.

A message that is not in its row ends the conversation: the receiver treats the sender as
compromised and the supervisor replaces it (docs/architecture.md).
"""

from enum import StrEnum
from typing import Final

from ipc import messages as m
from ipc import slots


class Role(StrEnum):
    """Who speaks."""

    SUPERVISOR = "supervisor"
    TUN = "tun"
    DNS = "dns"
    PROXY = "proxy"
    METRICS = "metrics"


def role_of(slot: str) -> Role:
    """The role of a worker slot: `proxy-1` and `ssh` are proxies.

    Raises:
        ValueError: no role has that name.
    """
    return Role.PROXY if slot == slots.SSH else Role(slot.split("-", 1)[0])


# (speaker, listener) -> what may be said.
PERMITS: Final[dict[tuple[Role, Role], frozenset[type[m.Message]]]] = {
    (Role.TUN, Role.PROXY): frozenset({m.DialRequest, m.DialAbandoned}),
    (Role.PROXY, Role.TUN): frozenset({m.ProxyHello, m.DialVerdict}),
    (Role.DNS, Role.PROXY): frozenset({m.ResolveName, m.ResolveAddress}),
    (Role.PROXY, Role.DNS): frozenset({m.NameResolved, m.AddressResolved}),
    (Role.SUPERVISOR, Role.TUN): frozenset(
        {
            m.ConfigureTun,
            m.NetworkChanged,
            m.RedirectsChanged,
            m.SetLogLevel,
            m.Sync,
            m.Drain,
            m.TakeOver,
            m.Stop,
        }
    ),
    (Role.SUPERVISOR, Role.DNS): frozenset(
        {
            m.ConfigureDns,
            m.NetworkChanged,
            m.UpstreamChanged,
            m.NamesChanged,
            m.SecurityChanged,
            m.SetLogLevel,
            m.Sync,
            m.Drain,
            m.TakeOver,
            m.Stop,
        }
    ),
    (Role.SUPERVISOR, Role.PROXY): frozenset(
        {
            m.ConfigureProxy,
            m.NetworkChanged,
            m.SecurityChanged,
            m.ListenerOpened,
            m.ListenerRefused,
            m.SetLogLevel,
            m.Sync,
            m.Drain,
            m.TakeOver,
            m.Stop,
        }
    ),
    (Role.SUPERVISOR, Role.METRICS): frozenset(
        {m.ConfigureMetrics, m.MetricsSnapshot, m.SetLogLevel, m.Sync, m.Drain, m.TakeOver, m.Stop}
    ),
    (Role.METRICS, Role.SUPERVISOR): frozenset(
        {m.Confined, m.Ready, m.HandedOver, m.Heartbeat, m.Synced}
    ),
    (Role.TUN, Role.SUPERVISOR): frozenset(
        {m.Confined, m.Ready, m.HandedOver, m.Heartbeat, m.Synced, m.PeerMisbehaved}
    ),
    (Role.DNS, Role.SUPERVISOR): frozenset(
        {m.Confined, m.Ready, m.HandedOver, m.Heartbeat, m.Synced, m.PeerMisbehaved}
    ),
    (Role.PROXY, Role.SUPERVISOR): frozenset(
        {
            m.Confined,
            m.NeedsRestart,
            m.Ready,
            m.HandedOver,
            m.Heartbeat,
            m.Synced,
            m.OpenListener,
            m.CloseListener,
            m.ClustersReported,
            m.PeerMisbehaved,
        }
    ),
}


def is_permitted(speaker: Role, listener: Role, message: m.Message) -> bool:
    """Whether `speaker` may send this message to `listener`."""
    return type(message) in PERMITS.get((speaker, listener), frozenset())

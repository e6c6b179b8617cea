"""How each key of the configuration takes effect while VNet runs. Pure.

The table has a row for every key; docs/tables.md is drawn from it.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from ipc.permits import Role
from supervisor.config import Config

Key = tuple[str, str]  # section ("" for the top level) and name


class Effect(StrEnum):
    """What a changed key needs."""

    AT_ONCE = "at once"
    REPLACES_DNS = "when the dns worker has been replaced, which loses no query"
    REPLACES_PROXIES = "when the proxies have been replaced; open connections go on in the old ones"
    REPLACES_ALL = "when all workers have been replaced; open connections go on"
    RESTART = "when VNet is restarted"


_REPLACED: Final[dict[Effect, frozenset[Role]]] = {
    Effect.REPLACES_DNS: frozenset({Role.DNS}),
    Effect.REPLACES_PROXIES: frozenset({Role.PROXY}),
    Effect.REPLACES_ALL: frozenset({Role.TUN, Role.PROXY, Role.DNS, Role.METRICS}),
}

EFFECTS: Final[dict[Key, Effect]] = {
    ("", "user"): Effect.RESTART,
    ("", "teleport_home"): Effect.REPLACES_PROXIES,
    ("network", "interface"): Effect.RESTART,
    ("network", "mtu"): Effect.RESTART,
    ("network", "ipv4_cidr_range"): Effect.RESTART,
    ("network", "ipv6"): Effect.RESTART,
    ("dns", "upstream"): Effect.AT_ONCE,
    ("dns", "ttl_seconds"): Effect.REPLACES_DNS,
    ("dns", "os_integration"): Effect.RESTART,
    # The number decides which proxy owns an address.
    ("proxy", "workers"): Effect.RESTART,
    ("proxy", "max_connections"): Effect.REPLACES_PROXIES,
    ("teleport", "ca_file"): Effect.REPLACES_PROXIES,
    ("teleport", "insecure"): Effect.REPLACES_PROXIES,
    ("teleport", "mfa_seconds"): Effect.REPLACES_PROXIES,
    ("supervisor", "restart_max"): Effect.AT_ONCE,
    ("supervisor", "restart_window_seconds"): Effect.AT_ONCE,
    ("supervisor", "heartbeat_seconds"): Effect.REPLACES_ALL,
    ("supervisor", "hang_seconds"): Effect.AT_ONCE,
    ("supervisor", "drain_seconds"): Effect.AT_ONCE,
    ("security", "allow_users"): Effect.AT_ONCE,
    ("security", "allow_groups"): Effect.AT_ONCE,
    ("security", "allow_forwarded_from"): Effect.AT_ONCE,
    ("security", "http_check"): Effect.AT_ONCE,
    ("security", "http_hosts"): Effect.AT_ONCE,
    ("security", "http_origins"): Effect.AT_ONCE,
    ("metrics", "listen"): Effect.AT_ONCE,
}


@dataclass(frozen=True, slots=True)
class ReloadPlan:
    """What a reload does: `config` is in force afterwards, `waiting` names keys that are not."""

    config: Config
    replaced: frozenset[Role]
    changed: list[str]
    waiting: list[str]


def plan(old: Config, new: Config) -> ReloadPlan:
    """From the configuration in force to a new one, as far as that goes while VNet runs."""
    changed = [key for key in EFFECTS if _value(old, key) != _value(new, key)]
    waiting = [key for key in changed if EFFECTS[key] is Effect.RESTART]
    config = new
    for section, name in waiting:
        config = _with(config, section, name, _value(old, (section, name)))
    replaced: set[Role] = set()
    for key in changed:
        replaced |= _REPLACED.get(EFFECTS[key], frozenset())
    return ReloadPlan(
        config,
        frozenset(replaced),
        [full_name(key) for key in changed if key not in waiting],
        [full_name(key) for key in waiting],
    )


def full_name(key: Key) -> str:
    """The key as users write it: `dns.upstream`."""
    section, name = key
    return f"{section}.{name}" if section else name


def _value(config: Config, key: Key) -> object:
    section, name = key
    return getattr(getattr(config, section) if section else config, name)


def _with(config: Config, section: str, name: str, value: object) -> Config:
    if not section:
        return msgspec.structs.replace(config, **{name: value})
    part = msgspec.structs.replace(getattr(config, section), **{name: value})
    return msgspec.structs.replace(config, **{section: part})

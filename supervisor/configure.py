"""The first message to each worker: its own part of the configuration. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ipc import messages as m
from ipc.curve import make_key_pair
from ipc.permits import Role, role_of
from ipc.slots import METRICS, SSH, of_numbered, of_proxies
from supervisor.config import Config
from supervisor.settings import Settings

# Of one message; the largest fits into one datagram (`ipc.codec`).
MAX_REDIRECTS = 1000
# Held SYNs: more programs than this do not connect at the same moment.
MAX_PENDING = 1024
# How long a connect may wait for certificate and dial. A certificate may take a second factor, which
# a person has at most 110 s to give (`supervisor.config`); Linux repeats a SYN for 127 s. Without a person everything has shorter
# limits of its own (`workers.proxy.admission`).
PENDING_SECONDS = 120.0


# Nobody may connect.
_NOBODY = m.Access(uids=[])
# Of who takes no part in the bus.
_NO_KEYS = m.BusKeys(public="-" * 40, secret="-" * 40, peers={})


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a configuration is made from, beside the settings."""

    network: m.Network
    upstream: list[m.Upstream]
    keys: dict[str, m.BusKeys]
    bus_dir: Path
    book_path: Path
    prompts_dir: Path
    max_listeners: int = 1  # of each proxy
    data_plane: m.DataPlaneKind = m.DataPlaneKind.NAMESPACE
    has_family_header: bool = False
    access: m.Access = _NOBODY


def slots(proxies: int) -> list[str]:
    """The slots of all workers that VNet cannot be without, in the order in which they are started."""
    return ["tun", *of_proxies(proxies), "dns"]


def make_keys(proxies: int) -> dict[str, m.BusKeys]:
    """A key pair per slot; the peers of each are only those it talks with (`ipc.permits`)."""
    pairs = {slot: make_key_pair() for slot in slots(proxies)}
    peers_of = {"tun": of_proxies(proxies), "dns": of_numbered(proxies), SSH: ["tun"]}
    keys = {}
    for slot, (public, secret) in pairs.items():
        peers = peers_of.get(slot, ["tun", "dns"])
        keys[slot] = m.BusKeys(
            public=public, secret=secret, peers={peer: pairs[peer][0] for peer in peers}
        )
    return keys


def configuration(
    slot: str,
    settings: Settings,
    around: Surroundings,
    log_level: str,
    *,
    is_standby: bool = False,
) -> m.ConfigureTun | m.ConfigureDns | m.ConfigureProxy | m.ConfigureMetrics:
    """The configuration of one worker."""
    config = settings.config
    common = m.Common(
        slot=slot,
        proxies=config.proxy.workers,
        bus_dir=str(around.bus_dir),
        keys=_NO_KEYS if slot == METRICS else around.keys[slot],
        heartbeat_seconds=config.supervisor.heartbeat_seconds,
        log_level=log_level,
        is_standby=is_standby,
    )
    match role_of(slot):
        case Role.TUN:
            return m.ConfigureTun(
                common=common,
                network=around.network,
                max_pending=MAX_PENDING,
                pending_seconds=PENDING_SECONDS,
                data_plane=around.data_plane,
                has_family_header=around.has_family_header,
            )
        case Role.DNS:
            return m.ConfigureDns(
                common=common,
                network=around.network,
                upstream=around.upstream,
                ttl_seconds=config.dns.ttl_seconds,
                access=around.access,
            )
        case Role.METRICS:
            return m.ConfigureMetrics(common=common)
        case _:
            return m.ConfigureProxy(
                common=common,
                network=around.network,
                teleport_home=str(settings.teleport_home),
                book_path=str(around.book_path),
                prompts_dir=str(around.prompts_dir),
                max_listeners=around.max_listeners,
                max_connections=-(-config.proxy.max_connections // config.proxy.workers),
                ca_file=expand(config.teleport.ca_file, settings.user.home),
                insecure=config.teleport.insecure,
                mfa_seconds=config.teleport.mfa_seconds,
                http=http_rules(config),
                access=around.access,
            )


def http_rules(config: Config) -> m.HttpRules:
    """Which HTTP requests pass, as proxies are told it."""
    security = config.security
    return m.HttpRules(
        is_checked=security.http_check,
        hosts=security.http_hosts,
        origins=security.http_origins,
    )


def redirects(table: Sequence[m.Redirect]) -> Iterator[m.RedirectsChanged]:
    """The whole table, or what has changed in it, as messages to tun; at least one."""
    for start in range(0, max(1, len(table)), MAX_REDIRECTS):
        yield m.RedirectsChanged(
            redirects=list(table[start : start + MAX_REDIRECTS]),
            is_complete=start + MAX_REDIRECTS >= len(table),
        )


def expand(path: str, home: Path) -> str:
    """A path of the configuration, `~/` being the VNet user's."""
    return str(home / path[2:]) if path.startswith("~/") else path

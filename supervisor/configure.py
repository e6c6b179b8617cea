"""The first message to each worker: its own part of the configuration. Pure."""

from dataclasses import dataclass
from pathlib import Path

from ipc import messages as m
from ipc.curve import make_key_pair
from ipc.permits import Role, role_of
from supervisor.settings import Settings

# Held SYNs: more programs than this do not connect at the same moment.
MAX_PENDING = 1024
# How long a connect may wait for certificate and dial. A certificate may take a second factor, which
# a person has at most 110 s to give (`supervisor.config`); Linux repeats a SYN for 127 s. Without a person everything has shorter
# limits of its own (`workers.proxy.admission`).
PENDING_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a configuration is made from, beside the settings."""

    network: m.Network
    upstream: list[m.Upstream]
    keys: dict[str, m.BusKeys]
    bus_dir: Path
    book_path: Path
    prompts_dir: Path


def slots(proxies: int) -> list[str]:
    """All worker slots in the order in which they are started."""
    return ["tun", *(f"proxy-{index}" for index in range(proxies)), "dns"]


def make_keys(proxies: int) -> dict[str, m.BusKeys]:
    """A key pair per slot; the peers of each are only those it talks with (`ipc.permits`)."""
    pairs = {slot: make_key_pair() for slot in slots(proxies)}
    proxy_slots = [slot for slot in pairs if role_of(slot) is Role.PROXY]
    keys = {}
    for slot, (public, secret) in pairs.items():
        peers = ["tun", "dns"] if slot in proxy_slots else proxy_slots
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
) -> m.ConfigureTun | m.ConfigureDns | m.ConfigureProxy:
    """The configuration of one worker."""
    config = settings.config
    common = m.Common(
        slot=slot,
        proxies=config.proxy.workers,
        bus_dir=str(around.bus_dir),
        keys=around.keys[slot],
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
            )
        case Role.DNS:
            return m.ConfigureDns(
                common=common,
                network=around.network,
                upstream=around.upstream,
                ttl_seconds=config.dns.ttl_seconds,
            )
        case _:
            return m.ConfigureProxy(
                common=common,
                network=around.network,
                index=int(slot.rpartition("-")[2]),
                teleport_home=str(settings.teleport_home),
                user_home=str(settings.user.home),
                book_path=str(around.book_path),
                prompts_dir=str(around.prompts_dir),
                max_connections=-(-config.proxy.max_connections // config.proxy.workers),
                ca_file=expand(config.teleport.ca_file, settings.user.home),
                insecure=config.teleport.insecure,
                mfa_seconds=config.teleport.mfa_seconds,
            )


def expand(path: str, home: Path) -> str:
    """A path of the configuration, `~/` being the VNet user's."""
    return str(home / path[2:]) if path.startswith("~/") else path

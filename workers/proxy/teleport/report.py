"""What the supervisor is told of a cluster: for `vnet status`, and for routes and zones. Pure."""

from collections.abc import Iterable
from datetime import UTC, datetime

from ipc import messages
from ipc.messages import ClusterState
from workers.proxy.teleport.errors import safe_text
from workers.proxy.teleport.home import Login
from workers.proxy.teleport.member import Member
from workers.proxy.teleport.names import is_zone

# The report of a cluster takes so many.
MAX_ZONES = 200


def health(member: Member, *, is_in_question: bool) -> tuple[ClusterState, str]:
    """State of a cluster that may be asked, and what is wrong with it.

    `is_in_question`: it may be a leaf that is offline, and the root is being asked.
    """
    if not member.is_online:
        return ClusterState.UNREACHABLE, ""  # as usual as a machine that is switched off
    trouble, config = member.cluster.problem, member.cluster.config
    if trouble is not None and trouble.state is not None:
        return trouble.state, "" if is_in_question else str(trouble)
    if config is None or not config.problem:
        return ClusterState.OK, ""
    return ClusterState.OK, f"cluster {safe_text(member.cluster.name, 100)}: {config.problem}"


def report(
    login: Login,
    member: Member | None,
    state: ClusterState,
    problem: str,
    *,
    knows_leaves: bool,
    proxy_addresses: Iterable[bytes],
) -> messages.Cluster:
    """One cluster of a profile; without `member` the root, of which nothing is known.

    `knows_leaves`: whether the root has named its leaves. The addresses are the profile's.
    """
    leaf = member.leaf if member is not None else ""
    config = member.cluster.config if member is not None else None
    profile, credentials = login.profile, login.credentials
    root = credentials.identity.root_cluster if credentials is not None else ""
    name = leaf or root or (profile.cluster if profile is not None else login.name)
    names = ((name.lower(),) if leaf else (login.name, name.lower())) + (
        config.zones if config else ()
    )
    zones = dict.fromkeys(zone for zone in names if is_zone(zone))
    return messages.Cluster(
        name=safe_text(name, 253),
        profile=safe_text(login.name, 253),
        leaf_of=safe_text(root, 253) if leaf else None,
        state=state,
        user=safe_text(profile.user if profile is not None else "", 500),
        expires=_rfc3339(credentials.identity.not_after) if credentials is not None else None,
        zones=list(zones)[:MAX_ZONES],
        ranges=[str(config.ipv4_range)] if config and config.ipv4_range else [],
        is_configured=config is not None and (bool(leaf) or knows_leaves),
        proxy_addresses=[] if leaf else list(proxy_addresses),
        problem=safe_text(problem, 500),
    )


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

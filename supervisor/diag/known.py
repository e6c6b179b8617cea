"""What a running supervisor tells `vnet diag`. Pure: it has no time to look at anything."""

import msgspec

from ipc.messages import ClusterState
from supervisor.diag.facts import VnetFacts
from supervisor.run import ObservedRun
from supervisor.settings import Settings
from supervisor.status import Status

_NO_LOGIN = frozenset(
    {ClusterState.LOGIN_EXPIRED, ClusterState.NO_LOGIN, ClusterState.HARDWARE_KEY}
)


def known_of(supervisor: ObservedRun, status: Status) -> VnetFacts:
    """`status` is that of this moment."""
    report = supervisor.cluster_report()
    return msgspec.structs.replace(
        known_before(supervisor.settings, status),
        os_reasons=list(supervisor.os_reasons),
        os_problems=list(supervisor.os_problems),
        network_problems=list(supervisor.network_problems),
        login_problems=[c.problem for c in report.clusters if c.problem and c.state in _NO_LOGIN]
        if report
        else [],
    )


def known_before(settings: Settings, status: Status) -> VnetFacts:
    """The same while there is no network yet, and nothing that needs one."""
    return VnetFacts(
        status=status,
        teleport_home=str(settings.teleport_home),
        state_dir=str(settings.state_dir),
        ca_file=settings.config.teleport.ca_file,
        insecure=settings.config.teleport.insecure,
        os_wanted=settings.config.dns.os_integration,
        ipv6_wanted=settings.config.network.ipv6,
        os_reasons=[],
        os_problems=[],
        network_problems=[],
        login_problems=[],
    )

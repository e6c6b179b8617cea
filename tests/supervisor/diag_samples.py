"""Facts of a machine on which everything is well, for tests that change one of them."""

from typing import Any

import msgspec

from ipc.messages import ClusterState
from supervisor.diag.facts import VnetFacts
from supervisor.diag.model import CheckReport
from supervisor.status import (
    ClusterStatus,
    ConfinementStatus,
    Health,
    NetworkStatus,
    Status,
    SupervisorStatus,
    WorkerStatus,
)
from supervisor.worker_states import WorkerState

VERSION = "1.2.3"
NETWORK = NetworkStatus(
    interface="vnet0",
    mtu=65535,
    ipv4_cidr_ranges=["100.64.0.0/10", "10.5.0.0/16"],
    ipv6_prefix="fd00:1::",
    dns_addresses=["100.64.0.2", "fd00:1::2"],
    dns_zones=["a.test", "b.test"],
    os_integration="resolved",
    data_plane="namespace",
)
CONFINEMENT = ConfinementStatus(
    uid=1, no_new_privs=True, capabilities=[], landlock=4, seccomp="allow-list", missing=[]
)
WORKER = WorkerStatus(
    name="dns",
    pid=7,
    state=WorkerState.READY,
    restarts=0,
    uptime_seconds=1.0,
    heartbeat_age_seconds=0.1,
    rss_bytes=1,
    cpu_percent=0.0,
    last_exit=None,
    confinement=CONFINEMENT,
)
CLUSTER = ClusterStatus(
    name="root.test",
    profile="proxy.root.test",
    leaf_of=None,
    state=ClusterState.OK,
    user="alice",
    expires=None,
)


def vnet(*, network: dict[str, Any] | None = None, **changed: Any) -> VnetFacts:
    """What a VNet that is well says; `network` changes that part, others a part of status or facts."""
    status = Status(
        health=Health.HEALTHY,
        reasons=[],
        supervisor=SupervisorStatus(pid=1, version=VERSION, uptime_seconds=5.0, user="alice"),
        workers=[WORKER],
        network=msgspec.structs.replace(NETWORK, **(network or {})),
        clusters=[CLUSTER],
    )
    of_status = {name: value for name, value in changed.items() if name in status.__struct_fields__}
    facts = VnetFacts(
        status=msgspec.structs.replace(status, **of_status),
        teleport_home="/home/alice/.tsh",
        state_dir="/var/lib/vnet",
        ca_file="",
        insecure=False,
        os_wanted="auto",
        ipv6_wanted="auto",
        os_reasons=["it runs"],
        os_problems=[],
        network_problems=[],
        login_problems=[],
    )
    rest = {name: value for name, value in changed.items() if name not in of_status}
    return msgspec.structs.replace(facts, **rest)


def ids(report: CheckReport) -> list[str]:
    """The ids of all findings, in order."""
    return [found.id.value for found in report.findings]


def texts(report: CheckReport) -> str:
    """All that the findings say."""
    return "\n".join(f"{found.text} {found.advice}" for found in report.findings)

"""Values and a stand-in for a run, for what only looks at one."""

from dataclasses import dataclass, field
from pathlib import Path

from ipc import messages as m
from supervisor import network
from supervisor.clusters import ClusterView
from supervisor.config import Config, NetworkConfig
from supervisor.control import Promise
from supervisor.in_force import Then
from supervisor.log_book import LogBook
from supervisor.privileges import Identity
from supervisor.restart_policy import RestartLimits
from supervisor.settings import Settings, User
from supervisor.worker import Worker

PREFIX = bytes.fromhex("fd6067ec4325") + bytes(10)
NETWORK = network.plan(NetworkConfig(), PREFIX)
CLUSTER = m.Cluster(
    name="demo.test",
    profile="teleport.demo.test",
    leaf_of=None,
    state=m.ClusterState.OK,
    user="alice",
    expires="2026-11-22T21:00:00Z",
    zones=["teleport.demo.test", "demo.test"],
    ranges=["100.64.0.0/10"],
)
USER = User(name="alice", uid=4711, gid=4711, home=Path("/home/alice"))

# A worker that is forked from the test run has all its memory from the start.
ROOM_BYTES = 8 << 30


def settings(config: Config | None = None, **changed: object) -> Settings:
    values: dict[str, object] = {
        "config": config or Config(),
        "config_path": None,
        "user": USER,
        "teleport_home": Path("/home/alice/.tsh"),
        "run_dir": Path("/run/vnet"),
        "state_dir": Path("/var/lib/vnet"),
        "log_level": "INFO",
        "log_format": "text",
    }
    return Settings(**values | changed)  # type: ignore[arg-type]


def make_workers(*slots: str) -> dict[str, Worker]:
    limits = RestartLimits(5, 30.0)
    return {slot: Worker(slot, Identity(0, 0, None), limits) for slot in slots}


@dataclass
class FakeRun:
    """Satisfies supervisor.run.Run; orders are noted in `orders`."""

    settings: Settings = field(default_factory=settings)
    workers: dict[str, Worker] = field(
        default_factory=lambda: make_workers("tun", "proxy-0", "proxy-1", "dns")
    )
    others: list[Worker] = field(default_factory=list)
    network: m.Network = NETWORK
    zones: list[str] = field(default_factory=lambda: ["teleport.demo.test", "demo.test"])
    range_problems: list[str] = field(default_factory=list)
    probe_problems: list[str] = field(default_factory=list)
    network_problems: list[str] = field(default_factory=list)
    data_plane: m.DataPlaneKind = m.DataPlaneKind.NAMESPACE
    os_integration: str = "none"
    os_problems: list[str] = field(default_factory=list)
    os_reasons: list[str] = field(default_factory=list)
    metrics_problems: list[str] = field(default_factory=list)
    access: m.Access = field(default_factory=lambda: m.Access(uids=[0, USER.uid]))
    access_problems: list[str] = field(default_factory=list)
    access_warnings: list[str] = field(default_factory=list)
    forwarding_warnings: list[str] = field(default_factory=list)
    were_ready: bool = True
    was_healthy: bool = False
    started_at: float = 0.0
    past_counters: dict[str, int] = field(default_factory=dict)
    report: ClusterView | None = field(default_factory=lambda: ClusterView([CLUSTER], ""))
    late: list[str] = field(default_factory=list)
    orders: list[object] = field(default_factory=list)
    log_book: LogBook = field(default_factory=LogBook)

    def cluster_report(self) -> ClusterView | None:
        return self.report

    def order_stop(self) -> None:
        self.orders.append("stop")

    def restart(self, worker: Worker) -> None:
        self.orders.append(("restart", worker.slot))

    def replace(self, slots: object) -> None:
        self.orders.append(("replace", slots))

    def order_upgrade(self) -> Promise:
        self.orders.append("upgrade")
        return Promise(1.0)

    def use_config(self, plan: object, teleport_home: object) -> None:
        self.orders.append(("config", plan))

    def when_in_force(self, then: Then) -> None:
        then(self.late)

    def use_log_level(self, message: m.SetLogLevel) -> None:
        self.orders.append(("level", message.level))

"""Collects what `supervisor.status` shows from a running supervisor."""

import time
from ipaddress import IPv6Address

import psutil

from ipc.addresses import as_text
from ipc.permits import Role, role_of
from supervisor import status
from supervisor.clusters import ClusterView
from supervisor.network import dns_addresses
from supervisor.reasons import reason_ids
from supervisor.run import ObservedRun
from supervisor.settings import version
from supervisor.worker import LastExit, Worker

# What proxies count that is shown over the death of each.
TOTALS = (
    "connections_total",
    "connections_failed",
    "bytes_sent",
    "bytes_received",
    "refused_users",
    "http_refused",
)


class StatusReporter:
    """Keeps what CPU shares are measured against: each is the share since the last question."""

    def __init__(self, supervisor: ObservedRun) -> None:
        self._supervisor = supervisor
        self._processes: dict[int, psutil.Process] = {}

    def collect(self, pid: int) -> status.Status:
        """The whole status; `pid` is the supervisor's."""
        supervisor = self._supervisor
        now = time.monotonic()
        workers = [
            _worker(worker, now, *self._measures(worker)) for worker in supervisor.workers.values()
        ]
        health, reasons = self._judge(workers)
        report = supervisor.cluster_report()
        workers += [_worker(worker, now, *self._measures(worker)) for worker in supervisor.others]
        return status.Status(
            health=health,
            reasons=reasons,
            reason_ids=reason_ids(reasons, report.clusters if report else ()),
            supervisor=status.SupervisorStatus(
                pid=pid,
                version=version(),
                uptime_seconds=round(now - supervisor.started_at, 1),
                user=supervisor.settings.user.name,
            ),
            workers=workers,
            network=_network(supervisor),
            clusters=_clusters(report),
            connections=self._connections(),
            security=self._security(),
            warnings=[*supervisor.access_warnings, *supervisor.forwarding_warnings],
        )

    def judge(self) -> tuple[status.Health, list[str]]:
        """Health and reasons alone, without a look at any process."""
        now = time.monotonic()
        return self._judge([_worker(worker, now) for worker in self._supervisor.workers.values()])

    def _judge(self, workers: list[status.WorkerStatus]) -> tuple[status.Health, list[str]]:
        report = self._supervisor.cluster_report()
        return status.judge(
            workers,
            report.clusters if report else [],
            clusters_are_known=report is not None,
            # A later login or a proxy that is started again makes no health check fail.
            awaited=report.awaited if report and not self._supervisor.was_healthy else (),
            were_ready=self._supervisor.were_ready,
            other_reasons=_other_reasons(self._supervisor, report),
        )

    def _measures(self, worker: Worker) -> tuple[int | None, float | None]:
        """Memory and share of a CPU, while there is a process."""
        process = self._process(worker.pid)
        if process is None:
            return None, None
        try:
            return process.memory_info().rss, round(process.cpu_percent(), 1)
        except (psutil.Error, OSError):
            # It has ended meanwhile, or no descriptor is left to look.
            return None, None

    def _process(self, pid: int | None) -> psutil.Process | None:
        alive = {worker.pid for worker in self._all()}
        for gone in [known for known in self._processes if known not in alive]:
            del self._processes[gone]
        if pid is None:
            return None
        try:
            return self._processes.setdefault(pid, psutil.Process(pid))
        except (psutil.Error, OSError):
            return None

    def _all(self) -> list[Worker]:
        return [*self._supervisor.workers.values(), *self._supervisor.others]

    def _connections(self) -> status.ConnectionsStatus:
        total = self._total
        return status.ConnectionsStatus(
            active=total("connections_now"),
            total=total("connections_total"),
            failed=total("connections_failed"),
            bytes_sent=total("bytes_sent"),
            bytes_received=total("bytes_received"),
        )

    def _security(self) -> status.SecurityStatus:
        rules = self._supervisor.settings.config.security
        return status.SecurityStatus(
            user_check=_on(self._supervisor.access.is_checked),
            http_check=_on(rules.http_check),
            http_unchecked=sorted(app for app, hosts in rules.http_hosts.items() if "*" in hosts),
            users_refused=self._total("refused_users"),
            http_refused=self._total("http_refused"),
        )

    def _total(self, name: str) -> int:
        """What all proxies have counted, also those that have ended."""
        proxies = (worker for worker in self._all() if role_of(worker.slot) is Role.PROXY)
        running = sum(worker.counters.get(name, 0) for worker in proxies)
        return self._supervisor.past_counters.get(name, 0) + running


def _worker(
    worker: Worker, now: float, rss: int | None = None, cpu: float | None = None
) -> status.WorkerStatus:
    is_alive = worker.is_alive
    return status.WorkerStatus(
        name=worker.slot,
        pid=worker.pid,
        state=worker.state,
        restarts=worker.restarts,
        uptime_seconds=round(now - worker.started_at, 1) if is_alive else None,
        heartbeat_age_seconds=round(now - worker.last_heartbeat, 1) if is_alive else None,
        rss_bytes=rss,
        cpu_percent=cpu,
        last_exit=_last_exit(worker.last_exit),
        confinement=_confinement(worker),
    )


def _on(is_on: bool) -> status.Check:  # noqa: FBT001  # it is what is asked about
    return status.Check.ON if is_on else status.Check.OFF


def _other_reasons(supervisor: ObservedRun, report: ClusterView | None) -> list[str]:
    reasons = [
        *supervisor.range_problems,
        *supervisor.network_problems,
        *supervisor.probe_problems,
        *supervisor.os_problems,
        *supervisor.metrics_problems,
        *supervisor.access_problems,
    ]
    if report is not None and report.problem:
        reasons.append(report.problem)
    return reasons


def _network(supervisor: ObservedRun) -> status.NetworkStatus:
    network = supervisor.network
    prefix = network.ipv6_prefix
    return status.NetworkStatus(
        interface=network.interface,
        mtu=network.mtu,
        ipv4_cidr_ranges=network.ranges,
        ipv6_prefix=None if prefix is None else str(IPv6Address(prefix)),
        dns_addresses=[as_text(address) for address in dns_addresses(network)],
        dns_zones=list(supervisor.zones),
        os_integration=supervisor.os_integration,
        data_plane=supervisor.data_plane,
    )


def _clusters(report: ClusterView | None) -> list[status.ClusterStatus]:
    return [
        status.ClusterStatus(
            name=cluster.name,
            profile=cluster.profile,
            leaf_of=cluster.leaf_of,
            state=cluster.state,
            user=cluster.user,
            expires=cluster.expires,
        )
        for cluster in (report.clusters if report else [])
    ]


def _confinement(worker: Worker) -> status.ConfinementStatus | None:
    report = worker.confinement
    if report is None or not worker.is_alive:
        return None
    return status.ConfinementStatus(
        uid=report.uid,
        no_new_privs=report.no_new_privs,
        capabilities=report.capabilities,
        landlock=report.landlock,
        seccomp=report.seccomp,
        missing=report.missing,
    )


def _last_exit(last_exit: LastExit | None) -> status.LastExitStatus | None:
    if last_exit is None:
        return None
    return status.LastExitStatus(status=last_exit.status, signal=last_exit.signal)

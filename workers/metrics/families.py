"""The metrics, made from a snapshot. Pure; docs/metrics.md lists all of them.

Names and units follow Prometheus's conventions: base units, `_total` for what only rises. Labels have
few values, which VNet chooses; of clusters there are at most as many as a snapshot has. No label names an
app, a host, a user or an address.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from ipc.counters import CERTIFICATE_KINDS, DNS_OUTCOMES, LATENCY_MS
from ipc.messages import ClusterState, MetricsSnapshot, Refusal
from ipc.permits import Role

HEALTHS: Final = ("starting", "healthy", "degraded")
# What waits, by the counters that count it.
QUEUES: Final = {
    "held_syns": f"{Role.TUN}.pending_now",
    "dialling": f"{Role.PROXY}.dialling_now",
    "accepting": f"{Role.PROXY}.waiting_now",
    "dns_questions": f"{Role.DNS}.in_flight_now",
    "name_questions": f"{Role.PROXY}.questions_now",
    "second_factors": f"{Role.PROXY}.prompts_now",
}


def families(snapshot: MetricsSnapshot) -> Iterator[Metric]:
    """Everything there is to say."""
    yield from _run(snapshot)
    yield from _workers(snapshot)
    yield from _connections(snapshot)
    yield from _dns(snapshot)
    yield from _packets(snapshot)
    yield from _clusters(snapshot)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _run(snapshot: MetricsSnapshot) -> Iterator[Metric]:
    yield InfoMetricFamily("vnet_build", "The running version.", {"version": snapshot.version})
    yield _gauge(
        "vnet_start_time_seconds",
        "When VNet was started, Unix time; an upgrade in place is no start.",
        snapshot.started_at,
    )
    yield _gauge(
        "vnet_snapshot_timestamp_seconds",
        "When the supervisor has told these figures, Unix time; about every second.",
        snapshot.taken_at,
    )
    health = GaugeMetricFamily(
        "vnet_health", "1 for the present health, as in vnet status.", labels=["state"]
    )
    for state in HEALTHS:
        health.add_metric([state], state == snapshot.health)
    yield health
    yield _gauge(
        "vnet_supervisor_resident_memory_bytes",
        "Resident memory of the supervisor.",
        snapshot.resident_bytes,
    )
    yield _counter(
        "vnet_supervisor_cpu_seconds_total", "CPU time of the supervisor.", snapshot.cpu_seconds
    )


def _workers(snapshot: MetricsSnapshot) -> Iterator[Metric]:
    up = GaugeMetricFamily("vnet_worker_up", "1 while the worker is ready.", labels=["worker"])
    restarts = CounterMetricFamily(
        "vnet_worker_restarts_total",
        "How often the worker crashed and was to be started again.",
        labels=["worker"],
    )
    memory = GaugeMetricFamily(
        "vnet_worker_resident_memory_bytes",
        "Resident memory of the worker's processes, shared pages included.",
        labels=["worker"],
    )
    cpu = CounterMetricFamily(
        "vnet_worker_cpu_seconds_total",
        "CPU time of the worker's processes, those that have ended included.",
        labels=["worker"],
    )
    heartbeat = GaugeMetricFamily(
        "vnet_worker_heartbeat_age_seconds",
        "Since the worker's last sign of life; absent without a process.",
        labels=["worker"],
    )
    for worker in {each.slot: each for each in snapshot.workers}.values():
        up.add_metric([worker.slot], worker.is_up)
        restarts.add_metric([worker.slot], worker.restarts)
        memory.add_metric([worker.slot], worker.resident_bytes)
        cpu.add_metric([worker.slot], worker.cpu_seconds)
        if worker.heartbeat_age_seconds is not None:
            heartbeat.add_metric([worker.slot], worker.heartbeat_age_seconds)
    yield from (up, restarts, memory, cpu, heartbeat)


def _connections(snapshot: MetricsSnapshot) -> Iterator[Metric]:
    proxy = _of(snapshot, Role.PROXY)
    yield _gauge(
        "vnet_connections_active", "Connections that are relayed now.", proxy("connections_now")
    )
    yield _by_label(
        "vnet_connections_total",
        "Connections by what became of them: accepted, or why they were refused.",
        "result",
        [
            ("accepted", proxy("connections_total")),
            ("orphaned", proxy("connections_orphaned")),
            # tun has each refusal once, its own and those of the proxies.
            *(
                (reason.value, _of(snapshot, Role.TUN)(f"refused_{reason}"))
                for reason in Refusal
                if reason is not Refusal.PROBE
            ),
        ],
    )
    yield _by_label(
        "vnet_connection_bytes_total",
        "Bytes of connections, without what TLS and SSH add.",
        "direction",
        [("sent", proxy("bytes_sent")), ("received", proxy("bytes_received"))],
    )
    yield _by_label(
        "vnet_users_refused_total",
        "Attempts of users who may not use VNet, by what they tried.",
        "service",
        [
            ("connections", proxy("refused_users")),
            ("dns", _of(snapshot, Role.DNS)("refused_users")),
        ],
    )
    yield _counter(
        "vnet_http_requests_refused_total",
        "HTTP requests that were meant for another host, or came from a foreign page.",
        proxy("http_refused"),
    )
    yield _gauge(
        "vnet_listeners", "Listening sockets at virtual addresses.", proxy("listeners_now")
    )
    for result, text in (
        ("issued", "Certificates that clusters have issued, by what they are for."),
        ("failed", "Certificates that could not be got, by what they were for."),
    ):
        yield _by_label(
            f"vnet_certificates_{result}_total",
            text,
            "kind",
            [(kind, proxy(f"certificates_{kind}_{result}")) for kind in CERTIFICATE_KINDS],
        )
    queues = GaugeMetricFamily(
        "vnet_queue_length", "How many wait for what the label names.", labels=["queue"]
    )
    for queue, counter in QUEUES.items():
        queues.add_metric([queue], snapshot.counters.get(counter, 0))
    yield queues


def _dns(snapshot: MetricsSnapshot) -> Iterator[Metric]:
    dns = _of(snapshot, Role.DNS)
    yield _counter("vnet_dns_queries_total", "Questions to the DNS server.", dns("queries"))
    yield _by_label(
        "vnet_dns_answers_total",
        "Answers of the DNS server; diagnostic ones are to VNet's own questions.",
        "outcome",
        [(outcome, dns(f"answers_{outcome}")) for outcome in DNS_OUTCOMES],
    )
    latency = HistogramMetricFamily(
        "vnet_dns_answer_seconds", "How long answers of the DNS server took."
    )
    buckets = [(str(limit / 1000), dns(f"latency_le_{limit}ms")) for limit in LATENCY_MS]
    latency.add_metric([], [*buckets, ("+Inf", dns("latency_count"))], dns("latency_us") / 1e6)
    yield latency
    yield _counter(
        "vnet_dns_cache_hits_total", "Questions that the cache has answered.", dns("cache_hits")
    )
    yield _counter(
        "vnet_dns_upstream_failures_total",
        "Forwarded questions that no server has answered.",
        dns("upstream_failures"),
    )
    yield _counter(
        "vnet_dns_overloads_total",
        "Questions and connections that the DNS server turned away at a limit.",
        dns("overloads"),
    )


def _packets(snapshot: MetricsSnapshot) -> Iterator[Metric]:
    tun = _of(snapshot, Role.TUN)
    for what, text in (
        ("packets", "Packets that tun has written to a device."),
        ("bytes", "Bytes of the packets that tun has written to a device."),
    ):
        yield _by_label(
            f"vnet_tun_{what}_total",
            text,
            "device",
            [(end, tun(f"{what}_to_{end}")) for end in ("inner", "outer")],
        )
    yield _counter(
        "vnet_tun_dropped_packets_total", "Packets that tun has thrown away.", tun("dropped")
    )


def _clusters(snapshot: MetricsSnapshot) -> Iterator[Metric]:
    labels = ["cluster", "profile"]
    yield _gauge("vnet_clusters", "Clusters of all profiles.", snapshot.cluster_count)
    states = GaugeMetricFamily(
        "vnet_cluster_state",
        "1 for the present state of the cluster, as in vnet status.",
        labels=[*labels, "state"],
    )
    expiry = GaugeMetricFamily(
        "vnet_login_expiry_timestamp_seconds",
        "When the login that the cluster is reached with ends, Unix time; absent without one.",
        labels=labels,
    )
    # Two samples with the same labels would make the whole answer invalid.
    for (name, profile), cluster in {(c.name, c.profile): c for c in snapshot.clusters}.items():
        for state in ClusterState:
            states.add_metric([name, profile, state], state is cluster.state)
        if cluster.expires is not None:
            expiry.add_metric([name, profile], cluster.expires)
    yield from (states, expiry)


def _of(snapshot: MetricsSnapshot, role: Role) -> Callable[[str], int]:
    """The counters of one role, by name."""
    return lambda name: snapshot.counters.get(f"{role}.{name}", 0)


def _by_label(name: str, text: str, label: str, values: Sequence[tuple[str, float]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values:
        family.add_metric([value], count)
    return family

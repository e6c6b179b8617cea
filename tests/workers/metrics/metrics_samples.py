"""Snapshots with something in every metric."""

from ipc import counters
from ipc import messages as m


def snapshot(workers: int = 2, logins: int = 2, **changed: object) -> m.MetricsSnapshot:
    """Each counter has another value: its place in the list, from 1. `logins` are clusters."""
    names = [name for role in counters.SERVED for name in counters.served(role, {})]
    values: dict[str, object] = {
        "taken_at": 1795381200.5,
        "started_at": 1795381100.25,
        "version": "0.1.0",
        "health": "degraded",
        "resident_bytes": 21_000_000,
        "cpu_seconds": 0.5,
        "workers": [
            m.WorkerFigures(
                slot=f"proxy-{number}",
                is_up=number == 0,
                restarts=number,
                heartbeat_age_seconds=0.25 if number == 0 else None,
                resident_bytes=38_000_000,
                cpu_seconds=1.5,
            )
            for number in range(workers)
        ],
        "clusters": [
            m.ClusterFigures(
                name=f"c{number}.test",
                profile="teleport.test",
                state=m.ClusterState.OK,
                expires=1795381200.0 + number,
            )
            for number in range(logins)
        ],
        "cluster_count": logins,
        "counters": {name: number for number, name in enumerate(names, 1)},
    }
    return m.MetricsSnapshot(**(values | changed))  # type: ignore[arg-type]

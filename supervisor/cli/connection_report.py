"""What `vnet connections` shows (docs/schema/connections.json), put together from all proxies. Pure."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ipc.connection_list import (
    LIVE,
    MAX_CONNECTIONS,
    ConnectionState,
    ConnectionTold,
    TargetKind,
    TargetTold,
)
from ipc.messages import Refusal
from supervisor.cli.socket_owners import Ends, SocketOwner


class TargetRow(msgspec.Struct, frozen=True, kw_only=True):
    """Totals of one target since VNet's present workers began.

    `name` is a DNS name, empty where an address has none. `leaf` is empty for the root cluster. `port` is null unless
    the app has several. `ok` were established, `failed` were refused; `active` of those in `ok` go on, `dialling` are
    in neither. Rates are bytes per second over about the last second, null if not known.
    """

    kind: TargetKind
    profile: str
    leaf: str
    name: str
    port: int | None
    dialling: int
    active: int
    ok: int
    failed: int
    bytes_sent: int
    bytes_received: int
    sent_per_second: float | None
    received_per_second: float | None


class ConnectionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One connection. Times are UTC (RFC 3339).

    `id` is `connection` in the log, `worker` who has it. `address` and `port` are what the program has
    connected to, `client_address` and `client_port` its own end. `uid`, `pid` and `program` are null where they may not
    be seen, and for what has ended unless it was seen before. `refusal` says why it failed, `end` how an established one
    ended; `error` is a sentence, often empty.
    """

    id: str
    worker: str
    kind: TargetKind
    profile: str
    leaf: str
    name: str
    address: str
    port: int
    client_address: str
    client_port: int
    uid: int | None
    pid: int | None
    program: str | None
    state: ConnectionState
    started: str
    ended: str | None
    duration_seconds: float
    bytes_sent: int
    bytes_received: int
    sent_per_second: float | None
    received_per_second: float | None
    refusal: Refusal | None
    end: str
    error: str


class ConnectionList(msgspec.Struct, frozen=True, kw_only=True):
    """What `vnet connections --json` prints: what goes on first, and the newest first.

    `problems` says why something may be missing.
    """

    schema: int = 1
    targets: list[TargetRow]
    connections: list[ConnectionRow]
    problems: list[str]


@dataclass(frozen=True, slots=True)
class Told:
    """What one proxy has told."""

    worker: str
    targets: Sequence[TargetTold]
    connections: Sequence[ConnectionTold]


def ends_of(connection: ConnectionTold) -> Ends:
    """Its ends as the program has them."""
    return Ends(
        connection.client_address,
        connection.client_port,
        connection.address,
        connection.port,
    )


def merge(
    told: Iterable[Told], owners: Mapping[str, SocketOwner], problems: Sequence[str]
) -> ConnectionList:
    """Everything in order. `owners` by the id of the connection."""
    proxies = list(told)
    rows = [(c, proxy.worker) for proxy in proxies for c in proxy.connections]
    rows.sort(key=lambda row: (row[0].state in LIVE, row[0].started), reverse=True)
    return ConnectionList(
        targets=_targets(proxies),
        connections=[_row(c, worker, owners.get(c.id)) for c, worker in _kept(rows)],
        problems=list(problems),
    )


def _kept(rows: Iterable[tuple[ConnectionTold, str]]) -> Iterable[tuple[ConnectionTold, str]]:
    """What all proxies together may show: live ones, which come first, always."""
    for index, (connection, worker) in enumerate(rows):
        if connection.state in LIVE or index < MAX_CONNECTIONS:
            yield connection, worker


def _targets(proxies: Iterable[Told]) -> list[TargetRow]:
    """One row for each target, though several proxies have told of it; the busiest first."""
    rows: dict[tuple[object, ...], TargetRow] = {}
    for proxy in proxies:
        for told in proxy.targets:
            row = msgspec.convert(told, TargetRow, from_attributes=True)
            key = (row.kind, row.profile, row.leaf, row.name, row.port)
            before = rows.get(key)
            rows[key] = row if before is None else _sum(before, row)
    return sorted(rows.values(), key=_order)


def _order(row: TargetRow) -> tuple[object, ...]:
    live = row.active + row.dialling
    return (-live, row.name, row.port or 0, row.kind, row.profile, row.leaf)


def _sum(one: TargetRow, other: TargetRow) -> TargetRow:
    return msgspec.structs.replace(
        one,
        dialling=one.dialling + other.dialling,
        active=one.active + other.active,
        ok=one.ok + other.ok,
        failed=one.failed + other.failed,
        bytes_sent=one.bytes_sent + other.bytes_sent,
        bytes_received=one.bytes_received + other.bytes_received,
        sent_per_second=_both(one.sent_per_second, other.sent_per_second),
        received_per_second=_both(one.received_per_second, other.received_per_second),
    )


def _both(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _row(told: ConnectionTold, worker: str, owner: SocketOwner | None) -> ConnectionRow:
    return ConnectionRow(
        id=told.id,
        worker=worker,
        kind=told.kind,
        profile=told.profile,
        leaf=told.leaf,
        name=told.name,
        address=told.address,
        port=told.port,
        client_address=told.client_address,
        client_port=told.client_port,
        uid=None if owner is None else owner.uid,
        pid=None if owner is None else owner.pid,
        program=None if owner is None else _text(owner.program),
        state=told.state,
        started=stamp(told.started),
        ended=None if told.ended is None else stamp(told.ended),
        duration_seconds=round(told.duration_seconds, 3),
        bytes_sent=told.bytes_sent,
        bytes_received=told.bytes_received,
        sent_per_second=told.sent_per_second,
        received_per_second=told.received_per_second,
        refusal=told.refusal,
        end=told.end,
        error=told.error,
    )


def _text(path: str | None) -> str | None:
    # A file name that is no UTF-8 has no other form in JSON.
    return None if path is None else path.encode(errors="replace").decode()


def stamp(seconds: float) -> str:
    """Seconds since 1970 as the log writes times."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"

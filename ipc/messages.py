"""Every message that crosses a process boundary of VNet, as typed structs.

Two conversations use them: the bus between workers (`ipc.bus`) and the channel between the
supervisor and one worker (`ipc.channel`). Which role may say what, and to whom, stands in
`ipc.permits`; how they become bytes in `ipc.codec`. This module is pure.

Addresses travel packed (4 bytes for IPv4, 16 for IPv6, network byte order), because both ends
need them packed and a malformed one cannot be expressed. Names travel lower-case, without the
trailing dot, at most 253 characters (RFC 1035 section 2.3.4).
"""

from enum import StrEnum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

PROTOCOL_VERSION = 1

PackedAddress: TypeAlias = Annotated[bytes, Meta(min_length=4, max_length=16)]
Port: TypeAlias = Annotated[int, Meta(ge=0, le=65535)]
Id: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=253)]
# One sentence for a log line or the status page; never a traceback, never a secret.
MAX_SAFE_TEXT = 500
SafeText: TypeAlias = Annotated[str, Meta(max_length=MAX_SAFE_TEXT)]
# CIDR notation, "100.64.0.0/10" or "fd00::/64".
Range: TypeAlias = Annotated[str, Meta(min_length=3, max_length=64)]
Slot: TypeAlias = Annotated[str, Meta(min_length=1, max_length=32, pattern=r"^[a-z]+(-[0-9]+)?\Z")]


def _check_length(address: bytes) -> None:
    # The decoder makes this a malformed message; a type with just two lengths it does not know.
    if len(address) not in (4, 16):
        raise ValueError(f"an address of {len(address)} bytes")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", forbid_unknown_fields=True):
    """Base of all messages; the tag is the class name."""


# --- Bus: tun and proxy -----------------------------------------------------------------------


class Refusal(StrEnum):
    """Why a connection was not admitted; the program sees "connection refused" for all."""

    UNKNOWN_ADDRESS = "unknown_address"  # no name was ever given this address
    UNKNOWN_APP = "unknown_app"  # the name stands for no app, or for none any more
    PORT_NOT_ALLOWED = "port_not_allowed"  # not in the app's tcp_ports
    NOT_LOGGED_IN = "not_logged_in"  # no profile, or the login has expired
    CERTIFICATE_REFUSED = "certificate_refused"  # the cluster issued no certificate
    CLUSTER_UNREACHABLE = "cluster_unreachable"  # the proxy or its auth service cannot be reached
    MFA_REQUIRED = "mfa_required"  # nobody answered the prompt
    NODE_UNREACHABLE = "node_unreachable"  # the proxy knows no such SSH host, or it is offline
    ACCESS_DENIED = "access_denied"  # the cluster does not let this user connect
    TOO_MANY = "too_many"  # a limit of VNet is reached
    USER_NOT_ALLOWED = "user_not_allowed"  # this operating system user may not connect
    PROBE = "probe"  # the supervisor's own question whether the way works; no failure
    TIMED_OUT = "timed_out"  # the dial took longer than the deadline
    INTERNAL = "internal"  # a fault of VNet; the log says which


class ProxyHello(Message, frozen=True, tag=True):
    """A proxy is ready for dial requests. Sent each time it has connected to tun."""

    version: int = PROTOCOL_VERSION


class DialRequest(Message, frozen=True, tag=True):
    """A SYN is held: shall it pass? `source` is the program's end, `destination` is virtual."""

    flow_id: Id
    source: PackedAddress
    source_port: Port
    destination: PackedAddress
    destination_port: Port

    def __post_init__(self) -> None:
        _check_length(self.source)
        _check_length(self.destination)


class DialVerdict(Message, frozen=True, tag=True):
    """The answer to a DialRequest. `refusal` is None when the SYN may pass."""

    flow_id: Id
    refusal: Refusal | None = None


class DialAbandoned(Message, frozen=True, tag=True):
    """The held SYN was given up (deadline, limit); the proxy drops what it has dialled."""

    flow_id: Id


# --- Bus: dns and proxy -----------------------------------------------------------------------


class NameOutcome(StrEnum):
    """What a name stands for."""

    ADDRESS = "address"  # VNet's: answer with the address
    NOT_OURS = "not_ours"  # forward upstream
    NO_SUCH_NAME = "no_such_name"  # ours, and nothing has it: NXDOMAIN
    RANGE_FULL = "range_full"  # ours, but no address is left: SERVFAIL
    FAILED = "failed"  # could not be found out: SERVFAIL


class ResolveName(Message, frozen=True, tag=True):
    """What does this name, spelled as it was typed, stand for?"""

    request_id: Id
    name: Name


class NameResolved(Message, frozen=True, tag=True):
    """Answer to ResolveName. `ipv4` is set exactly for ADDRESS.

    The IPv6 address is not sent: it is the prefix followed by the IPv4 address (see
    `ipc.addresses.ipv6_twin`). `valid_seconds` says how long dns may reuse this answer: an address
    for the name in any spelling, everything else for this spelling alone.
    """

    request_id: Id
    outcome: NameOutcome
    ipv4: Annotated[bytes, Meta(min_length=4, max_length=4)] | None = None
    valid_seconds: Annotated[float, Meta(ge=0, le=3600)] = 0.0


class ResolveAddress(Message, frozen=True, tag=True):
    """The name behind a virtual IPv4 address is asked for; for PTR questions, RFC 1035 section 3.5."""

    request_id: Id
    ipv4: Annotated[bytes, Meta(min_length=4, max_length=4)]


class AddressResolved(Message, frozen=True, tag=True):
    """Answer to ResolveAddress; `name` is None when the address was never given out."""

    request_id: Id
    name: Name | None


# --- Channel: supervisor to worker ------------------------------------------------------------


class BusKeys(msgspec.Struct, frozen=True, kw_only=True):
    """CURVE keys (Z85 text, RFC 32/Z85) of one worker slot, and the public keys of its peers."""

    public: Annotated[str, Meta(min_length=40, max_length=40)]
    secret: Annotated[str, Meta(min_length=40, max_length=40)]
    peers: dict[Slot, Annotated[str, Meta(min_length=40, max_length=40)]]

    def __repr__(self) -> str:
        return f"BusKeys(public={self.public!r}, peers={sorted(self.peers)})"


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """What every worker needs to know."""

    slot: Slot
    proxies: Annotated[int, Meta(ge=1, le=64)]
    bus_dir: str
    keys: BusKeys
    heartbeat_seconds: float
    log_level: str
    # A successor beside a worker that still works: it gets ready, and begins with TakeOver.
    is_standby: bool = False


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses of this VNet. IPv6 members are None while IPv6 is off."""

    interface: str
    mtu: int
    ranges: list[Range]  # virtual IPv4 ranges, VNet's own first; clusters add more
    tun_ipv4: PackedAddress
    dns_ipv4: PackedAddress
    ipv6_prefix: PackedAddress | None  # 16 bytes, the last 8 zero: a /64
    tun_ipv6: PackedAddress | None
    dns_ipv6: PackedAddress | None
    # Networks whose packets the host may forward to the device: containers, virtual machines.
    forwarded_from: Annotated[list[Range], Meta(max_length=100)] = []


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Which users of this machine may connect.

    `user` is the name of the VNet user, for sentences. `resolvers` may only ask for names: the system's
    resolvers, which ask for everybody. `interface` is the index of the device whose packets are asked
    about. Without `can_tell` this system does not say who connects, and nobody may; without
    `is_checked` everybody may.
    """

    uids: Annotated[list[Count], Meta(max_length=10_000)]
    user: Annotated[str, Meta(max_length=256)] = ""
    resolvers: Annotated[list[Count], Meta(max_length=100)] = []
    interface: Count = 0
    can_tell: bool = True
    is_checked: bool = True


class HttpRules(msgspec.Struct, frozen=True, kw_only=True):
    """Which HTTP requests pass, by lower-case DNS name of the app; `"*"` is anything."""

    is_checked: bool = True
    hosts: dict[Name, list[str]] = {}
    origins: dict[Name, list[str]] = {}


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """One upstream DNS server. `scope` names the interface of a link-local IPv6 address."""

    address: PackedAddress
    port: Port = 53
    scope: str = ""


class DataPlaneKind(StrEnum):
    """How packets get to the listening sockets (docs/architecture.md)."""

    NAMESPACE = "namespace"  # unchanged, into a network namespace with the virtual addresses
    REWRITING = "rewriting"  # rewritten, back into the device they came from


class Redirect(msgspec.Struct, frozen=True, kw_only=True):
    """Packets to a virtual address and port go to this port of the interface's own address.

    With local port 0 they do not any more.
    """

    address: PackedAddress
    port: Port
    local_port: Port
    is_udp: bool = False

    def __post_init__(self) -> None:
        _check_length(self.address)


class ConfigureTun(Message, frozen=True, tag=True):
    """First message to tun. Descriptors: [outer device, inner device], or [outer device].

    The second where packets are rewritten; then RedirectsChanged follows. With `has_family_header` each
    packet of the device has its address family before it (4 bytes, as macOS does).
    """

    common: Common
    network: Network
    max_pending: int
    pending_seconds: float
    data_plane: DataPlaneKind = DataPlaneKind.NAMESPACE
    has_family_header: bool = False


class ConfigureDns(Message, frozen=True, tag=True):
    """First message to dns. Descriptors: bound UDP sockets, then bound TCP sockets (listening).

    One UDP and one TCP socket per DNS address, IPv4 first. On Linux then a netlink socket of its own,
    which tells who asks (`ipc.socket_owner`).
    """

    common: Common
    network: Network
    upstream: list[Upstream]
    ttl_seconds: int
    access: Access = Access(uids=[])


class ConfigureProxy(Message, frozen=True, tag=True):
    """First message to a proxy; listeners follow as ListenerOpened.

    Descriptors: on Linux a netlink socket of its own, which tells who connects (`ipc.socket_owner`).
    """

    common: Common
    network: Network
    teleport_home: str
    book_path: str
    prompts_dir: str  # of the sockets for `vnet mfa`
    max_connections: int
    max_listeners: int  # that the supervisor opens for it
    ca_file: str
    insecure: bool
    mfa_seconds: float  # that a user has for a second factor
    http: HttpRules = HttpRules()
    access: Access = Access(uids=[])


class ConfigureMetrics(Message, frozen=True, tag=True):
    """First message to metrics. Descriptors: [listening socket]; a MetricsSnapshot follows."""

    common: Common


class WorkerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One worker slot: memory of all its processes, CPU of those that have ended as well."""

    slot: Slot
    is_up: bool
    restarts: Count
    heartbeat_age_seconds: Annotated[float, Meta(ge=0)] | None
    resident_bytes: Count
    cpu_seconds: Annotated[float, Meta(ge=0)]


class ClusterFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One cluster of one profile. `expires` is Unix time, or None without a login."""

    name: Annotated[str, Meta(max_length=253)]
    profile: Annotated[str, Meta(max_length=253)]
    state: "ClusterState"
    expires: float | None


class MetricsSnapshot(Message, frozen=True, tag=True):
    """Everything that metrics serves, as it was at `taken_at` (Unix time, like `started_at`).

    `counters` are those of `ipc.counters`, of all processes, ended ones included.
    """

    taken_at: float
    started_at: float
    version: Annotated[str, Meta(max_length=100)]
    health: Annotated[str, Meta(max_length=32)]
    resident_bytes: Count  # the supervisor's own
    cpu_seconds: Annotated[float, Meta(ge=0)]
    workers: Annotated[list[WorkerFigures], Meta(max_length=100)]
    # Of `cluster_count` clusters so many at most: each is a time series for whoever collects them.
    clusters: Annotated[list[ClusterFigures], Meta(max_length=100)]
    cluster_count: Count
    counters: Annotated[dict[Annotated[str, Meta(max_length=64)], Count], Meta(max_length=500)]


class NetworkChanged(Message, frozen=True, tag=True):
    """Ranges were added or removed; the routes are already there."""

    network: Network


class RedirectsChanged(Message, frozen=True, tag=True):
    """Redirects have come, changed or gone. Several may follow the configuration.

    `is_complete` says that no more follow now: with what was said before, the table is whole.
    """

    redirects: Annotated[list[Redirect], Meta(max_length=1000)]
    is_complete: bool


class UpstreamChanged(Message, frozen=True, tag=True):
    """The operating system's nameservers changed."""

    upstream: list[Upstream]


class SecurityChanged(Message, frozen=True, tag=True):
    """Who may connect, and how. dns gets it for `access` alone."""

    access: Access
    http: HttpRules


class NamesChanged(Message, frozen=True, tag=True):
    """A login or a zone has come or gone: what dns remembers of names may be wrong."""


class ListenerOpened(Message, frozen=True, tag=True):
    """A listening socket for a virtual (address, port). Descriptors: [socket].

    Sent as the answer to OpenListener, and after READY for each socket that a predecessor had.
    """

    address: PackedAddress
    port: Port


class ListenerRefused(Message, frozen=True, tag=True):
    """The supervisor does not open this listener."""

    address: PackedAddress
    port: Port
    reason: SafeText


class SetLogLevel(Message, frozen=True, tag=True):
    """Changes the level of the worker's root logger."""

    level: str


class Sync(Message, frozen=True, tag=True):
    """Say Synced with the same number as soon as everything that was said before is in force."""

    number: Count


class Drain(Message, frozen=True, tag=True):
    """A successor is ready: take nothing new, say HandedOver, finish what is open, then end.

    The supervisor ends what is left after `deadline_seconds`. Drain, HandedOver, Heartbeat and Stop keep
    their form from version to version: they pass between an old worker and a newer supervisor.
    """

    deadline_seconds: float


class TakeOver(Message, frozen=True, tag=True):
    """The predecessor of this standby takes nothing new any more: begin."""


class Stop(Message, frozen=True, tag=True):
    """Finish within `grace_seconds`; the supervisor kills what is left after that."""

    grace_seconds: float


# --- Channel: worker to supervisor ------------------------------------------------------------


class Confined(Message, frozen=True, tag=True):
    """The first message of a worker: which of its rights it has given up, for `vnet status`.

    `capabilities` are those it could not be rid of. `landlock` is the version of the kernel's
    interface, `seccomp` the kind of the filter; either is None where there is none. `missing` says in
    words what is not in force.
    """

    uid: Count
    no_new_privs: bool
    capabilities: Annotated[list[Annotated[str, Meta(max_length=32)]], Meta(max_length=64)]
    landlock: Annotated[int, Meta(ge=1, le=1000)] | None
    seccomp: Annotated[str, Meta(max_length=32)] | None
    missing: Annotated[list[SafeText], Meta(max_length=20)]


class NeedsRestart(Message, frozen=True, tag=True):
    """The worker cannot go on with what it was given when it was confined; it wants a successor."""

    reason: SafeText


class Ready(Message, frozen=True, tag=True):
    """The worker is set up and does its work. Up is not ready: only this message is."""

    version: int = PROTOCOL_VERSION


class HandedOver(Message, frozen=True, tag=True):
    """The answer to Drain: nothing new is taken, and every borrowed listener is closed."""


class Heartbeat(Message, frozen=True, tag=True):
    """Sent from the worker's own loop, so that a stuck loop is silent.

    `counters` are totals since the worker's start, except names that end in `_now`, which are
    present values. Names are listed in docs/architecture.md.
    """

    counters: Annotated[dict[Annotated[str, Meta(max_length=64)], Count], Meta(max_length=500)]


class Synced(Message, frozen=True, tag=True):
    """The answer to Sync."""

    number: Count


class OpenListener(Message, frozen=True, tag=True):
    """Asks for a listening socket on a virtual (address, port)."""

    address: PackedAddress
    port: Port

    def __post_init__(self) -> None:
        _check_length(self.address)


class CloseListener(Message, frozen=True, tag=True):
    """This listener is no longer needed; the supervisor closes its copy."""

    address: PackedAddress
    port: Port

    def __post_init__(self) -> None:
        _check_length(self.address)


class PeerMisbehaved(Message, frozen=True, tag=True):
    """A worker on the bus sent what it may not send; the supervisor replaces that worker."""

    slot: Slot
    reason: SafeText


class ClusterState(StrEnum):
    """State of one cluster, as in `vnet status --json`."""

    OK = "ok"
    LOGIN_EXPIRED = "login_expired"
    NO_LOGIN = "no_login"
    HARDWARE_KEY = "hardware_key"
    UNREACHABLE = "unreachable"


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """One cluster as a proxy sees it. `expires` is RFC 3339 UTC, or None."""

    name: Annotated[str, Meta(max_length=253)]
    profile: Annotated[str, Meta(max_length=253)]
    leaf_of: Annotated[str, Meta(max_length=253)] | None
    state: ClusterState
    user: Annotated[str, Meta(max_length=500)]
    expires: Annotated[str, Meta(max_length=40)] | None
    zones: Annotated[list[Name], Meta(max_length=200)]
    ranges: Annotated[list[Range], Meta(max_length=20)]
    # Whether the cluster itself has said so; otherwise zones and ranges are what the login alone
    # tells, and those of an earlier report still hold.
    is_configured: bool = True
    # Where the proxy is, as far as it was looked up: no range may cover it.
    proxy_addresses: Annotated[list[PackedAddress], Meta(max_length=32)] = []
    # What is wrong and what to do, for `vnet status`; empty when state is ok.
    problem: SafeText = ""


class ClustersReported(Message, frozen=True, tag=True):
    """All clusters of all profiles, sent after Ready and whenever something changed.

    An empty list with a `problem` says why there is none ("no profile in /home/alice/.tsh ...").
    What does not fit into one message comes as several, `part` counting from 0 (`ipc.cluster_report`).
    """

    clusters: Annotated[list[Cluster], Meta(max_length=1000)]
    problem: SafeText = ""
    part: Annotated[int, Meta(ge=0, le=99)] = 0
    parts: Annotated[int, Meta(ge=1, le=100)] = 1


TunToProxy: TypeAlias = DialRequest | DialAbandoned
ProxyToTun: TypeAlias = ProxyHello | DialVerdict
DnsToProxy: TypeAlias = ResolveName | ResolveAddress
ProxyToDns: TypeAlias = NameResolved | AddressResolved
SupervisorToWorker: TypeAlias = (
    ConfigureTun
    | ConfigureDns
    | ConfigureProxy
    | ConfigureMetrics
    | MetricsSnapshot
    | NetworkChanged
    | RedirectsChanged
    | UpstreamChanged
    | SecurityChanged
    | NamesChanged
    | ListenerOpened
    | ListenerRefused
    | SetLogLevel
    | Sync
    | Drain
    | TakeOver
    | Stop
)
WorkerToSupervisor: TypeAlias = (
    Confined
    | NeedsRestart
    | Ready
    | HandedOver
    | Heartbeat
    | Synced
    | OpenListener
    | CloseListener
    | ClustersReported
    | PeerMisbehaved
)
AnyMessage: TypeAlias = (
    TunToProxy | ProxyToTun | DnsToProxy | ProxyToDns | SupervisorToWorker | WorkerToSupervisor
)

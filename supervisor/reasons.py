"""The kinds of reasons and warnings that `vnet status` can give, known by their words. Pure.

They are sentences: some are made here, some by workers, and some have words of a cluster or of the
system in them. docs/troubleshooting.md has a section for each kind. A sentence that is new or worded anew
belongs into `WORDINGS` as well.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final

from ipc.messages import Cluster, ClusterState


class ReasonId(StrEnum):
    """Fixed: scripts and the documentation name them."""

    STARTING = "starting"
    PROFILES_UNREAD = "profiles-unread"
    CLUSTERS_AWAITED = "clusters-awaited"
    WORKER_NOT_READY = "worker-not-ready"
    WORKER_RESTARTING = "worker-restarting"
    WORKER_GIVEN_UP = "worker-given-up"
    WAITING_FOR_ROOM = "waiting-for-room"
    RANGE_IN_USE = "range-in-use"
    RANGE_NOT_ROUTED = "range-not-routed"
    CLUSTER_RANGE_IN_USE = "cluster-range-in-use"
    CLUSTER_WISH_LEFT_OUT = "cluster-wish-left-out"
    CLUSTER_SETTINGS_IGNORED = "cluster-settings-ignored"
    STRAY_ROUTE = "stray-route"
    PACKETS_ELSEWHERE = "packets-elsewhere"
    SERVER_COVERED = "server-covered"
    INTERFACE_BROKEN = "interface-broken"
    INTERFACE_CONTESTED = "interface-contested"
    FIREWALL = "firewall"
    RESOLVER_STARTING = "resolver-starting"
    RESOLVER_NOT_POSSIBLE = "resolver-not-possible"
    RESOLVER_SERVICE_DOWN = "resolver-service-down"
    RESOLVER_REFUSES = "resolver-refuses"
    RESOLVER_CONTESTED = "resolver-contested"
    RESOLVER_FILE = "resolver-file"
    RESOLVER_ORDER = "resolver-order"
    RESOLVER_COMMAND = "resolver-command"
    RESOLVER_LEFTOVER = "resolver-leftover"
    RESOLVER_FAILED = "resolver-failed"
    NO_PROFILE = "no-profile"
    HOME_UNREADABLE = "home-unreadable"
    TOO_MANY_CLUSTERS = "too-many-clusters"
    LOGIN_EXPIRED = "login-expired"
    LOGIN_UNUSABLE = "login-unusable"
    HARDWARE_KEY = "hardware-key"
    CLUSTER_UNTRUSTED = "cluster-untrusted"
    CLUSTER_UNREACHABLE = "cluster-unreachable"
    SSH_FILES = "ssh-files"
    USER_CHECK_IMPOSSIBLE = "user-check-impossible"
    USER_CHECK_OFF = "user-check-off"
    USER_UNKNOWN = "user-unknown"
    NETWORK_NOT_FORWARDED = "network-not-forwarded"
    METRICS_NOT_SERVED = "metrics-not-served"
    OTHER = "other"


# Of each kind the wordings, in which * is any text. The first one that fits counts, so whatever has
# words of others near its beginning comes late.
WORDINGS: Final[tuple[tuple[ReasonId, tuple[str, ...]], ...]] = (
    (ReasonId.STARTING, ("The workers are starting: wait.",)),
    (
        ReasonId.PROFILES_UNREAD,
        ("The Teleport profiles are being read: wait.", "* has not been read yet: wait"),
    ),
    (ReasonId.CLUSTERS_AWAITED, ("First answers of clusters are due (*",)),
    (
        ReasonId.WORKER_GIVEN_UP,
        ("The worker * too often and is given up: read the log, then run: vnet restart *",),
    ),
    (ReasonId.WORKER_RESTARTING, ("The worker * and is restarted in a moment: wait.",)),
    (ReasonId.WORKER_NOT_READY, ("The worker * is *: wait.",)),
    (ReasonId.WAITING_FOR_ROOM, ("VNet waits, because *.",)),
    (ReasonId.CLUSTER_RANGE_IN_USE, ("The range * of cluster * is used by something else (*",)),
    (
        ReasonId.CLUSTER_WISH_LEFT_OUT,
        ("The * of cluster * is left out: *", "* more zones and ranges are left out: *"),
    ),
    (ReasonId.RANGE_IN_USE, ("The range * is used by something else as well (*",)),
    (ReasonId.RANGE_NOT_ROUTED, ("The range * cannot be routed (*",)),
    (ReasonId.STRAY_ROUTE, ("Another program routes * into *, where nobody answers for it: *",)),
    (ReasonId.PACKETS_ELSEWHERE, ("Packets to * go * instead of *: look at the policy rules*",)),
    (ReasonId.SERVER_COVERED, ("* cannot be reached, because it is routed into *",)),
    (ReasonId.INTERFACE_BROKEN, ("The interface * cannot be put right (*",)),
    (
        ReasonId.INTERFACE_CONTESTED,
        ("Another program keeps taking addresses or routes away from *",),
    ),
    (
        ReasonId.FIREWALL,
        (
            "Nothing that is sent to * is answered*: have this machine's firewall *",
            "* not answered when VNet tries itself*: have this machine's firewall *",
        ),
    ),
    (ReasonId.RESOLVER_STARTING, ("The system's resolver is being set up: wait.",)),
    (
        ReasonId.RESOLVER_NOT_POSSIBLE,
        (
            "dns.os_integration * is not possible, since *",
            "resolvconf is not installed any more: restart VNet.",
        ),
    ),
    (
        ReasonId.RESOLVER_SERVICE_DOWN,
        (
            "systemd-resolved does not run: *",
            "systemd-resolved does not answer on the system bus: *",
            "NetworkManager does not run: *",
        ),
    ),
    (
        ReasonId.RESOLVER_REFUSES,
        (
            "systemd-resolved is not told VNet's zones, since *",
            "systemd-resolved does not know * yet: wait, VNet tries again.",
            "systemd-networkd manages * and its DNS settings: *",
            "NetworkManager's dnsmasq is not told VNet's zones, since *",
        ),
    ),
    (
        ReasonId.RESOLVER_CONTESTED,
        (
            "Another program changes the DNS settings of * again and again: *",
            "Another program writes * again and again: *",
            "* was changed by another program: remove it and restart VNet, or *",
        ),
    ),
    (
        ReasonId.RESOLVER_LEFTOVER,
        (
            "systemd-resolved still sends names to *",
            "The system's resolver is left alone, since * cannot be used (*",
            "The backup of * in * is damaged: write the file anew.",
            "The journal of changes cannot be read (*",
            "* was changed by another program and stays as it is: *",
            "*: this version does not know how to undo it.",
            "* cannot be undone (*): mend that; VNet tries again, *",
        ),
    ),
    (
        ReasonId.RESOLVER_ORDER,
        ("* does not put VNet first in *: put * at the top of its interface order, or *",),
    ),
    (
        ReasonId.RESOLVER_COMMAND,
        (
            "* has not ended after * s: run it by hand.",
            "* has failed (*): run it by hand.",
            "* cannot be started (*): install it again, or restart VNet.",
        ),
    ),
    (
        ReasonId.RESOLVER_FILE,
        (
            "* is neither a file nor a symbolic link: make it one.",
            "* is larger than * bytes: make it shorter.",
            "* is not there, but NetworkManager reads it: make it.",
            "* cannot be written (*): make it writable, or set dns.os_integration = *",
            "* is not VNet's, so names in * are not found: move it away.",
            "VNet changes no more than * settings: use fewer DNS zones.",
            "What the system's resolver reads cannot be changed (*): mend that, or *",
        ),
    ),
    (ReasonId.RESOLVER_FAILED, ("The system's resolver cannot be set up: *",)),
    (ReasonId.SSH_FILES, ("SSH clients are not set up: *", "The SSH files cannot be kept: *")),
    (
        ReasonId.USER_CHECK_IMPOSSIBLE,
        ("This kernel does not say which user connects (*), so nobody may: *",),
    ),
    (
        ReasonId.USER_CHECK_OFF,
        ("This system does not say which user connects (*), so all of its users may: *",),
    ),
    (
        ReasonId.USER_UNKNOWN,
        (
            "security.allow_users: the system knows no user *",
            "security.allow_groups: the system knows no group *",
            "security.allow_groups: * users are more than *",
            "security.allow_users and allow_groups cannot be looked up (*",
        ),
    ),
    (
        ReasonId.NETWORK_NOT_FORWARDED,
        ("* in security.allow_forwarded_from is not in force, because *.",),
    ),
    (ReasonId.METRICS_NOT_SERVED, ("Metrics are not served: *.",)),
    (ReasonId.NO_PROFILE, ("no profile in *: run tsh login *",)),
    (ReasonId.HOME_UNREADABLE, ("* cannot be read (*): run tsh login",)),
    (
        ReasonId.TOO_MANY_CLUSTERS,
        (
            "* profiles too many, they are ignored: run tsh logout *",
            "* clusters are too many and ignored: run tsh logout *",
        ),
    ),
)
# Problems of clusters have words of theirs in them: their state tells the kind.
_BY_STATE: Final[Mapping[ClusterState, ReasonId]] = {
    ClusterState.LOGIN_EXPIRED: ReasonId.LOGIN_EXPIRED,
    ClusterState.NO_LOGIN: ReasonId.LOGIN_UNUSABLE,
    ClusterState.HARDWARE_KEY: ReasonId.HARDWARE_KEY,
    ClusterState.UNREACHABLE: ReasonId.CLUSTER_UNREACHABLE,
    ClusterState.OK: ReasonId.CLUSTER_SETTINGS_IGNORED,
}
_UNTRUSTED: Final = (
    "*: the web port's certificate is not trusted (*",
    "*: the server's certificate is not trusted (*",
    "no host authority of cluster * is known: *",
    "a host authority of cluster * is no certificate: *",
)


def reason_ids(reasons: Iterable[str], clusters: Iterable[Cluster]) -> list[str]:
    """The kind of each reason. `clusters` are those whose problems are among them."""
    of_clusters = {c.problem: _of_cluster(c) for c in clusters if c.problem}
    return [of_clusters.get(reason) or reason_id(reason) for reason in reasons]


def reason_id(text: str) -> ReasonId:
    """The kind of a reason that is no cluster's; OTHER for unknown words."""
    for kind, wordings in WORDINGS:
        if any(_fits(wording, text) for wording in wordings):
            return kind
    return ReasonId.OTHER


def _of_cluster(cluster: Cluster) -> ReasonId:
    is_unreachable = cluster.state is ClusterState.UNREACHABLE
    if is_unreachable and any(_fits(wording, cluster.problem) for wording in _UNTRUSTED):
        return ReasonId.CLUSTER_UNTRUSTED
    return _BY_STATE[cluster.state]


def _fits(wording: str, text: str) -> bool:
    """Whether the text is worded so. Takes time in proportion to the text, whoever chose it."""
    first, *others = wording.split("*")
    if not others:
        return text == first
    *middle, last = others
    if not (text.startswith(first) and text.endswith(last)):
        return False
    at, end = len(first), len(text) - len(last)
    for piece in middle:
        found = text.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return at <= end

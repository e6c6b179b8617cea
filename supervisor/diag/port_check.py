"""Who answers DNS questions on this machine. Pure."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from supervisor.diag.facts import Holder, PortFacts
from supervisor.diag.findings import FindingId, finding
from supervisor.diag.model import CheckReport, Detail, checked

DNS_PORT = 53
MAX_SHOWN = 20
# /proc/net/tcp: TCP_LISTEN; a UDP socket without a peer has the state of a closed one.
_LISTENING = {"tcp": "0A", "udp": "07"}
# These are told their zones by VNet itself, with the back end of this name.
_SERVED = {
    "systemd-resolve": "resolved",
    "systemd-resolved": "resolved",
    "dnsmasq": "networkmanager",
}


@dataclass(frozen=True, slots=True)
class Listening:
    """A socket on port 53 in /proc/net."""

    protocol: str
    address: str
    inode: int


def parse_sockets(protocol: str, text: str) -> list[Listening]:
    """Who takes questions, by the text of /proc/net/tcp, tcp6, udp or udp6 (proc(5)).

    Addresses are words of the machine's byte order. Lines that are none are left out.
    """
    kind = protocol.rstrip("6")
    found = []
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) < 10:
            continue
        address, _, port = words[1].partition(":")
        try:
            if int(port, 16) == DNS_PORT and words[3] == _LISTENING[kind]:
                found.append(Listening(kind, _address(address), int(words[9])))
        except ValueError:
            continue
    return found


def _address(text: str) -> str:
    raw = bytes.fromhex(text)
    if sys.byteorder == "little":
        raw = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    address: IPv4Address | IPv6Address = ip_address(raw)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def holders_of(sockets: Iterable[Listening], owners: Mapping[int, tuple[int, str]]) -> list[Holder]:
    """`owners` maps inodes to process id and name, as far as they may be seen."""
    return [
        Holder(socket.protocol, socket.address, *owners.get(socket.inode, (None, "")))
        for socket in dict.fromkeys(sockets)
    ]


def check_ports(facts: PortFacts, backend: str | None) -> CheckReport:
    """A name server of this machine that programs ask must send VNet's zones on.

    VNet takes no port 53 of this machine's own addresses, so nobody keeps it from starting. `backend`
    is what sets up the system's resolver, None if VNet does not run.
    """
    details = [
        Detail(name=f"{holder.protocol} {holder.address}", value=_who(holder))
        for holder in facts.holders[:MAX_SHOWN]
    ]
    if not details:
        details = [Detail(name="Port 53", value="nobody on this machine")]
    findings = []
    named: set[str] = set()
    for holder in facts.holders:
        is_asked = any(_covers(holder.address, server) for server in facts.nameservers)
        is_told = backend is not None and _SERVED.get(holder.program) == backend
        if is_asked and not is_told and _who(holder) not in named:
            named.add(_who(holder))
            findings.append(
                finding(
                    FindingId.PORT_53_HELD,
                    f"Programs ask a name server of this machine: {_who(holder)} at"
                    f" {holder.address}.",
                    "If it takes its servers from /etc/resolv.conf, give it them in its own"
                    " configuration; VNet's zones must go from it to VNet.",
                )
            )
    return checked(findings, details)


def _who(holder: Holder) -> str:
    if holder.pid is None:
        return "a process of another user (run as root to see which)"
    return f"{holder.program} (process {holder.pid})"


def _covers(held: str, server: str) -> bool:
    holder, asked = ip_address(held), ip_address(server)
    if holder.is_unspecified:
        # Its own addresses are not known here; a loopback one always is.
        return asked.is_loopback and holder.version in (asked.version, 6)
    return holder == asked

"""Who asks, and whether that one may know what VNet's names stand for.

    end of the program --sock_diag--> user id                     may connect, or the system's resolver?
                                      no socket of this machine   in a forwarded network?

Packets pass unchanged, or rewritten; rewritten ones come from VNet's own address, to which they went:

    peer                      the program's end             went to
    program's address : cp    program's address : cp        address of our socket
    DNS address : cp          TUN address : cp              DNS address, port 53      (rewritten)

For a datagram the kernel names the socket that would get the answer. So it is looked for when there is one: who
sent the question and left the port to somebody else gains nothing. A container that asks from a port which a socket
of this machine has at all addresses is taken for that one's user; it asks again from another.
"""

import functools
import logging
import socket
import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from ipc.addresses import as_text
from ipc.messages import Access, Network
from ipc.networks import Networks
from ipc.socket_lookup import SocketLookup
from ipc.socket_owner import UNKNOWN
from workers.dns.cache import ExpiringCache
from workers.dns.tally import Tally

log = logging.getLogger(__name__)

# (address, port), with two more numbers for IPv6; what the socket module says of an end.
End: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
# Whether the one who asked may know.
MayKnow: TypeAlias = Callable[[], bool]

DNS_PORT: Final = 53
# net/tcp_states.h: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT. A program that has said all it has to say
# still reads; a socket without a program is in another state or has no inode.
CONNECTED: Final = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8
# One line of the log for each user in so many seconds, and for so many users.
TOLD_SECONDS: Final = 60.0
_MAX_TOLD: Final = 100


class Who(NamedTuple):
    """`uid` is None where no socket of this machine has the end, UNKNOWN where nobody can tell whose it is."""

    uid: int | None
    address: bytes
    port: int


class Askers:
    """Decides about each asker. Without a `kernel` to ask, nobody is known."""

    def __init__(
        self, network: Network, access: Access, kernel: SocketLookup | None, tally: Tally
    ) -> None:
        self._kernel = kernel
        self._tally = tally
        self._told: ExpiringCache[int | None, bool] = ExpiringCache(_MAX_TOLD)
        self.change_network(network)
        self.change_access(access)

    def change_network(self, network: Network) -> None:
        """Takes over VNet's addresses and the forwarded networks."""
        self._turned = {
            served: own
            for served, own in (
                (network.dns_ipv4, network.tun_ipv4),
                (network.dns_ipv6, network.tun_ipv6),
            )
            if served is not None and own is not None
        }
        self._forwarded = Networks(network.forwarded_from)

    def change_access(self, access: Access) -> None:
        """Takes over who may ask; also for connections that are open."""
        self._is_checked, self._can_tell = access.is_checked, access.can_tell
        self._user = access.user
        self._users = frozenset(access.uids) | frozenset(access.resolvers)
        if self._kernel is not None:
            self._kernel.interface = access.interface

    def close(self) -> None:
        """Nobody is known from now on."""
        if self._kernel is not None:
            self._kernel.close()

    def of_datagram(self, peer: End, own: End) -> MayKnow:
        """For a datagram; looks when it is called, which is best just before the answer is sent."""
        return functools.partial(self._may_send, peer, own)

    def of_connection(self, peer: End, own: End) -> MayKnow:
        """For a connection that was just accepted: looks at once, and decides when it is called."""
        if not self._is_checked:
            return self._may_unchecked
        return functools.partial(self._may_know, self._look(peer, own, is_tcp=True))

    def _may_send(self, peer: End, own: End) -> bool:
        return not self._is_checked or self._may_know(self._look(peer, own, is_tcp=False))

    def _may_unchecked(self) -> bool:
        return not self._is_checked

    def _may_know(self, who: Who) -> bool:
        is_forwarded = who.uid is None and who.address in self._forwarded
        if who.uid in self._users or is_forwarded or not self._is_checked:
            return True
        self._tally.count("refused_users")
        self._tell(who)
        return False

    def _look(self, peer: End, own: End, *, is_tcp: bool) -> Who:
        source, port = _packed(peer[0]), peer[1]
        destination, destination_port = _packed(own[0]), own[1]
        if (before := self._turned.get(source)) is not None:
            source, destination, destination_port = before, source, DNS_PORT
        if self._kernel is None or not self._can_tell:
            return Who(UNKNOWN, source, port)
        try:
            owner = (
                self._kernel.tcp_owner(
                    source, port, destination, destination_port, states=CONNECTED
                )
                if is_tcp
                else self._kernel.udp_owner(source, port, destination, destination_port)
            )
        except OSError as error:
            log.error("the kernel does not say whose a question is, so it is refused: %s", error)
            return Who(UNKNOWN, source, port)
        return Who(None if owner is None else owner.uid, source, port)

    def _tell(self, who: Who) -> None:
        now = time.monotonic()
        if self._told.get(who.uid, now) is not None:
            return
        self._told.put(who.uid, value=True, expires=now + TOLD_SECONDS)
        log.warning(
            "a question for a name of VNet's, from %s port %d, is refused: %s",
            as_text(who.address),
            who.port,
            _why(who.uid, self._user or "the VNet user"),
        )


def _why(uid: int | None, user: str) -> str:
    if uid is None:
        return (
            "no program of this machine waits for the answer, and security.allow_forwarded_from does not"
            " list where it comes from"
        )
    if uid == UNKNOWN:
        return "this system does not say which user has sent it"
    return f"of uid {uid}; only {user}, root and those in security.allow_users may connect"


@functools.lru_cache(maxsize=1000)
def _packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)

"""Who connects, and whether that user may.

    both ends of a held SYN --> the kernel: whose socket is it?
        |-- uid --> one of those that may connect, or a stranger's
        |-- no socket of this machine --> a forwarded network, or a stranger's
        +-- anything else --> a stranger's

The program waits for its SYN to be answered, so its socket is there and in SYN_SENT; whatever else is found
says nothing about it. What cannot be found out is refused.

Two sockets may have the same ends if the first one is bound to the interface; the kernel names the second. So
the first could send its SYN as if it were the other one's, and get the answer once that one is gone. Therefore
the question is asked again when all is ready, and once more about the connection that was accepted.
"""

import socket
from collections.abc import Sequence
from typing import NamedTuple

from ipc.messages import Access, DialRequest, Network
from ipc.networks import Networks
from ipc.socket_lookup import SocketLookup, lookup_of
from ipc.socket_owner import ANY_STATE, SYN_SENT, UNKNOWN


class Stranger(NamedTuple):
    """Why a connection is not for this program; `who` names it, as far as is known.

    `is_gone`: no program has this end, or not any more.
    """

    who: str
    why: str
    is_gone: bool = False


class Doorbell:
    """Says who is at the door. Without a `kernel` to ask, nobody is known."""

    def __init__(self, network: Network, access: Access, kernel: SocketLookup | None) -> None:
        self._kernel = kernel
        self.use_network(network)
        self.use_access(access)

    def use_network(self, network: Network) -> None:
        """Takes over the forwarded networks."""
        self._forwarded = Networks(network.forwarded_from)

    def use_access(self, access: Access) -> None:
        """Takes over who may connect, from the next attempt on."""
        self._access = access
        self._uids = frozenset(access.uids)
        if self._kernel is not None:
            self._kernel.interface = access.interface

    def close(self) -> None:
        """Nobody is let in from now on."""
        if self._kernel is not None:
            self._kernel.close()

    def stranger(self, request: DialRequest) -> Stranger | None:
        """Why this attempt is to be refused; None when it may go on."""
        return self._judge(request, SYN_SENT)

    def taker(self, request: DialRequest) -> Stranger | None:
        """Who has got the connection of an attempt that was let in, if that one may not have it.

        A program that has closed its end already is none: nobody can tell whose it was.
        """
        found = self._judge(request, ANY_STATE)
        return None if found is None or found.is_gone else found

    def _judge(self, request: DialRequest, states: int) -> Stranger | None:
        if not self._access.is_checked:
            return None
        if self._kernel is None or not self._access.can_tell:
            return Stranger(
                "", "this system does not say which user connects: vnet status tells more"
            )
        try:
            owner = self._kernel.tcp_owner(
                request.source,
                request.source_port,
                request.destination,
                request.destination_port,
                states=states,
            )
        except (OSError, ValueError) as error:
            # The latter if tun has made up the ends.
            return Stranger("", f"the system does not say which user connects ({error})")
        if owner is None:
            if request.source in self._forwarded:
                return None
            return Stranger(
                "",
                "no program of this machine waits for it, and security.allow_forwarded_from does not list"
                " where it comes from",
                is_gone=True,
            )
        if owner.uid in self._uids:
            return None
        if owner.uid == UNKNOWN:
            return Stranger("", "its socket is not that of a program that connects", is_gone=True)
        return Stranger(f"uid {owner.uid}", f"only {self._allowed()} may connect")

    def _allowed(self) -> str:
        names = dict.fromkeys((self._access.user or "the VNet user", "root"))
        return f"{', '.join(names)} and those in security.allow_users"


def make_doorbell(network: Network, access: Access, descriptors: Sequence[int]) -> Doorbell:
    """With what came beside the configuration; takes the descriptors over."""
    kernel = socket.socket(fileno=descriptors[0]) if descriptors else None
    return Doorbell(network, access, lookup_of(kernel, access.interface))

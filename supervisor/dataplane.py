"""What the supervisor needs of a data plane, whichever way it is built.

`namespace_plane` moves packets unchanged into a network namespace; `rewriting_plane` does without one. This
module knows no operating system.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ipc.messages import DataPlaneKind, Network, Redirect
from supervisor.exits import StartupError


class LinkLostError(StartupError):
    """The interface was deleted or renamed while VNet ran: everything is to be made anew."""


class UnfitLinkError(Exception):
    """Descriptors of an earlier run that no data plane can be made of; the text says why."""


@dataclass(frozen=True, slots=True)
class KeptLink:
    """A data plane as descriptors, with which another process can go on while the link stays up.

    `dns` in any order. `inner` and `namespace` are None where packets are rewritten. Whoever gets it owns
    the descriptors.
    """

    network: Network
    outer: int
    inner: int | None
    namespace: int | None
    dns: tuple[int, ...]

    @property
    def kind(self) -> DataPlaneKind:
        return DataPlaneKind.REWRITING if self.inner is None else DataPlaneKind.NAMESPACE

    @property
    def descriptors(self) -> tuple[int, ...]:
        parts = (self.outer, self.inner, self.namespace, *self.dns)
        return tuple(part for part in parts if part is not None)

    def close(self) -> None:
        """Gives it up; the link goes with the last copy."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class DataPlane(Protocol):
    """What the supervisor needs of a data plane, whichever way it is built."""

    @property
    def kind(self) -> DataPlaneKind:
        """Which way it is built."""
        ...

    @property
    def has_family_header(self) -> bool:
        """Whether the outer device has the address family before each packet."""
        ...

    @property
    def tun_descriptors(self) -> list[int]:
        """[outer device], and the inner device if there is one; for the tun worker."""
        ...

    @property
    def dns_descriptors(self) -> list[int]:
        """UDP sockets, then listening TCP sockets, IPv4 first; for the dns worker."""
        ...

    @property
    def dns_redirects(self) -> Sequence[Redirect]:
        """Where packets to the DNS addresses go; none where they are not rewritten."""
        ...

    def open_listener(self, address: bytes, port: int) -> socket.socket:
        """A listening TCP socket for a virtual address and port. Raises OSError.

        Where packets are rewritten it has a port of its own at the interface's address.
        """
        ...

    def set_ranges(self, ranges: list[str]) -> dict[str, OSError]:
        """Routes exactly these IPv4 ranges; returns those that could not be, and why."""
        ...

    def set_forwarded(self, networks: Sequence[str]) -> dict[str, OSError]:
        """Answers go back to exactly these networks, whose packets the host forwards here.

        Returns those that cannot be routed, and why. Where packets are rewritten answers go to the interface's
        own address alone, and nothing is done.
        """
        ...

    @property
    def has_ipv6(self) -> bool:
        """Whether IPv6 works on the interface, as far as was seen when it was mended last."""
        ...

    def mend(self) -> list[str]:
        """Puts back what somebody has taken away: the interface up, its addresses, its routes.

        Returns what was missing, in words.

        Raises:
            LinkLostError: the interface is gone.
            OSError: something cannot be put back.
        """
        ...

    def keep(self) -> KeptLink:
        """Everything it is made of; the descriptors stay this one's."""
        ...

    def remove(self) -> None:
        """Removes everything, whoever else has copies of the descriptors."""
        ...

    def close(self) -> None:
        """Closes everything; what nobody else holds is gone then. Safe to call twice."""
        ...

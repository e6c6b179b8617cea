"""What a name stands for, and which address it has: clusters first, then the address book."""

import logging
from ipaddress import IPv4Address, IPv4Network

from ipc.messages import Network, Refusal
from workers.proxy.book import Book, BookError, BookTarget, Entry, RangeFullError
from workers.proxy.naming_outcome import Answer, forwarded, given, missing
from workers.proxy.teleport.client import AppTarget, NotOurs, Teleport
from workers.proxy.teleport.errors import TeleportError, UnknownAppError, ZonesUnknownError

log = logging.getLogger(__name__)


class UnknownAddressError(TeleportError):
    """No name was ever given this address."""

    refusal = Refusal.UNKNOWN_ADDRESS


class Naming:
    """Joins the clusters' knowledge to the shared address book."""

    def __init__(self, teleport: Teleport, book: Book, network: Network) -> None:
        self._teleport = teleport
        self._book = book
        self.network = network

    async def resolve(self, spelling: str) -> Answer:
        """The answer to a question of dns for a name as it was typed. Raises nothing but bugs."""
        name = spelling.lower()
        try:
            target = await self._teleport.resolve(name, spelling)
            if isinstance(target, NotOurs):
                return forwarded()
            return given(self._assign(name, target).address.packed)
        except RangeFullError as error:
            log.warning("%s gets no address: %s", name, error)
            return missing(range_is_full=True)
        except TeleportError as error:
            return self._from_book(name, error)
        except BookError as error:
            log.error("%s: %s", name, error)
            return missing(range_is_full=False)

    async def target_of(self, ipv4: bytes) -> tuple[str, AppTarget]:
        """The name behind a virtual address and the app it stands for now.

        Raises:
            TeleportError: there is none, or its cluster cannot be asked.
            BookError: the book cannot be read.
        """
        entry = self._book.by_address(IPv4Address(ipv4))
        if entry is None:
            raise UnknownAddressError("no name was given this address")
        target = await self._teleport.resolve(entry.name, entry.target.public_addr)
        if isinstance(target, NotOurs):
            raise UnknownAppError(f"{entry.name} stands for no app any more")
        return entry.name, target

    def name_of(self, ipv4: bytes) -> str | None:
        """The name that was given an address, for PTR questions. Raises BookError."""
        entry = self._book.by_address(IPv4Address(ipv4))
        return None if entry is None else entry.name

    def _assign(self, name: str, target: AppTarget) -> Entry:
        known = BookTarget(
            profile=target.profile,
            leaf=target.leaf,
            cluster=target.cluster,
            app=target.app.name,
            public_addr=target.app.public_addr.removesuffix("."),
        )
        return self._book.assign(name, self._range_for(target), known)

    def _range_for(self, target: AppTarget) -> IPv4Network:
        wanted = target.ipv4_range
        # A range that is not routed (refused, or not yet) would give unreachable addresses.
        if wanted is not None and str(wanted) in self.network.ranges:
            return wanted
        return IPv4Network(self.network.ranges[0])

    def _from_book(self, name: str, error: TeleportError) -> Answer:
        try:
            entry = self._book.by_name(name)
        except BookError as book_error:
            log.error("%s: %s", name, book_error)
            return missing(range_is_full=False)
        if entry is not None:
            return given(entry.address.packed, is_certain=False)
        if isinstance(error, ZonesUnknownError) or error.refusal is Refusal.NOT_LOGGED_IN:
            # Nobody can say whether it is an app; other names must go on working.
            return forwarded(is_certain=False)
        log.info("%s cannot be resolved: %s", name, error)
        return missing(range_is_full=False)

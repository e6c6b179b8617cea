"""What a name stands for, and which address it has: clusters first, then the address book."""

import asyncio
import logging
from ipaddress import IPv4Address, IPv4Network

from ipc.messages import Network, Refusal
from workers.proxy.book import (
    APP,
    CLUSTER,
    DATABASE,
    Book,
    BookError,
    BookTarget,
    Entry,
    RangeFullError,
)
from workers.proxy.naming_outcome import Answer, forwarded, given, missing, no_such_name
from workers.proxy.teleport.client import Teleport
from workers.proxy.teleport.errors import TeleportError, ZonesUnknownError
from workers.proxy.teleport.targets import (
    AppTarget,
    DatabaseTarget,
    NoSuchName,
    NotOurs,
    Resolution,
    Target,
    WebApp,
)

log = logging.getLogger(__name__)

# The supervisor routes a range within milliseconds, or refuses it.
ROUTE_SECONDS = 1.0


class UnknownAddressError(TeleportError):
    """No name was ever given this address."""

    refusal = Refusal.UNKNOWN_ADDRESS


class Naming:
    """Joins the clusters' knowledge to the shared address book."""

    def __init__(self, teleport: Teleport, book: Book, network: Network) -> None:
        self._teleport = teleport
        self._book = book
        self._network = network
        self._network_changed = asyncio.Event()
        # Ranges that clusters want and that were waited for in vain; the supervisor refused them.
        self._unrouted: set[str] = set()

    def use_network(self, network: Network) -> None:
        """Ranges were added or removed; the routes are already there."""
        self._network = network
        self._unrouted.clear()
        self._network_changed.set()

    async def resolve(self, spelling: str) -> Answer:
        """The answer to a question of dns for a name as it was typed. Raises nothing but bugs."""
        name = spelling.lower()
        try:
            found = await self._teleport.resolve(name, spelling)
            if isinstance(found, NotOurs | WebApp):
                return forwarded()
            if isinstance(found, NoSuchName):
                return no_such_name()
            entry = await self._assign(name, found)
            return given(entry.address.packed)
        except RangeFullError as error:
            log.warning("%s gets no address: %s", name, error)
            return missing(range_is_full=True)
        except TeleportError as error:
            return self._from_book(name, error)
        except BookError as error:
            log.error("%s: %s", name, error)
            return missing(range_is_full=False)

    def entry_of(self, ipv4: bytes) -> Entry:
        """The name behind a virtual address, and what it stood for last.

        Raises:
            UnknownAddressError: no name has it.
            BookError: the book cannot be read.
        """
        entry = self._book.by_address(IPv4Address(ipv4))
        if entry is None:
            raise UnknownAddressError("no name was given this address")
        return entry

    async def meaning_of(self, entry: Entry) -> Resolution:
        """What a name stands for at the moment of a connection to it.

        Raises:
            TeleportError: its cluster cannot be asked.
        """
        name, spelling = entry.name, entry.target.spelling
        if entry.target.kind != CLUSTER:
            found = await self._teleport.resolve(name, spelling)
            if isinstance(found, AppTarget | DatabaseTarget):
                return found
        # Nothing dials it, as far as is known: what was made a moment ago shall count.
        return await self._teleport.resolve(name, spelling, fresh=True)

    def name_of(self, ipv4: bytes) -> str | None:
        """The name that was given an address, for PTR questions. Raises BookError."""
        entry = self._book.by_address(IPv4Address(ipv4))
        return None if entry is None else entry.name

    async def _assign(self, name: str, target: Target) -> Entry:
        return self._book.assign(name, await self._range_for(target), _note(name, target))

    async def _range_for(self, target: Target) -> IPv4Network:
        """The cluster's range once it is routed: other addresses would lead nowhere."""
        wanted, own = target.ipv4_range, IPv4Network(self._network.ranges[0])
        if wanted is None:
            return own
        # Where the rest of it belongs to somebody else, VNet's own range is a part of it.
        is_as_good = own.subnet_of(wanted) and str(wanted) not in self._network.ranges
        return wanted if not is_as_good and await self._is_routed(str(wanted)) else own

    async def _is_routed(self, text: str) -> bool:
        # The supervisor hears of a range only when the cluster's configuration is known here.
        try:
            async with asyncio.timeout(ROUTE_SECONDS):
                while text not in self._network.ranges and text not in self._unrouted:
                    self._network_changed.clear()
                    await self._network_changed.wait()
        except TimeoutError:
            self._unrouted.add(text)
        return text in self._network.ranges

    def _from_book(self, name: str, error: TeleportError) -> Answer:
        try:
            entry = self._book.by_name(name)
        except BookError as book_error:
            log.error("%s: %s", name, book_error)
            return missing(range_is_full=False)
        if entry is not None and self._teleport.owner(entry.target.profile) is None:
            entry = None  # logged out: its clusters' names are VNet's no more
        if entry is not None and not self._leads_here(entry):
            log.info("%s cannot be reached, its range is not routed: %s", name, error)
            return missing(range_is_full=False)
        if entry is not None:
            return given(entry.address.packed, is_certain=False)
        if isinstance(error, ZonesUnknownError) or error.refusal is Refusal.NOT_LOGGED_IN:
            # Nobody can say whether it is an app; other names must go on working.
            return forwarded(is_certain=False)
        log.info("%s cannot be resolved: %s", name, error)
        return missing(range_is_full=False)

    def _leads_here(self, entry: Entry) -> bool:
        """Whether the address is in a routed range: others belong to somebody else's network.

        VNet's own addresses may have been a name's while it had another range.
        """
        own = (self._network.tun_ipv4, self._network.dns_ipv4)
        return entry.address.packed not in own and any(
            entry.address in IPv4Network(text) for text in self._network.ranges
        )


def _note(name: str, target: Target) -> BookTarget:
    """What the book remembers of a target."""
    spelling = ""
    match target:
        case AppTarget():
            kind, resource = APP, target.app.name
            spelling = target.app.public_addr.removesuffix(".")
        case DatabaseTarget():
            kind, resource = DATABASE, target.database.name
            if resource.lower() == name.partition(".")[0]:
                spelling = resource + name[len(resource) :]
        case _:
            kind, resource = CLUSTER, target.host
    return BookTarget(
        profile=target.profile,
        leaf=target.leaf,
        cluster=target.cluster,
        resource=resource,
        spelling=spelling,
        kind=kind,
    )

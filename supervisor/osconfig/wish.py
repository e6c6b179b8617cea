"""What VNet wants of the system's resolver. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from ipc.addresses import as_text


@dataclass(frozen=True, slots=True)
class ResolverWish:
    """Names in `zones` are to be asked of `servers`, which are on the link `interface`.

    `index` is the link's number, 0 while there is none. `zones` are lower-case without a trailing
    dot; without any, nothing is to be set up. `servers` are packed addresses, IPv4 first.
    """

    interface: str
    index: int
    zones: tuple[str, ...]
    servers: tuple[bytes, ...]

    @property
    def server_texts(self) -> tuple[str, ...]:
        """The servers as resolver files write them."""
        return tuple(map(as_text, self.servers))


def without_own(
    found: Iterable[tuple[str, int, str]], wish: ResolverWish | None
) -> list[tuple[str, int, str]]:
    """These nameservers but VNet's: what asks VNet must not be asked by it."""
    own = wish.server_texts if wish else ()
    return [server for server in found if server[0] not in own]

"""What every way to set up the system's resolver can do, and the way that does nothing."""

from typing import Protocol

from supervisor.osconfig.wish import ResolverWish


class OsConfigError(Exception):
    """The system's resolver is not set up. The text is one sentence that says what to do."""


def said(error: OSError) -> str:
    """What the system says, as a clause with the file it is about."""
    words = error.strerror or str(error)
    return words if error.filename is None else f"{error.filename}: {words}"


class ResolverBackend(Protocol):
    """One way. Calls may block for seconds and come from one thread."""

    @property
    def name(self) -> str:
        """As `dns.os_integration` names it."""
        ...

    def apply(self, wish: ResolverWish) -> None:
        """Makes it so, or does nothing where it is so already. Raises OsConfigError, OSError."""
        ...

    def undo(self) -> None:
        """Makes everything as it was before; any number of times. Raises OsConfigError, OSError."""
        ...

    def upstream(self) -> list[tuple[str, int, str]] | None:
        """Where names go that are not VNet's: (address, port, interface of a link-local one or "").

        None where `/etc/resolv.conf` tells it.
        """
        ...

    def check(self) -> list[str]:
        """Looks whether someone else has changed it, and mends what can be mended.

        Returns sentences for `vnet status`. Raises OsConfigError, OSError.
        """
        ...


class NoBackend:
    """The system is left alone: somebody else points the resolver at VNet."""

    name = "none"

    def apply(self, wish: ResolverWish) -> None:
        """Nothing."""

    def undo(self) -> None:
        """Nothing."""

    def upstream(self) -> list[tuple[str, int, str]] | None:
        return None

    def check(self) -> list[str]:
        return []

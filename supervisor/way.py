"""Where the kernel sends an address."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Way:
    """Where the kernel sends an address: an interface, or nowhere because of an error."""

    interface: str
    problem: str = ""

"""How a test tells a hostile worker what to do."""

import logging
import os
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

TRIGGER = b"\0vnet attack:"
log = logging.getLogger(__name__)


def order(attack: str, pid: int) -> bytes:
    """A datagram that asks the worker with this process id, in its own namespace, for an attack."""
    return TRIGGER + f"{attack}:{pid}".encode()


def name_in(data: bytes) -> str:
    """The attack that a datagram asks for; empty if it is for a predecessor, who was killed before reading it."""
    _, name, pid = data.decode().split(":")
    return name if int(pid) == os.getpid() else ""


def run(name: str, attack: Callable[[T], None], attacker: T) -> None:
    """Attacks, and says in the log when it is over."""
    log.warning("attack %s begins", name)
    try:
        attack(attacker)
    except Exception:
        log.exception("attack %s fails", name)
    log.warning("attack %s is over", name)

"""How a test tells a hostile worker what to do."""

import logging
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

TRIGGER = b"\0vnet attack:"
log = logging.getLogger(__name__)


def name_in(data: bytes) -> str:
    """The attack that a datagram asks for."""
    return data.split(b":", 1)[1].decode()


def run(name: str, attack: Callable[[T], None], attacker: T) -> None:
    """Attacks, and says in the log when it is over."""
    log.warning("attack %s begins", name)
    try:
        attack(attacker)
    except Exception:
        log.exception("attack %s fails", name)
    log.warning("attack %s is over", name)

"""The upstream nameservers: from the configuration, else those of the operating system."""

import logging
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path

from ipc.messages import Upstream
from supervisor.config import split_server
from supervisor.osconfig.resolv_conf import STUBS, nameservers
from supervisor.osconfig.resolved import read_uplinks

log = logging.getLogger(__name__)

RESOLV_CONF = Path("/etc/resolv.conf")
# A new network brings new nameservers; queries fail until they are known.
LOOK_SECONDS = 2.0


Servers = list[tuple[str, int, str]]  # address, port, interface of a link-local one


def find_servers(configured: Sequence[str], known: Servers | None) -> Servers:
    """The configured ones, else those that are known of the system, else those of its file."""
    if configured:
        return [split_server(text) for text in configured]
    if known is not None:
        return known
    try:
        text = RESOLV_CONF.read_text(errors="replace")
    except OSError:
        text = ""
    found = [(address, 53, scope) for address, scope in nameservers(text)]
    if any(address in STUBS for address, _, _ in found):
        # systemd-resolved may ask VNet in turn: the servers that it asks itself, if it names any.
        return read_uplinks() or found
    return found


class Nameservers:
    """`upstream` is the list in force; `own` are VNet's addresses, which are never upstream."""

    def __init__(
        self,
        configured: Sequence[str],
        own: Sequence[bytes],
        known: Callable[[], Servers | None] = lambda: None,
    ) -> None:
        """`known` are those of the system, where `/etc/resolv.conf` does not have them (else None)."""
        self._own = own
        self._known = known
        self._configured = list(configured)
        self._next_look = 0.0
        self._seen: Servers | None = None
        self._has_none = False
        self.upstream = self._find()
        if not self.upstream:
            log.warning("there is no upstream nameserver; names that are not VNet's will fail")

    def configure(self, configured: Sequence[str]) -> None:
        """Takes over a reloaded configuration with the next look."""
        self._configured = list(configured)
        self._next_look = 0.0

    def has_changed(self, now: float) -> bool:
        """Looks again when it is time; True when `upstream` is another list than before."""
        known = self._known()
        if now < self._next_look and known == self._seen:
            return False
        self._seen = known
        self._next_look = now + LOOK_SECONDS
        found = self._find()
        # A file that somebody is about to write is empty for a moment: that is believed the second time.
        is_doubtful = not found and not self._has_none
        self._has_none = not found
        if found == self.upstream or is_doubtful:
            return False
        self.upstream = found
        return True

    def _find(self) -> list[Upstream]:
        return [
            Upstream(address=packed, port=port, scope=scope)
            for address, port, scope in find_servers(self._configured, self._known())
            if (packed := ip_address(address).packed) not in self._own
        ]

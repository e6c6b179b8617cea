"""The upstream nameservers: from the configuration, else those of the operating system."""

import logging
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from ipc.messages import Upstream
from supervisor.config import split_server
from supervisor.osconfig.resolv_conf import nameservers

log = logging.getLogger(__name__)

RESOLV_CONF = Path("/etc/resolv.conf")
# A new network brings new nameservers; queries fail until they are known.
LOOK_SECONDS = 2.0


class Nameservers:
    """`upstream` is the list in force; `own` are VNet's addresses, which are never upstream."""

    def __init__(self, configured: Sequence[str], own: Sequence[bytes]) -> None:
        self._own = own
        self._configured = list(configured)
        self._next_look = 0.0
        self.upstream = self._find()
        if not self.upstream:
            log.warning("there is no upstream nameserver; names that are not VNet's will fail")

    def configure(self, configured: Sequence[str]) -> None:
        """Takes over a reloaded configuration with the next look."""
        self._configured = list(configured)
        self._next_look = 0.0

    def has_changed(self, now: float) -> bool:
        """Looks again when it is time; True when `upstream` is another list than before."""
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_SECONDS
        found = self._find()
        if found == self.upstream:
            return False
        self.upstream = found
        return True

    def _find(self) -> list[Upstream]:
        if self._configured:
            servers = [split_server(text) for text in self._configured]
        else:
            try:
                text = RESOLV_CONF.read_text(errors="replace")
            except OSError:
                text = ""
            servers = [(address, 53, scope) for address, scope in nameservers(text)]
        return [
            Upstream(address=packed, port=port, scope=scope)
            for address, port, scope in servers
            if (packed := ip_address(address).packed) not in self._own
        ]

"""The signal that tells tun that its supervisor has died. Pure.

Every other worker is killed then. tun lives on for a moment, so that what the inner kernel says to the
programs when the proxies die, a reset for each connection, still reaches them.
"""

import signal
from typing import Final

ORPHAN_SIGNAL: Final = signal.SIGUSR2

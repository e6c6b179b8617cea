"""The name of a connection in log lines, the same in every process. Pure.

tun gives each held connection attempt a flow id, which the proxy gets with the question; what
either logs of the connection carries the name that both make of it:

    log.debug("admitted", extra=about(flow_id))
"""

import base64
from typing import Final

# Flow ids of one tun count up from a random number: so many of them differ in these bits.
_BITS: Final = 40


def connection_id(flow_id: int) -> str:
    """`c` and eight characters of base 32 (RFC 4648, section 6, in lower case)."""
    low = flow_id % (1 << _BITS)
    return "c" + base64.b32encode(low.to_bytes(_BITS // 8, "big")).decode().lower()


def about(flow_id: int) -> dict[str, str]:
    """What a log call is given as `extra` when its line is about this connection."""
    return {"connection": connection_id(flow_id)}

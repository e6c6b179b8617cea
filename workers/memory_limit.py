"""How much memory a worker lets itself have: RLIMIT_DATA of getrlimit(2).

libzmq keeps the parts of a message until the last has come, and has a limit for the size of each but none
for their number. So one peer could fill the machine's memory with one message. Beyond this limit the
kernel gives the worker nothing more: it aborts, and the supervisor starts another.
"""

import os
import resource
from typing import Final

from ipc.messages import ConfigureDns, ConfigureMetrics, ConfigureProxy, ConfigureTun

# Five times what any worker has been seen to take without connections, stacks of threads included.
BASE_BYTES: Final = 512 << 20
# A connection whose two ends do not read: 450 KB were measured.
CONNECTION_BYTES: Final = 512 * 1024
# Of the machine's memory: a worker that takes more is ended before the kernel has to choose whom to end.
MACHINE_SHARE: Final = 2
# Of BASE_BYTES: metrics needs neither the bus nor room for packets.
METRICS_SHARE: Final = 2


def most_bytes(
    config: ConfigureTun | ConfigureDns | ConfigureProxy | ConfigureMetrics, machine_bytes: int
) -> int:
    """The limit of a worker on a machine with so much memory. Pure."""
    if isinstance(config, ConfigureMetrics):
        return BASE_BYTES // METRICS_SHARE
    connections = config.max_connections if isinstance(config, ConfigureProxy) else 0
    wanted = BASE_BYTES + connections * CONNECTION_BYTES
    return max(BASE_BYTES, min(wanted, machine_bytes // MACHINE_SHARE))


def limit_memory(most: int) -> None:
    """Holds for this process from now on, for good; a lower limit that is there stays. Raises OSError."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def machine_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

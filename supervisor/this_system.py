"""The parts of VNet that differ between Linux and macOS, as this system has them."""

import socket
import sys

from supervisor.host_link import Host

if sys.platform == "darwin":
    from supervisor.macos.host import MacHost as _Host
    from supervisor.macos.host_network import HostNetwork, Monitor, read_host
else:
    from supervisor.devices import LinuxHost as _Host
    from supervisor.host_network import HostNetwork, Monitor, read_host

__all__ = ["HostNetwork", "Monitor", "bind_to", "host", "read_host"]


def host() -> Host:
    """Devices, addresses and routes of this system."""
    return _Host()


def bind_to(end: socket.socket, interface: str) -> None:
    """Has an IPv4 socket send through this interface alone. Raises OSError."""
    _Host().restrict(end, interface)

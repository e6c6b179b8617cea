"""The dns worker's process: builds the parts and connects them with supervisor and proxies."""

import functools
import logging
import resource
import socket

from ipc.bus import BusClient
from ipc.messages import (
    AnyMessage,
    ConfigureDns,
    DnsToProxy,
    NamesChanged,
    Network,
    NetworkChanged,
    UpstreamChanged,
)
from workers.dns.resolver import Resolver
from workers.dns.servers import select_servers
from workers.dns.service import DnsService
from workers.dns.tally import Tally
from workers.dns.tcp import TcpServer
from workers.dns.udp import UdpServer
from workers.dns.upstream import Forwarder
from workers.runtime import Runtime

log = logging.getLogger(__name__)

# Towards upstream, two sockets per server and question may be open; clients' connections and the
# bus come on top.
WANTED_DESCRIPTORS = 4096
# More servers make no answer better, and each question goes to all of them.
MAX_SERVERS = 6


async def main(runtime: Runtime[ConfigureDns]) -> None:
    """Serves the sockets in `runtime.descriptors` until the runtime stops."""
    config = runtime.config
    tally = Tally(runtime.counters)
    forwarder = Forwarder(tally, max_sockets=_raise_descriptor_limit() // 2)
    buses: list[BusClient] = []

    def send(index: int, message: DnsToProxy) -> None:
        buses[index].send(message)

    resolver = Resolver(send, config.common.proxies)
    buses.extend(
        runtime.join_bus(
            f"proxy-{index}", resolver.on_message, functools.partial(resolver.on_connect, index)
        )
        for index in range(config.common.proxies)
    )
    service = DnsService(config.network, config.ttl_seconds, resolver, forwarder, tally)
    settings = _Settings(config, service, forwarder)
    runtime.on_message = settings.on_message
    sockets = [socket.socket(fileno=descriptor) for descriptor in runtime.descriptors]
    udp = [UdpServer(sock, service, tally) for sock in sockets if sock.type == socket.SOCK_DGRAM]
    tcp = [TcpServer(sock, service, tally) for sock in sockets if sock.type == socket.SOCK_STREAM]
    for udp_server in udp:
        udp_server.start()
    for tcp_server in tcp:
        await tcp_server.start()
    runtime.ready()
    log.info("serving DNS on %d UDP and %d TCP sockets", len(udp), len(tcp))
    await runtime.stopping.wait()
    for udp_server in udp:
        udp_server.close()
    for tcp_server in tcp:
        await tcp_server.close()
    service.close()
    resolver.close()


class _Settings:
    """The present network and upstream list; either may change at any time."""

    def __init__(self, config: ConfigureDns, service: DnsService, forwarder: Forwarder) -> None:
        self._network: Network = config.network
        self._upstream = config.upstream
        self._service = service
        self._forwarder = forwarder
        self._choose_servers()

    def on_message(self, message: AnyMessage, _descriptors: list[int]) -> None:
        """Takes over what the supervisor says has changed."""
        if isinstance(message, NetworkChanged):
            self._network = message.network
            self._service.change_network(message.network)
        elif isinstance(message, UpstreamChanged):
            self._upstream = message.upstream
            self._service.forget()
        elif isinstance(message, NamesChanged):
            self._service.forget()
            return
        else:
            log.error("%s is not for this worker", type(message).__name__)
            return
        self._choose_servers()

    def _choose_servers(self) -> None:
        servers = select_servers(self._upstream, self._network, MAX_SERVERS)
        self._forwarder.servers = servers
        if servers:
            log.info("upstream DNS servers: %s", ", ".join(map(str, servers)))
        else:
            log.warning("no upstream DNS server: names that are not VNet's get SERVFAIL")


def _raise_descriptor_limit() -> int:
    """Raises the soft limit as far as wanted and allowed; the limit that holds then."""
    soft, hard = (
        WANTED_DESCRIPTORS if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    if soft >= WANTED_DESCRIPTORS:
        return WANTED_DESCRIPTORS
    wanted = min(WANTED_DESCRIPTORS, hard)
    # Keeping the hard limit needs no right.
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    return wanted

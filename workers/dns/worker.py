"""The dns worker's process: builds the parts and connects them with supervisor and proxies."""

import asyncio
import functools
import logging
import resource
import socket
from contextlib import suppress

from ipc.bus import BusClient
from ipc.messages import (
    AnyMessage,
    ConfigureDns,
    DnsToProxy,
    NamesChanged,
    Network,
    NetworkChanged,
    SecurityChanged,
    UpstreamChanged,
)
from ipc.socket_lookup import lookup_of
from workers.dns.askers import Askers
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
# No question takes longer (`race.Patience`), and a client that has not had its answer asks again.
FINISH_SECONDS = 5.0


async def main(runtime: Runtime[ConfigureDns]) -> None:
    """Serves the sockets in `runtime.descriptors` until the runtime stops or drains."""
    config = runtime.config
    tally = Tally(runtime.counters)
    forwarder = Forwarder(tally, max_sockets=_raise_descriptor_limit() // 2)
    buses: list[BusClient] = []

    def send(index: int, message: DnsToProxy) -> None:
        buses[index].send(message)

    resolver = Resolver(send, config.common.proxies)
    buses.extend(
        runtime.join_bus(
            f"proxy-{index}",
            functools.partial(resolver.on_message, index),
            functools.partial(resolver.on_connect, index),
            functools.partial(resolver.on_disconnect, index),
        )
        for index in range(config.common.proxies)
    )
    service = DnsService(config.network, config.ttl_seconds, resolver, forwarder, tally)
    ends = [socket.socket(fileno=descriptor) for descriptor in runtime.descriptors]
    netlink = next((end for end in ends if end.type == socket.SOCK_RAW), None)
    kernel = lookup_of(netlink, config.access.interface)
    askers = Askers(config.network, config.access, kernel, tally)
    settings = _Settings(config, service, askers, forwarder)
    runtime.on_message = settings.on_message
    udp = [UdpServer(end, service, askers, tally) for end in ends if end.type == socket.SOCK_DGRAM]
    tcp = [TcpServer(end, service, askers, tally) for end in ends if end.type == socket.SOCK_STREAM]
    front = _Front(udp, tcp, service)

    async def work() -> None:
        await runtime.taken_over()
        await front.start()
        runtime.ready()
        log.info("serving DNS on %d UDP and %d TCP sockets", len(udp), len(tcp))
        await runtime.draining.wait()
        front.stop_taking()
        runtime.handed_over()
        await front.finish(min(FINISH_SECONDS, runtime.drain_seconds))

    try:
        await runtime.until_stopped(work())
    finally:
        await front.close()
        resolver.close()
        askers.close()


class _Front:
    """All sockets, and what answers on them."""

    def __init__(self, udp: list[UdpServer], tcp: list[TcpServer], service: DnsService) -> None:
        self._udp = udp
        self._tcp = tcp
        self._service = service

    async def start(self) -> None:
        """Begins to read and to accept."""
        for udp_server in self._udp:
            udp_server.start()
        for tcp_server in self._tcp:
            await tcp_server.start()

    def stop_taking(self) -> None:
        """Leaves further questions to a successor, which has the same sockets."""
        for udp_server in self._udp:
            udp_server.stop_reading()
        for tcp_server in self._tcp:
            tcp_server.stop_accepting()

    async def finish(self, seconds: float) -> None:
        """Returns when what was taken is answered, or after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for tcp_server in self._tcp:
                    await tcp_server.finished()
                await self._service.finished()

    async def close(self) -> None:
        for udp_server in self._udp:
            udp_server.close()
        for tcp_server in self._tcp:
            await tcp_server.close()
        self._service.close()


class _Settings:
    """The present network, upstream list and users; each may change at any time."""

    def __init__(
        self, config: ConfigureDns, service: DnsService, askers: Askers, forwarder: Forwarder
    ) -> None:
        self._network: Network = config.network
        self._upstream = config.upstream
        self._service = service
        self._askers = askers
        self._forwarder = forwarder
        self._choose_servers()

    def on_message(self, message: AnyMessage, _descriptors: list[int]) -> None:
        """Takes over what the supervisor says has changed."""
        if isinstance(message, NetworkChanged):
            self._network = message.network
            self._service.change_network(message.network)
            self._askers.change_network(message.network)
        elif isinstance(message, UpstreamChanged):
            self._upstream = message.upstream
            self._service.forget()
        elif isinstance(message, NamesChanged):
            self._service.forget()
            return
        elif isinstance(message, SecurityChanged):
            self._askers.change_access(message.access)
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

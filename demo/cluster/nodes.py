"""Connections to SSH nodes: real servers, the cluster's own small one, and through the recorder.

| node        | recording   | where the client's bytes go                                      |
| with `addr` | at the node | to that address                                                  |
| without     | at the node | over a socket pair to a `NodeTransport`                          |
| any         | at the proxy | over a socket pair to a `RecordingTransport`, which dials the node |
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ed25519

from demo.cluster.config import Node
from demo.cluster.errors import AccessError
from demo.cluster.identity import Identity
from demo.cluster.ssh_recorder import RecordingTransport
from demo.cluster.ssh_server import NodeTransport, Place
from demo.cluster.state import ClusterState, may_use
from demo.cluster.streams import Streams, closing

DIAL_SECONDS = 10.0
# How much may wait to be read: few large reads, where a bulk transfer is measured.
READ_AHEAD_BYTES = 256 * 1024

_Transport = NodeTransport | RecordingTransport


@dataclass(frozen=True, slots=True)
class NodeLink:
    """A connection to a node; `agent` leads to whom asks for the client's agent, if anybody."""

    node: Node
    streams: Streams
    agent: Streams | None = None


class Nodes:
    """Dials the nodes of all clusters, and keeps what serves those without an address."""

    def __init__(self) -> None:
        self._keys: dict[str, ed25519.Ed25519PrivateKey] = {}
        self._transports: set[_Transport] = set()

    def key(self, node: Node) -> ed25519.Ed25519PrivateKey:
        """The host key of a node, the same one each time."""
        if node.uuid not in self._keys:
            self._keys[node.uuid] = ed25519.Ed25519PrivateKey.generate()
        return self._keys[node.uuid]

    @contextlib.asynccontextmanager
    async def dial(
        self, state: ClusterState, node: Node, caller: Identity, client_address: str
    ) -> AsyncIterator[NodeLink]:
        """A connection while the block runs; `state` is the cluster that has the node.

        Raises:
            AccessError: no role of the caller allows it, and the node itself cannot know.
            OSError: it is offline, or cannot be reached.
        """
        if node.hostname in state.faults.node_offline or node.uuid in state.faults.node_offline:
            raise ConnectionRefusedError(f"{node.hostname} is offline")
        # The small server looks at the certificate; a real sshd knows nothing of roles.
        if node.addr and not may_use(node, caller):
            raise AccessError(f"access denied to {node.hostname}")
        place = Place(state, node, self.key(node), client_address)
        if state.config.session_recording == "proxy":
            async with self._recorded(place) as link:
                yield link
        elif node.addr:
            streams = await _dial_address(node)
            async with closing(streams[1]):
                yield NodeLink(node, streams)
        else:
            ours, theirs = socket.socketpair()
            async with self._served(ours, NodeTransport(theirs, place)) as streams:
                yield NodeLink(node, streams)

    @contextlib.asynccontextmanager
    async def _recorded(self, place: Place) -> AsyncIterator[NodeLink]:
        ours, theirs = socket.socketpair()
        agent, asked = socket.socketpair()

        def dial() -> socket.socket:
            if place.node.addr:
                return socket.create_connection(place.node.address, DIAL_SECONDS)
            # The recorder's client is the proxy's own: its host certificate is not looked at.
            client, server = socket.socketpair()
            self._begin(NodeTransport(server, place))
            return client

        asking = await asyncio.open_connection(sock=agent)
        async with closing(asking[1]):
            recorder = RecordingTransport(theirs, place, asked, dial)
            async with self._served(ours, recorder) as streams:
                yield NodeLink(place.node, streams, asking)

    @contextlib.asynccontextmanager
    async def _served(self, ours: socket.socket, transport: _Transport) -> AsyncIterator[Streams]:
        self._begin(transport)
        streams = await asyncio.open_connection(sock=ours)
        async with closing(streams[1]):
            yield streams

    def _begin(self, transport: _Transport) -> None:
        self._transports = {one for one in self._transports if one.is_alive()}
        transport.begin()
        self._transports.add(transport)

    async def stop(self) -> None:
        """Ends every connection that is served here, and the programs that run in them."""
        transports, self._transports = self._transports, set()
        await asyncio.gather(*(asyncio.to_thread(one.end) for one in transports))


async def _dial_address(node: Node) -> Streams:
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            return await asyncio.open_connection(*node.address, limit=READ_AHEAD_BYTES)
    except TimeoutError as error:
        raise TimeoutError(f"{node.hostname} does not answer within {DIAL_SECONDS:g} s") from error

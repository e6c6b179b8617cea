"""One of the two SSH connections of a session: its endpoint, its packets, its transport.

    endpoint  <-- layer, if any <-- packets (codec) <-- messages --> transport (up to 79)
                                                                 --> the other leg (from 80)

A leg sends at any time and never fails at it: a peer that is gone is mute from then on, and reading,
which goes on, finds what it sent last and how it ended.
"""

import socket
import threading
from contextlib import suppress

from workers.proxy.endpoint import Endpoint
from workers.proxy.layers import Layer, LayerError
from workers.proxy.ssh import messages
from workers.proxy.ssh.codec import (
    MAX_OVERHEAD_BYTES,
    MAX_PACKET_BYTES,
    PLAIN_BYTES,
    PacketReader,
    PacketWriter,
)
from workers.proxy.ssh.transport import DrivenTransport
from workers.proxy.ssh.version import VERSION, VersionReader
from workers.proxy.ssh_stream import SshStream

_QUICKACK: int = getattr(socket, "TCP_QUICKACK", 12)


class SshMemory(threading.local):
    """What all sessions of a thread use in turn, never two at a time."""

    def __init__(self) -> None:
        # One packet, see `codec`.
        self.plain = memoryview(bytearray(PLAIN_BYTES))
        # Packets for one leg that are sealed and not yet sent.
        self.outgoing = memoryview(bytearray(2 * (MAX_PACKET_BYTES + MAX_OVERHEAD_BYTES)))


class Leg:
    """See the module. The session attaches itself to `endpoint` and sets `transport`."""

    __slots__ = (
        "_layer",
        "early_packets",
        "endpoint",
        "error",
        "is_closed",
        "is_ended",
        "is_halted",
        "is_mute",
        "is_shut",
        "reader",
        "rekey_at",
        "sent_bytes",
        "stash",
        "transport",
        "version",
        "writer",
    )

    transport: DrivenTransport

    def __init__(self, endpoint: Endpoint, layer: Layer | None, *, is_server: bool) -> None:
        """`is_server`: the peer is one."""
        self._layer = layer
        self.endpoint = endpoint
        self.reader = PacketReader()
        self.writer = PacketWriter()
        self.version: VersionReader | None = VersionReader(is_server=is_server)  # until it is read
        self.is_halted = False  # received packets wait; the session says why
        self.stash: bytes | None = None  # the connection message that is next, when halted there
        self.is_ended = False  # nothing more can be read
        self.is_mute = False  # nothing more can be sent
        self.is_shut = False  # our direction is over, all was sent
        self.is_closed = False
        self.error = ""  # of the layer, when something was sent
        self.early_packets = 0  # before the login
        self.sent_bytes = 0
        self.rekey_at = 0.0  # in the loop's time

    @property
    def pending_bytes(self) -> int:
        """Given to `put` and not yet taken by the kernel or allowed by the far end."""
        waiting = 0 if self._layer is None else self._layer.pending_bytes
        return self.endpoint.pending_bytes + waiting

    @property
    def end_reason(self) -> str:
        """Why the layer ended, if it was not in order."""
        return self._layer.end_reason if isinstance(self._layer, SshStream) else ""

    def decrypt(self, records: memoryview) -> memoryview:
        """What the layer makes of received bytes; its answers are sent.

        Raises:
            LayerError: the connection is broken below SSH.
        """
        layer = self._layer
        if layer is None:
            return records
        data = layer.decrypt(records)
        if reply := layer.take_records():
            self._send(reply)
        if layer.is_receive_ended:
            self.is_ended = True
        return data

    def put(self, data: memoryview | bytes) -> None:
        """Sends bytes of SSH now or later. A view may be overwritten afterwards."""
        if self.is_mute or self.is_shut:
            return
        self.sent_bytes += len(data)
        if self._layer is not None:
            try:
                data = self._layer.encrypt(memoryview(data))
            except LayerError as error:
                self.error = str(error)
                self.mute()
                return
        if data:
            self._send(data)

    def greet(self) -> None:
        """Sends our version (RFC 4253 section 4.2)."""
        self.put(VERSION.encode() + b"\r\n")

    def send_message(self, payload: bytes) -> None:
        """Sends one message of ours, after what was put before."""
        self.put(self.writer.pack(payload))

    def say_goodbye(self, reason: int, text: str) -> None:
        """Sends SSH_MSG_DISCONNECT, if the peer can understand it."""
        if self.version is None:
            self.send_message(messages.disconnect(reason, text))

    def mute(self) -> None:
        """Nothing can be sent any more."""
        self.is_mute = True
        self.endpoint.discard()

    def shut(self) -> None:
        """Ends our direction; everything has been sent."""
        if self.is_shut or self.is_mute:
            return
        try:
            if self._layer is not None and (ending := self._layer.close_notify()):
                self._send(ending)
            self.is_shut = True
            if self._layer is None or self._layer.ends_with_fin:
                self.endpoint.socket.shutdown(socket.SHUT_WR)
        except (LayerError, OSError):
            self.mute()

    def close(self) -> None:
        """Closes the connection, whatever waits."""
        if not self.is_closed:
            self.is_closed = self.is_mute = self.is_ended = True
            self.endpoint.close()

    def reset(self) -> None:
        """Resets the connection, whatever waits."""
        if not self.is_closed:
            self.is_closed = self.is_mute = self.is_ended = True
            self.endpoint.reset()

    def make_quick(self) -> None:
        """Small pieces are sent at once."""
        with suppress(OSError):  # gone already: reading tells
            self.endpoint.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def acknowledge(self) -> None:
        """Lets the kernel acknowledge at once what was received.

        OpenSSH's client sends some of its first messages in pairs and leaves the second to Nagle's
        algorithm (RFC 9293 section 3.7.4), which waits for the acknowledgement of the first: 40 ms
        each time.
        """
        with suppress(OSError):
            self.endpoint.socket.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)

    def _send(self, data: memoryview | bytes) -> None:
        try:
            self.endpoint.send(data)
        except OSError:
            self.mute()

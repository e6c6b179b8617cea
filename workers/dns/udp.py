"""The UDP side: one socket per DNS address.

A wake-up reads a bounded batch, so that a flood on one socket starves neither the others nor the
heartbeat. What can be answered at once is answered without a task; answers leave through the
socket the question came in by, and so from the address it was sent to.
"""

import asyncio
import logging
import socket
import time
from contextlib import suppress
from typing import Final

from workers.dns.askers import Askers, End
from workers.dns.message import MAX_QUERY_BYTES
from workers.dns.service import DnsService
from workers.dns.tally import Tally

log = logging.getLogger(__name__)

BATCH: Final = 64
# Room for bursts while the worker is busy or being replaced; the kernel may give less.
RECEIVE_BUFFER_BYTES: Final = 1 << 20


class UdpServer:
    """Serves one bound, non-blocking UDP socket, which it owns."""

    def __init__(
        self, sock: socket.socket, service: DnsService, askers: Askers, tally: Tally
    ) -> None:
        self._socket = sock
        self._own: End = sock.getsockname()
        self._service = service
        self._askers = askers
        self._tally = tally
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begins to read."""
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        self._loop.add_reader(self._socket.fileno(), self._read_batch)

    def stop_reading(self) -> None:
        """Leaves further questions to whoever else has the socket; late answers are still sent."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())

    def close(self) -> None:
        """Stops reading and closes the socket; late answers are dropped."""
        self.stop_reading()
        self._socket.close()

    def _read_batch(self) -> None:
        start = time.monotonic()
        answered = 0
        for _ in range(BATCH):
            try:
                # One byte more than allowed, so that a longer message is seen to be too long.
                data, peer = self._socket.recvfrom(MAX_QUERY_BYTES + 1)
            except BlockingIOError:
                break
            except OSError as error:
                # The kernel reports an earlier answer's ICMP error here; nothing is lost.
                log.debug("reading questions: %s", error)
                continue
            answered += self._take(data, peer, start)
        if answered:
            # The batch's whole time for each of its answers: an upper bound for one clock reading.
            self._tally.observe(time.monotonic() - start, answered)

    def _take(self, data: bytes, peer: End, now: float) -> bool:
        """Whether the message was answered at once."""
        may_know = self._askers.of_datagram(peer, self._own)
        reply = self._service.at_once(data, now, may_know)
        if isinstance(reply, bytes):
            self._send(reply, peer)
            return True
        if reply is not None:
            self._service.begin(
                reply, may_know, lambda late: self._send(late, peer), over_tcp=False
            )
        return False

    def _send(self, data: bytes, peer: End) -> None:
        try:
            self._socket.sendto(data, peer)
        except OSError as error:
            # A full send buffer or a client that is gone: it asks again, as for any lost datagram.
            self._tally.count("send_failures")
            log.debug("an answer to %s was not sent: %s", peer[0], error)

"""One TLS client connection as a machine: records in, plaintext out, and back. No socket here.

Asyncio's and uvloop's own TLS cannot half-close, which a relay must: the program's FIN becomes
close_notify while the app still sends. `ssl.SSLObject` on memory BIOs can, with care:

- `SSLObject.unwrap` calls SSL_shutdown twice. The first call sends close_notify; the second
  looks for the peer's and breaks the connection for good ("application data after close
  notify") if it finds application data. So the incoming BIO has to be empty when it is called.
- It is: every call here reads until OpenSSL wants more input, which it does only after emptying
  the incoming BIO. A record of which only a part has come waits inside the SSL object. (A real
  `SSLSocket` gives no such guarantee, as data may reach the socket at any time.)

The same rule makes both BIOs empty whenever a call returns, and so all connections of a thread
share one pair, and one pair of buffers: `TlsMemory`. BIOs never shrink; with a pair for each
connection, one burst on each of 1,000 connections would cost hundreds of megabytes for ever.
Connections inside one another (`workers.proxy.tunnel`) share them as well.
"""

import ssl
from collections.abc import Callable
from typing import cast

from workers.proxy.layers import LayerError

# RFC 8446 section 5.1 (and RFC 5246 section 6.2.1): the largest plaintext of one record.
RECORD_BYTES = 16384

# TLS to a forward proxy, in it TLS to a load balancer, in it TLS to the proxy.
MAX_NESTED = 3

# Read from a socket at once. docs/performance.md has what other sizes measured.
READ_BYTES = 256 * 1024


class TlsError(LayerError):
    """Base: this TLS connection is broken. The text is safe to log and show."""


class PeerUntrustedError(TlsError):
    """The peer's certificate is not valid for its name, or nobody trusted has signed it."""


class AlertReceivedError(TlsError):
    """The peer refused with an alert (RFC 8446 section 6.2), a certificate of ours for example."""


class TlsMemory:
    """What all TLS connections of one thread use in turn, never two at a time.

    `read_bytes` is how much is read from a socket at once. Views into `read_buffer` and
    `plaintext` hold until the next callback of the event loop.
    """

    __slots__ = ("incoming", "outgoing", "plaintext", "read_buffer")

    def __init__(self, read_bytes: int = READ_BYTES) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.read_buffer = memoryview(bytearray(read_bytes))
        # Plaintext is never longer than its records; one record may have been waiting in each
        # connection of a nest, and there must be room for a whole one at the end.
        self.plaintext = memoryview(bytearray(read_bytes + (MAX_NESTED + 1) * RECORD_BYTES))


class TlsConnection:
    """The client's side of one TLS 1.2 or 1.3 connection; a `workers.proxy.layers.Layer`.

    All methods raise TlsError (or a leaf of it); the connection is then of no more use.
    """

    __slots__ = ("_memory", "_read", "_ssl", "is_receive_ended")

    ends_with_fin = False
    pending_bytes = 0

    def __init__(self, context: ssl.SSLContext, server_hostname: str, memory: TlsMemory) -> None:
        self._memory = memory
        self._ssl = context.wrap_bio(
            memory.incoming, memory.outgoing, server_side=False, server_hostname=server_hostname
        )
        # The stubs know only the form without a buffer, which returns bytes.
        self._read = cast("Callable[[int, memoryview], int]", self._ssl.read)
        self.is_receive_ended = False  # the peer sent close_notify

    @property
    def alpn(self) -> str | None:
        """The application protocol the peer chose, once the handshake is done."""
        return self._ssl.selected_alpn_protocol()

    def handshake(self, records: bytes | memoryview) -> bool:
        """Takes the peer's next handshake bytes (none at first); True when it is done.

        After each call, also one that raised, `take_records` has what to send. When done, call
        `decrypt` with nothing at once: the peer's first data may have come with its last flight.
        """
        memory = self._memory
        if records:
            memory.incoming.write(records)
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            memory.incoming.read()
            raise _translate(error) from error
        return True

    def decrypt(self, records: bytes | memoryview) -> memoryview:
        """All plaintext in the next bytes from the peer, at most TlsMemory.read_bytes of them.

        `records` may be a view of `TlsMemory.plaintext`: it is copied first. The result is one of
        it. After close_notify it is empty and `is_receive_ended` is True. Answers to post-handshake
        messages wait in `take_records`.
        """
        memory = self._memory
        incoming, plaintext, read = memory.incoming, memory.plaintext, self._read
        incoming.write(records)
        filled = 0
        try:
            while incoming.pending:
                count = read(RECORD_BYTES, plaintext[filled:])
                if not count:
                    self.is_receive_ended = True
                    incoming.read()
                filled += count
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:  # instead of 0, when close_notify went out before
            self.is_receive_ended = True
            incoming.read()
        except ssl.SSLError as error:
            incoming.read()
            memory.outgoing.read()  # the alert: a reset tells the peer as much
            raise _translate(error) from error
        return plaintext[:filled]

    def encrypt(self, data: memoryview) -> bytes:
        """The records that carry `data` (not empty)."""
        write = self._ssl.write
        try:
            written = write(data)
            while written < len(data):
                written += write(data[written:])
        except ssl.SSLError as error:
            self._memory.outgoing.read()
            raise _translate(error) from error
        return self._memory.outgoing.read()

    def close_notify(self) -> bytes:
        """The record that ends our direction (RFC 8446 section 6.1); the peer's stays open."""
        try:
            self._ssl.unwrap()
        except ssl.SSLWantReadError:
            pass  # the peer's close_notify has not come yet: that is the half-close
        except ssl.SSLError as error:
            self._memory.outgoing.read()
            raise _translate(error) from error
        return self._memory.outgoing.read()

    def take_records(self) -> bytes:
        """What the connection itself has to send: handshake, key updates, alerts. May be empty."""
        outgoing = self._memory.outgoing
        return outgoing.read() if outgoing.pending else b""


def _translate(error: ssl.SSLError) -> TlsError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return PeerUntrustedError(f"certificate not trusted: {error.verify_message}")
    reason = (error.reason or "no reason given").replace("_", " ").lower()
    if "alert" in reason:
        return AlertReceivedError(f"refused with a TLS alert: {reason}")
    return TlsError(f"TLS failed: {reason}")

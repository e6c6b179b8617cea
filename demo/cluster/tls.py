"""Server-side TLS over any byte stream with half-close, and the contexts for it.

asyncio's own TLS transport closes both directions at once. Here each direction has its end, as
with Go's tls.Conn: close_notify out is `write_eof`, close_notify in is an empty `read`.
"""

import contextlib
import ssl
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from demo.cluster.authorities import Authority, KeyPair
from demo.cluster.errors import TruncatedStreamError
from demo.cluster.streams import READ_BYTES, ByteStream

# More time than any real client needs; ends connections that never speak.
HANDSHAKE_SECONDS = 20.0


def server_context(
    pair: KeyPair,
    protocols: Sequence[str],
    client_authorities: Iterable[Authority] = (),
    verify_mode: ssl.VerifyMode = ssl.CERT_NONE,
) -> ssl.SSLContext:
    """A context that shows `pair`, offers `protocols` by ALPN and verifies client certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # ssl loads keys from files only; the file is gone as soon as it is read.
    with tempfile.NamedTemporaryFile() as file:
        file.write(pair.key_pem() + pair.certificate_pem())
        file.flush()
        context.load_cert_chain(file.name)
    context.set_alpn_protocols(list(protocols))
    pems = [authority.tls.certificate_pem().decode() for authority in client_authorities]
    if pems:
        context.load_verify_locations(cadata="".join(pems))
    context.verify_mode = verify_mode
    return context


class TlsStream:
    """One TLS connection. One task may read while others write."""

    def __init__(self, below: ByteStream, context: ssl.SSLContext) -> None:
        self._below = below
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._drained = b""
        self._is_read_closed = False
        self.is_write_closed = False

    async def handshake(self) -> None:
        """Completes the handshake.

        Raises:
            ssl.SSLError: it failed; the alert is sent.
            TruncatedStreamError, OSError: the connection ended.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._receive()
            except ssl.SSLError:
                await self._flush()
                raise
            else:
                await self._flush()
                return

    def peer(self) -> dict[str, Any] | None:
        """The verified peer certificate as `getpeercert()` gives it; None or empty without one."""
        return self._tls.getpeercert()

    def peer_certificate_count(self) -> int:
        """How many certificates the peer sent."""
        # Public only since Python 3.13; the method below it is older.
        return len(self._tls._sslobj.get_unverified_chain() or ())  # type: ignore[attr-defined] # noqa: SLF001

    async def read(self) -> bytes:
        """Some plaintext; empty when the peer has closed its direction.

        Raises:
            TruncatedStreamError: the stream below ended without close_notify.
        """
        if self._drained:
            drained, self._drained = self._drained, b""
            return drained
        while (data := self._take()) is None:
            await self._flush()
            await self._receive()
        return data

    async def write(self, data: bytes) -> None:
        """Sends `data` whole and in one go; waits while the peer reads too slowly."""
        view = memoryview(data)
        while view:
            # One record (16 KiB) at a time; a memory BIO takes everything.
            view = view[self._tls.write(view) :]
        await self._flush()

    async def write_eof(self) -> None:
        """Sends close_notify; reading goes on (RFC 8446 section 6.1)."""
        if self.is_write_closed:
            return
        self.is_write_closed = True
        # OpenSSL looks for the peer's close_notify in the same call and fails when it finds data.
        while data := self._take():
            self._drained += data
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        await self._flush()

    async def _receive(self) -> None:
        chunk = await self._below.read()
        if not chunk:
            raise TruncatedStreamError("the connection ended without close_notify")
        self._incoming.write(chunk)

    def _take(self) -> bytes | None:
        """Plaintext at hand, empty at the end, None when more has to be received."""
        if self._is_read_closed:
            return b""
        try:
            data = self._tls.read(READ_BYTES)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLZeroReturnError:
            data = b""
        self._is_read_closed = not data
        return data

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self._below.write(self._outgoing.read())

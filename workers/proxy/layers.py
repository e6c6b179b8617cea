"""What is put around the bytes between us and the far end. No sockets here.

    Layer      what the bytes on the wire are
    Plain      the program's own (here)
    TLS        records with the program's bytes (`workers.proxy.tls`)
    Tunnel     TLS with a WebSocket or nothing in it, in that another layer
               (`workers.proxy.tunnel`)
    SshStream  a gRPC call to the proxy, in any of these (`workers.proxy.ssh_stream`)

An upstream and a relay know nothing but this interface.
"""

from typing import Protocol


class LayerError(Exception):
    """Base: the connection is broken above TCP. The text is safe to log and show."""


class Layer(Protocol):
    """The client's side of one connection. All methods raise LayerError; it is then of no use."""

    @property
    def alpn(self) -> str | None:
        """The application protocol the far end chose, once the handshake is done."""

    @property
    def is_receive_ended(self) -> bool:
        """Whether the far end's direction is over, without the end of TCP."""

    @property
    def ends_with_fin(self) -> bool:
        """Whether only the end of TCP can end our direction; `close_notify` is empty then."""

    @property
    def pending_bytes(self) -> int:
        """Content that was given to `encrypt` and may not be sent before the far end allows it.

        It comes with `take_records` when it may. Who gives the layer content stops when this and
        what waits at the endpoint are too much, and goes on when both are 0. The end of our
        direction waits behind it. 0 for layers whose far end has no say.
        """

    def handshake(self, records: bytes | memoryview) -> bool:
        """Takes what came from the far end (nothing at first); True when it is done.

        After each call, also one that raised, `take_records` has what to send. When done, call
        `decrypt` with nothing at once: the first data may have come with the last of these.
        """

    def decrypt(self, records: bytes | memoryview) -> memoryview:
        """All content in the next bytes from the far end.

        The view holds until the next callback of the event loop. `take_records` may have answers.
        """

    def encrypt(self, data: memoryview) -> bytes | memoryview:
        """What carries `data` (not empty). A view holds as long as `data` does.

        Empty when nothing may be sent now, see `pending_bytes`.
        """

    def close_notify(self) -> bytes:
        """What ends our direction; the far end's stays open."""

    def take_records(self) -> bytes:
        """What the layer itself has to send, and content that had to wait. May be empty."""


class Plain:
    """Nothing around the bytes."""

    __slots__ = ()

    alpn: str | None = None
    is_receive_ended = False
    ends_with_fin = True
    pending_bytes = 0

    def handshake(self, records: bytes | memoryview) -> bool:
        """Done before it began."""
        assert not records
        return True

    def decrypt(self, records: bytes | memoryview) -> memoryview:
        return memoryview(records)

    def encrypt(self, data: memoryview) -> memoryview:
        return data

    def close_notify(self) -> bytes:
        return b""

    def take_records(self) -> bytes:
        return b""

"""TLS to somebody in the middle, and inside it, after some HTTP, the layer that leads to the far end.

    to             outer           greeting             framing       inner
    -------------  --------------  -------------------  ------------  -------------------------
    load balancer  TLS, no client  connection upgrade   WebSocket     TLS to the Teleport proxy
    forward proxy  certificate     CONNECT              none          TLS, a tunnel, or nothing

    OUTER --handshake--> GREETING --agreed--> INNER --handshake of the inner layer--> done

All layers share the memory of `workers.proxy.tls`, one after the other: what a layer has put into
it is taken out, or was copied by the next one, before that one goes on. So plaintext of the outer
TLS may be fed to an inner one as a view (which copies its input before it writes output), but only
as one: the first output would overwrite the second view.
"""

from enum import Enum, auto
from typing import Protocol

from workers.proxy.layers import Layer, LayerError
from workers.proxy.tls import PeerUntrustedError, TlsConnection, TlsError


class TunnelClosedError(LayerError):
    """The far end ended the tunnel while the handshake inside was not done."""


class Greeting(Protocol):
    """HTTP that comes before the content."""

    @property
    def request(self) -> bytes:
        """What to send."""

    def feed(self, data: bytes | memoryview) -> bytes | None:
        """The first bytes of content once agreed; None until then. Raises LayerError."""


class Framing(Protocol):
    """What is put around the content inside the outer TLS. See `workers.proxy.websocket`."""

    @property
    def is_ended(self) -> bool: ...

    def feed(self, data: bytes | memoryview) -> list[memoryview]: ...

    def frame(self, data: bytes | memoryview) -> bytes | memoryview: ...

    def close(self) -> bytes: ...

    def take_replies(self) -> bytes: ...


class Unframed:
    """No framing."""

    __slots__ = ()

    is_ended = False

    def feed(self, data: bytes | memoryview) -> list[memoryview]:
        return [memoryview(data)] if data else []

    def frame(self, data: bytes | memoryview) -> bytes | memoryview:
        return data

    def close(self) -> bytes:
        return b""

    def take_replies(self) -> bytes:
        return b""


class _Stage(Enum):
    """Whose handshake is next."""

    OUTER = auto()
    GREETING = auto()
    INNER = auto()


class Tunnel:
    """A layer with another one inside. `name` says in errors who is at the other end of it."""

    __slots__ = (
        "_early",
        "_framing",
        "_greeting",
        "_inner",
        "_is_outer_ended",
        "_is_send_ended",
        "_outer",
        "_records",
        "_stage",
        "is_receive_ended",
        "name",
    )

    ends_with_fin = False
    pending_bytes = 0  # TLS and nothing are all that is put inside

    def __init__(
        self, name: str, outer: TlsConnection, greeting: Greeting, framing: Framing, inner: Layer
    ) -> None:
        self.name = name
        self._outer = outer
        self._greeting = greeting
        self._framing = framing
        self._inner = inner
        self._stage = _Stage.OUTER
        self._records = b""  # of the outer TLS, to be taken
        self._early = b""  # content that came with the end of the inner handshake
        self._is_send_ended = False
        self._is_outer_ended = False  # our direction of the outer TLS
        self.is_receive_ended = False

    @property
    def alpn(self) -> str | None:
        """The application protocol of the inner layer."""
        return self._inner.alpn

    @property
    def is_open(self) -> bool:
        """Whether the one in the middle has agreed and the inner layer talks to the far end."""
        return self._stage is _Stage.INNER

    def handshake(self, records: bytes | memoryview) -> bool:
        """Takes the next bytes of any of the handshakes; True when all are done."""
        if self._stage is _Stage.OUTER:
            if not self._shake_outer(records):
                return False
            self._stage = _Stage.GREETING
            content = self._open(b"")
            self._records += self._seal(self._greeting.request)
        else:
            content = self._open(records)
        if self._stage is _Stage.INNER:
            return self._shake_inner(self._unframe(content))
        first = self._greeting.feed(content)
        if first is None:
            if self._outer.is_receive_ended:
                raise TunnelClosedError(f"{self.name}: connection closed without an answer")
            return False
        self._stage = _Stage.INNER
        return self._begin_inner(self._unframe(first))

    def decrypt(self, records: bytes | memoryview) -> memoryview:
        """All content in the next bytes; see `Layer.decrypt`."""
        content = self._inner.decrypt(self._unframe(self._open(records)))
        self._send_replies_of_inner()
        self._note_ends()
        if self._early:
            content = memoryview(self._early + content)
            self._early = b""
        return content

    def encrypt(self, data: memoryview) -> bytes:
        return self._outer.encrypt(memoryview(self._framing.frame(self._inner.encrypt(data))))

    def close_notify(self) -> bytes:
        """Ends our direction of the inner layer; the tunnel too if both directions are over."""
        self._is_send_ended = True
        ending = b""
        if not self._inner.ends_with_fin:
            ending = self._seal(self._framing.frame(self._inner.close_notify()))
            if not self.is_receive_ended:
                return ending
        return ending + self._end_outer()

    def take_records(self) -> bytes:
        records, self._records = self._records, b""
        return records

    def _shake_outer(self, records: bytes | memoryview) -> bool:
        # No certificate of ours is at stake here, so an alert is no refusal of it.
        try:
            return self._outer.handshake(records)
        except PeerUntrustedError as error:
            raise PeerUntrustedError(f"{self.name}: {error}") from error
        except TlsError as error:
            raise TlsError(f"{self.name}: {error}") from error
        finally:
            self._records += self._outer.take_records()

    def _begin_inner(self, content: bytes | memoryview) -> bool:
        """Starts the inner handshake; a far end that talks first may have sent `content`."""
        kept = bytes(content)
        if self._shake_inner(b"", is_first=True):
            self._early += bytes(self._inner.decrypt(kept))
            self._send_replies_of_inner()
            return True
        return bool(kept) and self._shake_inner(kept)

    def _shake_inner(self, content: bytes | memoryview, *, is_first: bool = False) -> bool:
        is_done = False
        if content or is_first:
            try:
                is_done = self._inner.handshake(content)
            finally:
                self._send_replies_of_inner()
        if is_done:
            # The memory must be empty before anything else uses it.
            self._early += bytes(self._inner.decrypt(b""))
            self._send_replies_of_inner()
        elif self._framing.is_ended or self._outer.is_receive_ended:
            raise TunnelClosedError(f"{self.name}: connection closed during the TLS handshake")
        return is_done

    def _open(self, records: bytes | memoryview) -> memoryview:
        data = self._outer.decrypt(records)
        if replies := self._outer.take_records():
            self._records += replies
        return data

    def _unframe(self, data: bytes | memoryview) -> bytes | memoryview:
        pieces = self._framing.feed(data)
        if replies := self._framing.take_replies():
            self._records += self._seal(replies)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _send_replies_of_inner(self) -> None:
        if replies := self._inner.take_records():
            self._records += self._seal(self._framing.frame(replies))

    def _note_ends(self) -> None:
        self.is_receive_ended = (
            self._inner.is_receive_ended or self._framing.is_ended or self._outer.is_receive_ended
        )
        if self.is_receive_ended and self._is_send_ended:
            self._records += self._end_outer()

    def _seal(self, data: bytes | memoryview) -> bytes:
        return b"" if self._is_outer_ended else self._outer.encrypt(memoryview(data))

    def _end_outer(self) -> bytes:
        if self._is_outer_ended:
            return b""
        close = self._framing.close()
        ending = self._seal(close) if close else b""
        self._is_outer_ended = True
        return ending + self._outer.close_notify()

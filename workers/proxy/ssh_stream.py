"""A byte stream to an SSH host: one ProxySSH call to the Teleport proxy, as a layer.

    carrier (TLS, or a tunnel with TLS in it) --> HTTP/2, one stream --> gRPC --> frames --> SSH bytes

    CARRIER --its handshake--> OPENING --first response--> open: the host is reached
                                  |
                                  +-- a status instead: NodeRefusedError

The first message names the host, the first response says that the proxy has connected to it. Then
either direction is a byte stream in frames of any size. A proxy that records sessions itself also
sends frames for an SSH agent (`workers.proxy.ssh.agent`).

Source: Teleport, `api/proto/teleport/transport/v1/transport_service.proto`,
`api/client/proxy/transport/transportv1/client.go`.
"""

import threading
from collections.abc import Callable
from enum import Enum, auto
from functools import cache
from typing import Final

from workers.proxy import grpc_frames
from workers.proxy.dial_plan import SshTarget
from workers.proxy.grpc_frames import MessageReader, frame_head, gather, read_frame, status_of
from workers.proxy.http2_stream import Http2Stream
from workers.proxy.layers import Layer, LayerError
from workers.proxy.tls import READ_BYTES

PATH: Final = "/teleport.transport.v1.TransportService/ProxySSH"
_AUTHORITY: Final = "teleport.cluster.local"
_USER_AGENT: Final = "grpc-vnet"
# With what stands before it, one message fills one frame of content.
MAX_PAYLOAD_BYTES: Final = 64 * 1024
# Frames of the agent that come before there is one.
MAX_EARLY_AGENT_BYTES: Final = 64 * 1024
_MAX_TEXT: Final = 300

# https://grpc.github.io/grpc/core/md_doc_statuscodes.html
OK: Final = 0
NAMES: Final = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)


class StreamMemory(threading.local):
    """What all streams of one thread use in turn. Views hold until the next callback."""

    def __init__(self) -> None:
        # A read, with what is put around it.
        size = READ_BYTES + READ_BYTES // 8
        self.messages = memoryview(bytearray(size))  # in
        self.payload = memoryview(bytearray(size))
        self.content = memoryview(bytearray(size))  # out
        self.frames = memoryview(bytearray(size))


class SshStreamError(LayerError):
    """The proxy ended the call, or does not keep to its protocol."""


class SshStreamLostError(SshStreamError):
    """The connection ended before the proxy answered."""


class NodeRefusedError(SshStreamError):
    """The proxy did not connect to the host. `status` is gRPC's."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class _Stage(Enum):
    """What is next."""

    CARRIER = auto()
    OPENING = auto()
    OPEN = auto()


class SshStream:
    """A `workers.proxy.layers.Layer` around another one, which carries it.

    After `decrypt` and `set_agent`, `take_records` has what to send.
    """

    __slots__ = (
        "_agent",
        "_carrier",
        "_early",
        "_early_agent",
        "_http2",
        "_is_grpc",
        "_largest",
        "_memory",
        "_messages",
        "_records",
        "_stage",
        "_target",
        "end_reason",
    )

    ends_with_fin = False

    def __init__(self, carrier: Layer, target: SshTarget) -> None:
        self._carrier = carrier
        self._target = target
        self._memory = _shared_memory()
        self._stage = _Stage.CARRIER
        self._http2 = Http2Stream()
        self._messages = MessageReader(self._memory.messages)
        self._is_grpc = False  # what the headers of the answer say
        self._records = b""  # of the carrier, to be taken
        self._early = b""  # SSH bytes that came with the first response
        self._agent: Callable[[bytes], bytes] | None = None
        self._early_agent = b""
        # The largest payload, and what stands before one.
        self._largest: tuple[int, bytes] = (0, b"")
        self.end_reason = ""  # why the call ended, safe text; empty when in order

    @property
    def alpn(self) -> str | None:
        """The application protocol of the carrier."""
        return self._carrier.alpn

    @property
    def is_carried(self) -> bool:
        """Whether the carrier's handshake is over, so that the proxy itself answers."""
        return self._stage is not _Stage.CARRIER

    @property
    def is_receive_ended(self) -> bool:
        """Whether the call is over, which ends our direction as well."""
        return self._http2.is_ended or self._carrier.is_receive_ended

    @property
    def pending_bytes(self) -> int:
        """See `Layer.pending_bytes`; what is put around the content counts."""
        return self._http2.pending_bytes

    # -- layer --

    def handshake(self, records: bytes | memoryview) -> bool:
        """Takes the next bytes; True when the proxy has reached the host.

        Raises:
            NodeRefusedError: it has not.
            LayerError: the carrier's, HTTP/2's or gRPC's error.
        """
        if self._stage is _Stage.CARRIER:
            try:
                is_done = self._carrier.handshake(records)
            finally:
                self._records += self._carrier.take_records()
            if not is_done:
                return False
            self._stage = _Stage.OPENING
            # A server may be so quick that its first frames came with the last records.
            content = self._content(b"")
            self._open()
        else:
            content = self._content(records)
        return self._receive_first(content)

    def decrypt(self, records: bytes | memoryview) -> memoryview:
        """All SSH bytes in the next bytes; see `Layer.decrypt`."""
        payloads = self._payloads(self._content(records))
        self._seal()
        if self._early:
            payloads.insert(0, memoryview(self._early))
            self._early = b""
        return payloads[0] if len(payloads) == 1 else gather(payloads, self._memory.payload)

    def encrypt(self, data: memoryview) -> bytes | memoryview:
        """See `Layer.encrypt`. Dropped once the call is over."""
        self._http2.send(self._framed(data))
        parts = self._http2.take()
        sealed = self._carrier.encrypt(gather(parts, self._memory.frames)) if parts else b""
        # Nothing, unless somebody has not taken it.
        return self.take_records() + sealed if self._records else sealed

    def close_notify(self) -> bytes:
        """Ends our direction, behind what is pending; the carrier too when the call is over."""
        self._http2.end()
        self._seal()
        ending = self.take_records()
        return ending + self._carrier.close_notify() if self.is_receive_ended else ending

    def take_records(self) -> bytes:
        """What is to be sent now. May be empty."""
        records, self._records = self._records, b""
        return records

    # -- beyond the layer --

    def set_agent(self, agent: Callable[[bytes], bytes]) -> None:
        """Answers the requests of a proxy that records, those that came before included.

        `agent` takes pieces of the request stream and returns pieces of the answer stream; what it
        raises is raised by `decrypt`.
        """
        self._agent = agent
        early, self._early_agent = self._early_agent, b""
        if early:
            self._ask_agent(early)
            self._seal()

    # -- inside --

    def _open(self) -> None:
        headers = [
            (":method", "POST"),
            (":scheme", "https"),
            (":path", PATH),
            (":authority", _AUTHORITY),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", _USER_AGENT),
        ]
        if self._target.version:
            headers.append(("version", self._target.version))
        self._http2.open(headers)
        first = grpc_frames.dial_message(self._target.host_port, self._target.cluster)
        self._http2.send(memoryview(first))
        self._seal()

    def _content(self, records: bytes | memoryview) -> memoryview:
        content = self._carrier.decrypt(records)
        self._records += self._carrier.take_records()
        return content

    def _receive_first(self, content: memoryview) -> bool:
        try:
            messages = self._read(content)
        finally:
            self._seal()
        if not messages:
            if self.is_receive_ended:
                raise self._refused()
            return False
        self._stage = _Stage.OPEN
        self._early = b"".join(self._sort(messages))
        self._seal()
        return True

    def _read(self, content: memoryview) -> list[memoryview]:
        """The messages in the next bytes; notes why the call has ended."""
        http2 = self._http2
        was_ended = http2.is_ended
        pieces = http2.feed(content)
        if http2.headers is not None and not self._is_grpc:
            self._check(http2.headers)
        messages = self._messages.feed(pieces)
        if not was_ended and self.is_receive_ended:
            self.end_reason = self._reason()
        return messages

    def _check(self, headers: dict[bytes, bytes]) -> None:
        """Whether it is gRPC at all; a load balancer may answer something else."""
        status = headers.get(b":status", b"")
        if status != b"200":
            shown = _safe(status.decode("latin-1")) or "none"
            raise SshStreamError(f"the proxy answered with HTTP status {shown}")
        if not headers.get(b"content-type", b"").startswith(b"application/grpc"):
            raise SshStreamError("the proxy's answer is no gRPC")
        self._is_grpc = True

    def _payloads(self, content: memoryview) -> list[memoryview]:
        return self._sort(self._read(content))

    def _sort(self, messages: list[memoryview]) -> list[memoryview]:
        """The SSH bytes; what is for the agent goes there."""
        payloads = []
        for message in messages:
            kind, payload = read_frame(message)
            if not payload:
                continue
            if kind == grpc_frames.SSH:
                payloads.append(payload)
            else:
                self._ask_agent(bytes(payload))
        return payloads

    def _ask_agent(self, request: bytes) -> None:
        if self._agent is None:
            self._early_agent += request
            if len(self._early_agent) > MAX_EARLY_AGENT_BYTES:
                raise SshStreamError("the proxy wants an SSH agent and has no patience")
            return
        if answer := self._agent(request):
            self._http2.send(memoryview(frame_head(grpc_frames.AGENT, len(answer)) + answer))

    def _framed(self, data: memoryview) -> memoryview:
        size = min(self._http2.max_frame_bytes, MAX_PAYLOAD_BYTES) - grpc_frames.MAX_OVERHEAD_BYTES
        if self._largest[0] != size:
            self._largest = size, frame_head(grpc_frames.SSH, size)
        head = self._largest[1]
        parts: list[bytes | memoryview] = []
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            length = len(piece)
            parts.append(head if length == size else frame_head(grpc_frames.SSH, length))
            parts.append(piece)
        return gather(parts, self._memory.content)

    def _seal(self) -> None:
        if parts := self._http2.take():
            self._records += self._carrier.encrypt(gather(parts, self._memory.frames))

    # -- the end --

    def _refused(self) -> SshStreamError:
        status, text = self._status()
        if status is None or status == OK:
            if self._http2.is_ended and not self._http2.reason:
                return SshStreamError("the proxy ended the call without saying why")
            reason = self._http2.reason or "connection closed before it answered"
            return SshStreamLostError(f"the proxy did not connect to the host: {reason}")
        return NodeRefusedError(text or _name(status), status)

    def _reason(self) -> str:
        status, text = self._status()
        if status == OK:
            is_whole = self._messages.is_between_messages
            return "" if is_whole else "the proxy ended the connection inside a message"
        if status is not None:
            return f"the proxy ended the connection: {text or _name(status)}"
        if self._http2.is_ended:
            return f"the proxy ended the connection: {self._http2.reason or 'no reason given'}"
        return "the proxy closed the connection"

    def _status(self) -> tuple[int | None, str]:
        # An answer without content has its status among the first headers.
        found = self._http2.trailers or self._http2.headers or {}
        status, text = status_of(found.items())
        return status, _safe(text)


@cache
def _shared_memory() -> StreamMemory:
    """Made with the first stream: most processes have none."""
    return StreamMemory()


def _name(status: int) -> str:
    return NAMES[status] if status < len(NAMES) else f"status {status}"


def _safe(text: str) -> str:
    """Foreign text as one printable line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:_MAX_TEXT]).split())

"""gRPC messages of one call, and in them the frames of ProxySSH, encoded and read by hand. Pure.

     0     1        5
    +-----+--------+-----------------------------------------------------+
    | 0   | length | message: 0x12 length { 0x0a length { SSH bytes } }  |
    +-----+--------+-----------------------------------------------------+
     gRPC prefix     field 2 of ProxySSHResponse: `ssh`; its field 1: `payload`

One message is a piece of a byte stream, mostly 16 KiB; the protobuf package would take several times
as long for each as everything else together.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md,
https://protobuf.dev/programming-guides/encoding/, `pb/transport.proto`.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final
from urllib.parse import unquote

from workers.proxy.layers import LayerError

# As much as other gRPC clients take by default.
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
PREFIX_BYTES: Final = 5
# Two tags and lengths, for payloads of up to 2 MiB less a little.
MAX_OVERHEAD_BYTES: Final = PREFIX_BYTES + 8

_PREFIX = struct.Struct(">BI")

# Fields of ProxySSHRequest and ProxySSHResponse.
TARGET: Final = 1
SSH: Final = 2
AGENT: Final = 3
_PAYLOAD_TAG: Final = 0x0A  # of Frame
_HOST_PORT, _CLUSTER = 1, 2  # of TargetHost

_VARINT, _FIXED64, _BYTES, _START_GROUP, _END_GROUP, _FIXED32 = range(6)
_MAX_NESTED_GROUPS: Final = 32
_LONGEST_VARINT: Final = 10


class GrpcError(LayerError):
    """The far end does not keep to gRPC; the connection is of no more use."""


def gather(parts: Sequence[bytes | bytearray | memoryview], room: memoryview) -> memoryview:
    """The parts in a row: in `room`, which must overlap none of them, or elsewhere if it is too small.

    Blocks of hundreds of kilobytes that come and go cost more time than everything else here.
    """
    total = sum(map(len, parts))
    if total > len(room):
        return memoryview(b"".join(parts))
    position = 0
    for part in parts:
        end = position + len(part)
        room[position:end] = part
        position = end
    return room[:position]


class MessageReader:
    """Content of the call in pieces, messages out. `room` is used while messages are read."""

    __slots__ = ("_kept", "_needed", "_room")

    def __init__(self, room: memoryview) -> None:
        self._room = room
        self._kept = bytearray()  # the beginning of a message that is not whole
        self._needed = PREFIX_BYTES  # so much makes it longer or whole

    def feed(self, pieces: list[memoryview]) -> list[memoryview]:
        """All messages that are whole with these pieces, in order; they may be empty.

        They are views of the pieces or of `room`.

        Raises:
            GrpcError: a message is too large, or compressed.
        """
        if self._kept and len(self._kept) + sum(map(len, pieces)) < self._needed:
            for piece in pieces:
                self._kept += piece
            return []
        if len(pieces) == 1 and not self._kept:
            whole = pieces[0]
        else:
            whole = gather([self._kept, *pieces], self._room)
            self._kept = bytearray()
        messages = []
        position, end = 0, len(whole)
        while end - position >= PREFIX_BYTES:
            flag, length = _PREFIX.unpack_from(whole, position)
            if flag or length > MAX_MESSAGE_BYTES:
                what = "a compressed message" if flag else f"a message of {length} bytes"
                raise GrpcError(f"gRPC failed: {what}")
            behind = position + PREFIX_BYTES + length
            if behind > end:
                break
            messages.append(whole[position + PREFIX_BYTES : behind])
            position = behind
        self._keep(whole[position:])
        return messages

    def _keep(self, rest: memoryview) -> None:
        self._needed = PREFIX_BYTES
        if rest:
            self._kept += rest
            if len(rest) >= PREFIX_BYTES:
                self._needed += _PREFIX.unpack_from(rest)[1]

    @property
    def is_between_messages(self) -> bool:
        """Whether the content so far ends with the end of a message."""
        return not self._kept


def read_frame(message: memoryview) -> tuple[int, memoryview]:
    """(SSH or AGENT, payload) of a ProxySSHResponse; (0, nothing) when it has no frame.

    Fields that are not known are passed over.

    Raises:
        GrpcError: this is no protobuf.
    """
    try:
        # The usual form: one field, with one field in it.
        if len(message) > 3 and message[0] == SSH << 3 | _BYTES:
            length, start = _varint(message, 1)
            if length == len(message) - start and length and message[start] == _PAYLOAD_TAG:
                length, start = _varint(message, start + 1)
                if length == len(message) - start:
                    return SSH, message[start:]
        return _read_frame(message)
    except IndexError:
        raise GrpcError("gRPC failed: a message that cannot be read") from None


def _read_frame(message: memoryview) -> tuple[int, memoryview]:
    kind, payload = 0, message[:0]
    for number, wire_type, value in _fields(message):
        if number not in (SSH, AGENT) or wire_type != _BYTES:
            continue
        # One that comes again adds to the first, the other one replaces it.
        if number != kind:
            kind, payload = number, message[:0]
        for inner, inner_type, content in _fields(value):
            if inner == 1 and inner_type == _BYTES:
                payload = content
    return kind, payload


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """(number, wire type, content) of each field; content of numbers is left empty."""
    position, end = 0, len(message)
    groups: list[int] = []
    while position < end:
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        content = message[:0]
        if not 0 < number < 2**29:
            raise GrpcError("gRPC failed: a message that cannot be read")
        if wire_type == _VARINT:
            _, position = _varint(message, position)
        elif wire_type == _FIXED64:
            position += 8
        elif wire_type == _FIXED32:
            position += 4
        elif wire_type == _BYTES:
            length, position = _varint(message, position)
            content = message[position : position + length]
            position += length
        elif wire_type == _START_GROUP and len(groups) < _MAX_NESTED_GROUPS:
            groups.append(number)
            continue
        elif wire_type == _END_GROUP and groups and groups.pop() == number:
            continue
        else:
            raise GrpcError("gRPC failed: a message that cannot be read")
        if position > end:
            raise IndexError
        if not groups:
            yield number, wire_type, content
    if groups:
        raise IndexError


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """(value, position behind it). Raises IndexError when it is cut off or too long."""
    byte = message[position]
    position += 1
    if byte < 0x80:
        return byte, position
    value = byte & 0x7F
    for shift in range(7, 7 * _LONGEST_VARINT, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 2**64 - 1, position
    raise IndexError


def _number(value: int) -> bytes:
    """A varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | _BYTES]) + _number(len(content)) + content


def frame_head(kind: int, length: int) -> bytes:
    """What stands before a payload of `length` bytes (not 0) in a message that carries it."""
    inner = bytes([_PAYLOAD_TAG]) + _number(length)
    outer = bytes([kind << 3 | _BYTES]) + _number(len(inner) + length) + inner
    return _PREFIX.pack(0, len(outer) + length) + outer


def dial_message(host_port: str, cluster: str) -> bytes:
    """The first message of the call: the host that is wanted."""
    fields = ((_HOST_PORT, host_port), (_CLUSTER, cluster))
    target = b"".join(_field(number, text.encode()) for number, text in fields if text)
    message = _field(TARGET, target)
    return _PREFIX.pack(0, len(message)) + message


def status_of(headers: Iterable[tuple[bytes, bytes]]) -> tuple[int | None, str]:
    """(status, message) in trailers; None when there is no status. The message is foreign text."""
    found = dict(headers)
    status = found.get(b"grpc-status", b"")
    # Percent-encoded UTF-8.
    text = unquote(found.get(b"grpc-message", b"").decode("latin-1"), errors="replace")
    is_number = status.isascii() and status.isdigit() and len(status) <= 3
    return (int(status) if is_number else None), text

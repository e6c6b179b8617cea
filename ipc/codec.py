"""Messages to bytes and back. Pure.

A message is one MessagePack map with the tag `t` (the class name) and the fields of
`ipc.messages`. Sizes are capped before a byte is looked at.
"""

import msgspec

from ipc.errors import ForbiddenMessageError, MalformedMessageError
from ipc.messages import AnyMessage, Message
from ipc.permits import Role, is_permitted

# The largest message is ClustersReported; a datagram of this size fits the socket buffers the
# channel asks for.
MAX_MESSAGE_BYTES = 192 * 1024

# Of a reason; the decoder quotes what it read, and its reasons go into the log and `vnet status`.
_MAX_REASON = 200

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """One message as bytes.

    Raises:
        MalformedMessageError: it is larger than MAX_MESSAGE_BYTES.
    """
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise MalformedMessageError(f"{type(message).__name__} has {len(data)} bytes")
    return data


def decode(data: bytes, speaker: Role, listener: Role) -> AnyMessage:
    """The message in `data`, checked against the permit table.

    Raises:
        MalformedMessageError: the bytes are no message.
        ForbiddenMessageError: `speaker` may not say this to `listener`.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise MalformedMessageError(f"{len(data)} bytes are more than a message may have")
    try:
        message: AnyMessage = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(_printable(str(error))) from error
    if not is_permitted(speaker, listener, message):
        raise ForbiddenMessageError(
            f"{speaker} may not send {type(message).__name__} to {listener}"
        )
    return message


def _printable(text: str) -> str:
    """One line without control characters, not too long."""
    line = "".join(c if c.isprintable() else "?" for c in text[: _MAX_REASON + 1])
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 4] + " ..."

"""Messages as JSON objects, one per line, as the sockets for commands have them. Pure."""

from collections.abc import Callable
from typing import Any

import msgspec


def encode(message: msgspec.Struct) -> bytes:
    """One line, with its line feed."""
    return msgspec.json.encode(message) + b"\n"


def decoder_of(kinds: Any) -> Callable[[bytes], Any]:  # a union of types has no type of its own
    """A function from a line to one of these messages; it raises msgspec.MsgspecError for all else."""
    decode = msgspec.json.Decoder(kinds).decode

    def decode_line(line: bytes) -> Any:
        try:
            return decode(line)
        except (UnicodeDecodeError, RecursionError) as error:
            raise msgspec.DecodeError(str(error)) from error

    return decode_line

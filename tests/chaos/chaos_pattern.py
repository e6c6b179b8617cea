"""Bytes that say where they belong: each transfer has its own run of them, checked byte by byte. Pure.

Byte `n` of the pattern with shift `s` is byte `(s + n) % PERIOD` of one random block. The period is
prime, so no power of two that is lost, repeated or swapped looks right.
"""

import random
import struct
from dataclasses import dataclass
from typing import Final, Self

PERIOD: Final = 1_000_003
MAX_PIECE: Final = 1 << 16
_BLOCK: Final = random.Random(4).randbytes(PERIOD)
_LONG: Final = _BLOCK + _BLOCK[:MAX_PIECE]

# What a client says first: what it wants, and the shift of the bytes.
HEADER: Final = struct.Struct(">8sQ")
# What the receiver of a transfer up has got so far, and how many bytes of it were wrong.
PROGRESS: Final = struct.Struct(">QQ")
# The end of every transfer: bytes, wrong ones among them, SHA-256 of all of them.
SUMMARY: Final = struct.Struct(">QQ32s")
SHORT_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Pattern:
    """The bytes of one transfer."""

    shift: int

    def piece(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, at most MAX_PIECE."""
        start = (self.shift + offset) % PERIOD
        return _LONG[start : start + count]

    def wrong_bytes(self, offset: int, data: bytes) -> int:
        """How many bytes are not what stands at `offset` and after it."""
        wrong = 0
        for start in range(0, len(data), MAX_PIECE):
            found = data[start : start + MAX_PIECE]
            expected = self.piece(offset + start, len(found))
            if found != expected:
                wrong += sum(a != b for a, b in zip(found, expected, strict=True))
        return wrong


@dataclass(frozen=True, slots=True)
class Request:
    """What a client wants: `down`, `up` or `short`, and with which bytes."""

    way: str
    pattern: Pattern

    def encode(self) -> bytes:
        return HEADER.pack(self.way.encode(), self.pattern.shift)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        way, shift = HEADER.unpack(data)
        return cls(way.rstrip(b"\0").decode(errors="replace"), Pattern(shift))

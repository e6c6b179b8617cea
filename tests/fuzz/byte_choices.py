"""Turns the bytes of a fuzzer into decisions. Pure: the same bytes always decide the same."""


class Choices:
    """Reads `data` from its beginning; once it has run out every answer is zero or empty."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        """Whether there is anything left."""
        return self._position < len(self._data)

    def byte(self) -> int:
        taken = self.take(1)
        return taken[0] if taken else 0

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1; `limit` is at most 256."""
        return self.byte() % limit

    def pick(self, options):
        """One of at most 256 options."""
        return options[self.below(len(options))]

    def take(self, count: int) -> bytes:
        """At most so many bytes."""
        taken = self._data[self._position : self._position + count]
        self._position += len(taken)
        return taken

    def rest(self) -> bytes:
        return self.take(len(self._data))


def pieces_of(choices: Choices) -> tuple[bytes, list[bytes]]:
    """A stream, and the same cut into pieces.

    The first byte says how many lengths of pieces follow (used in turn, again and again), the
    rest is the stream. A length of 0 stands for all that is left.
    """
    lengths = choices.take(choices.below(8)) or b"\1"
    stream = choices.rest()
    pieces, position, number = [], 0, 0
    while position < len(stream):
        length = lengths[number % len(lengths)] or len(stream)
        pieces.append(stream[position : position + length])
        position += length
        number += 1
    return stream, pieces

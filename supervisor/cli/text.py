"""Text for terminals: how many columns it takes, cut and padded to them, without what moves a cursor. Pure.

A character of East Asian width W or F takes two columns, a combining one none (Unicode Standard Annex 11,
"East Asian Width"; wcwidth(3) of most terminals).
"""

import unicodedata
from collections.abc import Iterator, Mapping

BOLD, RED, GREEN, YELLOW, DIM, PLAIN = (
    "\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m",
)  # fmt: skip
ELLIPSIS = "…"


def wants_colour(environment: Mapping[str, str]) -> bool:
    """Whether a terminal may get colours; see https://no-color.org for NO_COLOR."""
    return not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Without what moves a terminal's cursor, or turns the direction of writing: blanks instead."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def columns(text: str) -> int:
    """How many columns printable text takes."""
    return len(text) if text.isascii() else sum(map(_columns_of, text))


def _columns_of(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def padded(text: str, width: int, *, is_number: bool = False) -> str:
    """Text with blanks to `width` columns, before it if it is a number."""
    blanks = " " * (width - columns(text))
    return blanks + text if is_number else text + blanks


def cut(text: str, width: int) -> str:
    """At most `width` columns of a text, its end left out."""
    if columns(text) <= width:
        return text
    return head(text, width - 1) + ELLIPSIS if width > 0 else ""


def cut_middle(text: str, width: int) -> str:
    """At most `width` columns of a text, its middle left out: names differ at both ends."""
    if columns(text) <= width or width < 3:
        return cut(text, width)
    first = head(text, width // 2)
    last = head(text[::-1], width - 1 - columns(first))[::-1]
    return f"{first}{ELLIPSIS}{last}"


def head(text: str, width: int) -> str:
    """As much of the beginning as takes at most `width` columns."""
    used = 0
    for index, character in enumerate(text):
        used += _columns_of(character)
        if used > width:
            return text[:index]
    return text


def wrapped(text: str, width: int, *, indent: str = "", max_lines: int | None = None) -> list[str]:
    """Words in lines of at most `width` columns, each after `indent`; a longer word is parted.

    Of more than `max_lines` the last ends with " ...". No line for no words.
    """
    room = max(width - len(indent), 1)
    lines = list(_lines(text.split(), room))
    if max_lines is not None and len(lines) > max_lines:
        lines[max_lines - 1 :] = [f"{head(lines[max_lines - 1], max(room - 4, 0)).rstrip()} ..."]
    return [indent + line for line in lines]


def _lines(words: list[str], room: int) -> Iterator[str]:
    line = ""
    for word in words:
        rest = word
        if line and columns(line) + 1 + columns(rest) <= room:
            line = f"{line} {rest}"
            continue
        if line:
            yield line
        while columns(rest) > room:
            # One that is wider than the room alone has to go somewhere.
            part = head(rest, room) or rest[0]
            yield part
            rest = rest[len(part) :]
        line = rest
    if line:
        yield line


def duration(seconds: float) -> str:
    """In the two largest units: 5s, 3m 5s, 2h 3m, 4d 2h."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {rest}s" if minutes else f"{rest}s"

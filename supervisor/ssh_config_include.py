"""Whether an OpenSSH client configuration includes a file. Pure.

Source: ssh_config(5), `misc.c` (argv_split) and `readconf.c` of OpenSSH. Patterns like `*`, tokens
like `%d`, variables and files that are included in turn are not followed: what is included by such
a way only counts as not included.
"""

import os.path
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

_BLANK: Final = " \t"
_QUOTES: Final = "\"'"
_KEYWORD_END: Final = " \t="


class Inclusion(StrEnum):
    """How a file is included."""

    NOT = "not"
    # Below a Host or Match line: it counts for those hosts only.
    FOR_SOME_HOSTS = "for some hosts"
    FOR_ALL_HOSTS = "for all hosts"


def find_inclusion(text: str, wanted: Path, home: Path) -> Inclusion:
    """The widest way in which the configuration includes `wanted`.

    `home` is what `~` stands for; both paths are absolute.
    """
    target = _clean(str(wanted))
    found = Inclusion.NOT
    is_for_all = True
    for line in text.split("\n"):
        keyword, rest = _split_keyword(line)
        if keyword == "host":
            is_for_all = (_arguments(rest) or []) == ["*"]
        elif keyword == "match":
            is_for_all = [word.lower() for word in _arguments(rest) or []] == ["all"]
        elif keyword == "include" and target in _included_paths(rest, home):
            if is_for_all:
                return Inclusion.FOR_ALL_HOSTS
            found = Inclusion.FOR_SOME_HOSTS
    return found


def _split_keyword(line: str) -> tuple[str, str]:
    """The keyword in lower case, and what follows; between them are blanks or one `=`."""
    line = line.strip(" \t\r\f")
    end = next((i for i, letter in enumerate(line) if letter in _KEYWORD_END), len(line))
    rest = line[end:].lstrip(_BLANK)
    return line[:end].lower(), rest.removeprefix("=").lstrip(_BLANK)


def _included_paths(text: str, home: Path) -> Iterator[str]:
    for argument in _arguments(text) or []:
        is_in_home = argument == "~" or argument.startswith("~/")
        yield _clean(f"{home}{argument[1:]}" if is_in_home else argument)


def _arguments(text: str) -> list[str] | None:
    """The words of a line; None if a quote is not closed."""
    words: list[str] = []
    at = 0
    while at < len(text):
        if text[at] in _BLANK:
            at += 1
        elif text[at] == "#":
            break
        else:
            word, at = _word(text, at)
            if word is None:
                return None
            words.append(word)
    return words


def _word(text: str, at: int) -> tuple[str | None, int]:
    """The word that begins at `at`, None if a quote is not closed; and where it ends."""
    letters: list[str] = []
    quote = ""
    while at < len(text):
        letter, following = text[at], text[at + 1 : at + 2]
        if letter == "\\" and following and following in (_QUOTES + "\\" + ("" if quote else " ")):
            letters.append(following)
            at += 1
        elif quote:
            if letter == quote:
                quote = ""
            else:
                letters.append(letter)
        elif letter in _BLANK:
            break
        elif letter in _QUOTES:
            quote = letter
        else:
            letters.append(letter)
        at += 1
    return (None if quote else "".join(letters)), at


def _clean(path: str) -> str:
    # normpath leaves two slashes at the start, which POSIX lets a system read in its own way.
    return os.path.normpath(path).replace("//", "/", 1) if path else ""

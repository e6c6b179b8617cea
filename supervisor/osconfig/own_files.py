"""Files that `vnet service install` writes and `uninstall` knows again. Pure.

The first comment has a SHA-256 of everything else, so that a file somebody has changed is told from one
that is as it was written, by whatever version.
"""

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

_WHO: Final = 'written by "vnet service install", removed by "vnet service uninstall"; SHA-256'
_MARK: Final = re.compile(rf"(?m)^(?:# |// |<!-- ){re.escape(_WHO)} ([0-9a-f]{{64}})(?: -->)?\n")


class Comment(StrEnum):
    """How a kind of file writes a comment; `{}` is its text."""

    HASH = "# {}"
    SLASHES = "// {}"
    XML = "<!-- {} -->"


class Origin(StrEnum):
    """Whose a file is that lies where one of ours belongs."""

    OURS = "ours"
    CHANGED = "changed"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class OwnFile:
    """A file to install. `text` has no mark yet."""

    path: Path
    text: str
    comment: Comment

    @property
    def marked(self) -> str:
        """The text as it is written; in XML the comment stands last, since a declaration is first."""
        line = self.comment.format(f"{_WHO} {_digest(self.text)}") + "\n"
        return self.text + line if self.comment is Comment.XML else line + self.text


def origin(text: str) -> Origin:
    """Whose a file with this text is."""
    marks = _MARK.findall(text)
    if len(marks) != 1:
        return Origin.CHANGED if marks else Origin.FOREIGN
    return Origin.OURS if _digest(_MARK.sub("", text)) == marks[0] else Origin.CHANGED


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

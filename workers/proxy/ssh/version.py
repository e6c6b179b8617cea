"""The lines before the first packet: versions, and what a server may say before them. Pure.

RFC 4253 section 4.2.
"""

from workers.proxy.ssh.codec import CodecError

VERSION = "SSH-2.0-VNet"
# Of one line; RFC 4253 has 255 for the version.
MAX_LINE_BYTES = 1024
MAX_VERSION_BYTES = 255
# Of all lines before a server's version.
MAX_BANNER_BYTES = 32 * 1024


class VersionReader:
    """Finds the peer's version in the first bytes of its direction."""

    __slots__ = ("_is_server", "_kept", "_skipped_bytes")

    def __init__(self, *, is_server: bool) -> None:
        """Only a server (`is_server`: the peer is one) may send other lines first."""
        self._is_server = is_server
        self._kept = b""
        self._skipped_bytes = 0

    def feed(self, data: bytes) -> tuple[str, bytes] | None:
        """The version and what follows its line, or None: more is needed.

        Raises:
            CodecError: the peer does not speak SSH 2.
        """
        self._kept += data
        while (end := self._kept.find(b"\n")) >= 0:
            line, rest = self._kept[:end].removesuffix(b"\r"), self._kept[end + 1 :]
            if line.startswith(b"SSH-"):
                return _checked(line), rest
            self._kept = rest
            self._skip(end + 1)
        if len(self._kept) > MAX_LINE_BYTES:
            raise CodecError("the peer does not speak SSH: it sent a line without an end")
        if not self._is_server and not b"SSH-".startswith(self._kept[:4]):
            self._skip(0)
        return None

    def _skip(self, line_bytes: int) -> None:
        self._skipped_bytes += line_bytes
        if not self._is_server:
            raise CodecError("the peer does not speak SSH: it sent something else first")
        if line_bytes > MAX_LINE_BYTES or self._skipped_bytes > MAX_BANNER_BYTES:
            raise CodecError("the peer does not speak SSH: it sent too much before its version")


def _checked(line: bytes) -> str:
    if len(line) > MAX_VERSION_BYTES:
        raise CodecError("the peer's SSH version is too long")
    # 1.99 stands for 2.0 as well (RFC 4253 section 5.1).
    if not line.startswith((b"SSH-2.0-", b"SSH-1.99-")):
        raise CodecError("the peer speaks a version of SSH that is not 2.0")
    try:
        version = line.decode("ascii")
    except UnicodeDecodeError:
        raise CodecError("the peer's SSH version is not ASCII") from None
    if not version.isprintable():
        raise CodecError("the peer's SSH version has control characters")
    return version

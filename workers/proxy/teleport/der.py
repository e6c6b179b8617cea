"""A bounds-checked reader of DER (ITU-T X.690), for as much of it as certificates need. Pure."""

from dataclasses import dataclass

SEQUENCE = 0x30
SET = 0x31
OBJECT_IDENTIFIER = 0x06
UTC_TIME = 0x17
GENERALIZED_TIME = 0x18


class DerError(ValueError):
    """The bytes are not the DER that was expected."""


@dataclass(frozen=True, slots=True)
class Element:
    """One element: its tag, its contents, and all its bytes."""

    tag: int
    contents: bytes
    encoded: bytes


def read_element(data: bytes, start: int = 0) -> tuple[Element, int]:
    """The element at `start` and the offset behind it.

    Raises:
        DerError: truncated, a multi-byte tag, or a length that is not definite.
    """
    if start + 2 > len(data):
        raise DerError("an element ends early")
    tag, first = data[start], data[start + 1]
    if tag & 0x1F == 0x1F:
        raise DerError("a multi-byte tag")
    position, length = start + 2, first
    if first & 0x80:
        size = first & 0x7F
        if not 1 <= size <= 4 or position + size > len(data):
            raise DerError("an impossible length")
        length = int.from_bytes(data[position : position + size], "big")
        position += size
    end = position + length
    if end > len(data):
        raise DerError("an element ends early")
    return Element(tag, data[position:end], data[start:end]), end


def children(element: Element, limit: int) -> list[Element]:
    """The elements inside a constructed one.

    Raises:
        DerError: malformed, or more than `limit` of them.
    """
    found: list[Element] = []
    position = 0
    while position < len(element.contents):
        if len(found) == limit:
            raise DerError(f"more than {limit} elements")
        child, position = read_element(element.contents, position)
        found.append(child)
    return found


def expect(element: Element, tag: int) -> Element:
    """The element itself, if it has this tag.

    Raises:
        DerError: it has another one.
    """
    if element.tag != tag:
        raise DerError(f"tag {element.tag:#x} where {tag:#x} was expected")
    return element


def object_identifier(contents: bytes) -> str:
    """Dotted text of an object identifier's contents.

    Raises:
        DerError: empty, truncated, or an arc of more than 9 bytes.
    """
    arcs: list[int] = []
    value = size = 0
    for byte in contents:
        value = value << 7 | byte & 0x7F
        size += 1
        if size > 9:
            raise DerError("an arc too large")
        if not byte & 0x80:
            arcs.append(value)
            value = size = 0
    if not arcs or size:
        raise DerError("an object identifier ends early")
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, [first, arcs[0] - 40 * first, *arcs[1:]]))


def text(element: Element) -> str:
    """A string of any of the ASN.1 string types; bytes that do not fit are replaced."""
    match element.tag:
        case 0x1E:  # BMPString
            return element.contents.decode("utf-16-be", "replace")
        case 0x1C:  # UniversalString
            return element.contents.decode("utf-32-be", "replace")
        case _:
            return element.contents.decode("utf-8", "replace")

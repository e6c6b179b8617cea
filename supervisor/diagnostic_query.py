"""The question that only dns itself answers, and its answer, byte for byte. Pure.

The form is that of RFC 1035 section 4. The name and its meaning are those of VNet's own diagnosis in
Teleport (lib/vnet/dns/diag_probe.go): `vnet-diag-` and 16 hexadecimal digits, in any zone. The answer
is known beforehand, so that the supervisor compares and never parses what comes from a network.
"""

import struct
from typing import Final

RANDOM_BYTES: Final = 10

_HEADER: Final = struct.Struct(">6H")
_PAIR: Final = struct.Struct(">HH")
_RECORD: Final = struct.Struct(">HHHIH")  # pointer to the name, type, class, TTL, length
_A_IN: Final = (1, 1)  # type and class
_ANSWER: Final = 0x8480  # QR, AA, RA; RD is copied, and not set in the question
_NAME: Final = 0xC000 | _HEADER.size


def question(random_bytes: bytes) -> bytes:
    """Asks for the A record of a name that nobody has asked for (RANDOM_BYTES for it and the id)."""
    query_id = int.from_bytes(random_bytes[:2])
    labels = (b"vnet-diag-" + random_bytes[2:].hex().encode(), b"test")
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    return _HEADER.pack(query_id, 0, 1, 0, 0, 0) + name + _PAIR.pack(*_A_IN)


def answer(asked: bytes, dns_ipv4: bytes) -> bytes:
    """What dns says to `asked`: its own address, not to be kept."""
    query_id = int.from_bytes(asked[:2])
    header = _HEADER.pack(query_id, _ANSWER, 1, 1, 0, 0)
    record = _RECORD.pack(_NAME, *_A_IN, 0, len(dns_ipv4)) + dns_ipv4
    return header + asked[_HEADER.size :] + record

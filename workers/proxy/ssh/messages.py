"""SSH messages: numbers, the shape of those that are passed on, the few of our own. Pure.

    1 .. 49     transport, key exchange      end at each leg
    50 .. 79    authentication               end at each leg
    80 .. 100   connection                   passed on as they are, see `workers.proxy.ssh.session`
    others      nobody's                     answered with UNIMPLEMENTED

RFC 4250 section 4.1.
"""

import struct
from typing import Final

DISCONNECT: Final = 1
IGNORE: Final = 2
UNIMPLEMENTED: Final = 3
DEBUG: Final = 4
SERVICE_REQUEST: Final = 5
SERVICE_ACCEPT: Final = 6
EXT_INFO: Final = 7
KEXINIT: Final = 20
NEWKEYS: Final = 21
# Of the key exchange method (RFC 4250 section 4.1.2).
FIRST_KEX_METHOD, LAST_KEX_METHOD = 30, 49
USERAUTH_REQUEST: Final = 50
USERAUTH_FAILURE: Final = 51
USERAUTH_SUCCESS: Final = 52
USERAUTH_BANNER: Final = 53
FIRST_CONNECTION, LAST_CONNECTION = 80, 100
GLOBAL_REQUEST: Final = 80
CHANNEL_DATA: Final = 94

# RFC 4253 section 11.1.
PROTOCOL_ERROR: Final = 2
BY_APPLICATION: Final = 11
NO_MORE_AUTH_METHODS: Final = 14

MAX_BANNER_BYTES = 4096
MAX_NAME_BYTES = 1024  # of a request or channel type; RFC 4250 section 4.6.1 has 64
MAX_DESCRIPTION_BYTES = 1024

_U32 = struct.Struct(">I")
_DATA_HEAD_BYTES = 9  # number, channel, length

# A node announces its host keys under its own name (OpenSSH, PROTOCOL, section 2.5).
_HOST_KEYS = b"hostkeys-00@openssh.com"
_NOBODYS_REQUEST = b"nothing@vnet"

# Fields that have to be there, after the number: u a uint32, b a boolean, n a name, s a string. More
# may follow in all of them.
_SHAPES: Final[dict[int, str]] = {
    80: "nb",  # GLOBAL_REQUEST
    81: "",  # REQUEST_SUCCESS
    82: "",  # REQUEST_FAILURE
    90: "nuuu",  # CHANNEL_OPEN
    91: "uuuu",  # CHANNEL_OPEN_CONFIRMATION
    92: "uus",  # CHANNEL_OPEN_FAILURE
    93: "uu",  # CHANNEL_WINDOW_ADJUST
    94: "us",  # CHANNEL_DATA
    95: "uus",  # CHANNEL_EXTENDED_DATA
    96: "u",  # CHANNEL_EOF
    97: "u",  # CHANNEL_CLOSE
    98: "unb",  # CHANNEL_REQUEST
    99: "u",  # CHANNEL_SUCCESS
    100: "u",  # CHANNEL_FAILURE
}


def is_well_formed(plain: memoryview, payload_bytes: int) -> bool:
    """Whether the connection message at `plain[1]` has the fields of its number (RFC 4254).

    What they say is for the ends to judge. Numbers that RFC 4254 leaves free have no fields.
    """
    if plain[1] == CHANNEL_DATA:  # nearly all of them
        return payload_bytes >= _DATA_HEAD_BYTES and (
            _U32.unpack_from(plain, 6)[0] == payload_bytes - _DATA_HEAD_BYTES
        )
    position, end = 2, 1 + payload_bytes
    for field in _SHAPES.get(plain[1], ""):
        if field == "b":
            position += 1
        else:
            position += 4
            if field != "u":
                if position > end:
                    return False
                (length,) = _U32.unpack_from(plain, position - 4)
                if field == "n" and length > MAX_NAME_BYTES:
                    return False
                position += length
        if position > end:
            return False
    return True


def host_keys_substitute(payload: memoryview) -> bytes | None:
    """What goes to the program instead of a node's host keys; None: pass the message on.

    The program would learn them under the name VNet has for the node. The announcement wants no
    reply and is dropped (an empty substitute); one that wants a reply becomes a request that no
    program knows, so that the replies stay in their order (RFC 4254 section 4).
    """
    if payload[0] != GLOBAL_REQUEST:
        return None
    (length,) = _U32.unpack_from(payload, 1)
    name = bytes(payload[5 : 5 + length])
    if name != _HOST_KEYS:
        return None
    wants_reply = payload[5 + length] != 0
    return bytes([GLOBAL_REQUEST]) + string(_NOBODYS_REQUEST) + b"\1" if wants_reply else b""


def string(data: bytes) -> bytes:
    """RFC 4251 section 5."""
    return _U32.pack(len(data)) + data


def take_string(data: bytes, position: int) -> tuple[bytes, int]:
    """The string at `position`, and where the next field begins.

    Raises:
        ValueError: there is none.
    """
    end = position + 4
    if end > len(data):
        raise ValueError("a message ends inside a field")
    (length,) = _U32.unpack_from(data, position)
    if end + length > len(data):
        raise ValueError("a message ends inside a field")
    return data[end : end + length], end + length


def disconnect(reason: int, description: str) -> bytes:
    """SSH_MSG_DISCONNECT (RFC 4253 section 11.1)."""
    return bytes([DISCONNECT]) + _U32.pack(reason) + string(description.encode()) + string(b"")


def disconnect_description(payload: bytes) -> str:
    """What the peer says about why it goes, as far as it can be read."""
    try:
        description, _ = take_string(payload, 5)
    except ValueError:
        return ""
    return description[:MAX_DESCRIPTION_BYTES].decode(errors="replace")


def unimplemented(sequence: int) -> bytes:
    """Answer to the packet with that sequence number (RFC 4253 section 11.4)."""
    return bytes([UNIMPLEMENTED]) + _U32.pack(sequence)


def banner(text: str) -> bytes:
    """SSH_MSG_USERAUTH_BANNER (RFC 4252 section 5.4) with one line."""
    return banner_of(text.encode()[: MAX_BANNER_BYTES - 1] + b"\n")


def banner_of(text: bytes) -> bytes:
    """The same with any text, as far as a banner goes."""
    return bytes([USERAUTH_BANNER]) + string(text[:MAX_BANNER_BYTES]) + string(b"")

"""MySQL's connection phase, both ends of it (lib/srv/db/mysql/proxy.go).

    client <--greeting-- proxy          proxy --log in as that user--> database
    client --response--> proxy          proxy <--OK or error-- database
    client <--OK or error-- proxy

| length, 3, little-endian | sequence, 1 | payload |     MySQL internals, "Protocol::HandshakeV10"

The greeting is the proxy's own. The password is not looked at: the certificate has said who it is.
"""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from demo.cluster.errors import DatabaseError, EmbeddedClusterError
from demo.cluster.streams import BufferedReads, Streams, TcpStream, closing_on_error

SERVER_VERSION = "8.0.0-Teleport"
NATIVE_PASSWORD = b"mysql_native_password"

_MAX_PACKET_BYTES = 64 * 1024
_OK = b"\x00"
_AUTH_SWITCH = b"\xfe"
_ERROR = b"\xff"
_UTF8 = 33
_AUTOCOMMIT = 2

# Capability flags.
LONG_PASSWORD = 1 << 0
FOUND_ROWS = 1 << 1
LONG_FLAG = 1 << 2
CONNECT_WITH_DB = 1 << 3
LOCAL_FILES = 1 << 7
IGNORE_SPACE = 1 << 8
PROTOCOL_41 = 1 << 9
INTERACTIVE = 1 << 10
TRANSACTIONS = 1 << 13
SECURE_CONNECTION = 1 << 15
MULTI_STATEMENTS = 1 << 16
MULTI_RESULTS = 1 << 17
PS_MULTI_RESULTS = 1 << 18
PLUGIN_AUTH = 1 << 19
CONNECT_ATTRS = 1 << 20
LENENC_AUTH = 1 << 21

# What changes the form of packets is only on if the greeting offers it; with CLIENT_SSL absent a
# client cannot ask for TLS in here.
_OFFERED = (
    LONG_PASSWORD
    | LONG_FLAG
    | CONNECT_WITH_DB
    | PROTOCOL_41
    | TRANSACTIONS
    | SECURE_CONNECTION
    | PLUGIN_AUTH
    | CONNECT_ATTRS
    | LENENC_AUTH
)
# What clients may set without an offer.
_WISHES = (
    FOUND_ROWS
    | LOCAL_FILES
    | IGNORE_SPACE
    | INTERACTIVE
    | MULTI_STATEMENTS
    | MULTI_RESULTS
    | PS_MULTI_RESULTS
)


@dataclass(frozen=True, slots=True)
class Login:
    """What a client asks for in its handshake response."""

    capabilities: int
    max_packet: bytes
    charset: int
    user: bytes
    database: bytes
    plugin: bytes


async def begin(client: BufferedReads, dial: Callable[[], Awaitable[Streams]]) -> Streams:
    """Greets, takes the response and logs in to the database.

    Raises:
        DatabaseError: one of the two does not speak MySQL, or the database refuses.
        EmbeddedClusterError, OSError: from `dial`. The client is told in all cases.
    """
    await client.write(_packet(0, encode_greeting()))
    sequence, response = await _read_packet(client)
    try:
        login = parse_response(response)
        if login.plugin not in {b"", NATIVE_PASSWORD}:
            switch = _AUTH_SWITCH + NATIVE_PASSWORD + b"\0" + _salt() + b"\0"
            await client.write(_packet(sequence + 1, switch))
            sequence, _password = await _read_packet(client)
        backend = await dial()
    except (EmbeddedClusterError, OSError) as error:
        await client.write(_packet(sequence + 1, encode_error(str(error))))
        raise
    async with closing_on_error(backend):
        answer = await _log_in(BufferedReads(TcpStream(*backend)), login)
        await client.write(_packet(sequence + 1, answer))
        if answer[:1] == _ERROR:
            raise DatabaseError(answer[9:].decode("utf-8", "replace"))
    return backend


async def _log_in(server: BufferedReads, login: Login) -> bytes:
    """The packet that ends the connection phase: OK or an error."""
    try:
        return await _authenticate(server, login)
    except (EmbeddedClusterError, OSError) as error:
        return encode_error(str(error))


async def _authenticate(server: BufferedReads, login: Login) -> bytes:
    sequence, greeting = await _read_packet(server)
    if greeting[:1] == _ERROR:
        return greeting
    capabilities = login.capabilities & (_OFFERED | _WISHES) & _greeting_capabilities(greeting)
    capabilities &= ~(CONNECT_ATTRS | LENENC_AUTH)
    response = capabilities.to_bytes(4, "little") + login.max_packet
    response += bytes([login.charset]) + bytes(23) + login.user + b"\0" + b"\0"
    if capabilities & CONNECT_WITH_DB:
        response += login.database + b"\0"
    if capabilities & PLUGIN_AUTH:
        response += NATIVE_PASSWORD + b"\0"
    await server.write(_packet(sequence + 1, response))
    sequence, answer = await _read_packet(server)
    if answer[:1] == _AUTH_SWITCH:
        # How each plugin says that there is no password.
        empty = b"\0" if answer.startswith(_AUTH_SWITCH + b"caching_sha2") else b""
        await server.write(_packet(sequence + 1, empty))
        sequence, answer = await _read_packet(server)
    if answer[:1] not in {_OK, _ERROR}:
        user = login.user.decode("utf-8", "replace")
        raise DatabaseError(f"the database wants a password of {user!r}: give it none")
    return answer


async def _read_packet(stream: BufferedReads) -> tuple[int, bytes]:
    """Sequence number and payload."""
    head = await stream.read_exactly(4)
    length = int.from_bytes(head[:3], "little")
    if length > _MAX_PACKET_BYTES:
        raise DatabaseError(f"a MySQL packet of {length} bytes")
    return head[3], await stream.read_exactly(length)


def _packet(sequence: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "little") + bytes([sequence & 0xFF]) + payload


def _salt() -> bytes:
    return bytes(secrets.choice(range(1, 128)) for _ in range(20))


def encode_greeting() -> bytes:
    """The payload of the first packet."""
    salt = _salt()
    return b"".join(
        (
            b"\x0a" + SERVER_VERSION.encode() + b"\0",
            secrets.randbelow(1 << 31).to_bytes(4, "little"),
            salt[:8] + b"\0",
            (_OFFERED & 0xFFFF).to_bytes(2, "little"),
            bytes([_UTF8]),
            _AUTOCOMMIT.to_bytes(2, "little"),
            (_OFFERED >> 16).to_bytes(2, "little"),
            bytes([len(salt) + 1]) + bytes(10),
            salt[8:] + b"\0",
            NATIVE_PASSWORD + b"\0",
        )
    )


def parse_response(payload: bytes) -> Login:
    """A handshake response of protocol 4.1.

    Raises:
        DatabaseError: it is none.
    """
    capabilities = int.from_bytes(payload[:4], "little")
    if len(payload) < 33 or not capabilities & PROTOCOL_41:
        raise DatabaseError("the handshake response is not of protocol 4.1, or asks for TLS")
    user, nul, rest = payload[32:].partition(b"\0")
    if not nul:
        raise DatabaseError("the user name does not end")
    if capabilities & (LENENC_AUTH | SECURE_CONNECTION):
        # A length of more than one byte is that of no password.
        size = rest[0] if rest else 0
        if size > 250 or len(rest) <= size:
            raise DatabaseError("the password does not end")
        rest = rest[1 + size :]
    else:
        rest = rest.partition(b"\0")[2]
    database = b""
    if capabilities & CONNECT_WITH_DB:
        database, _, rest = rest.partition(b"\0")
    plugin = rest.partition(b"\0")[0] if capabilities & PLUGIN_AUTH else b""
    return Login(capabilities, payload[4:8], payload[8], user, database, plugin)


def _greeting_capabilities(greeting: bytes) -> int:
    _, nul, rest = greeting[1:].partition(b"\0")
    if greeting[:1] != b"\x0a" or not nul or len(rest) < 20:
        raise DatabaseError("the database does not greet as MySQL does")
    return int.from_bytes(rest[13:15], "little") | int.from_bytes(rest[18:20], "little") << 16


def encode_error(message: str) -> bytes:
    """An ERR packet: unknown error, general state."""
    return _ERROR + (1105).to_bytes(2, "little") + b"#HY000" + message.encode()

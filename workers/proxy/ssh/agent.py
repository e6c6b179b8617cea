"""An SSH agent with one key, for proxies that record sessions: they make the last hop themselves.

    request  --> 11 list                 answer --> 12 the certificate, or nothing
             --> 13 sign (key, data)            --> 14 signature
             --> anything else, or too many     -->  5 failure

Such a proxy ends the client's SSH, and logs in to the node as the user, with signatures that it asks
for in agent frames (`workers.proxy.ssh_stream`). Signed is only what such a login consists of (RFC
4252 section 7), for the user of these credentials. The key never leaves this process.

Source: draft-ietf-sshm-ssh-agent; Teleport, `lib/vnet/ssh_provider.go`. Pure.
"""

import base64
import struct
from typing import Final

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from workers.proxy.layers import LayerError
from workers.proxy.ssh.messages import USERAUTH_REQUEST, string, take_string
from workers.proxy.ssh.signatures import algorithms_of, sign
from workers.proxy.teleport.ssh_credentials import SshCredentials, SshPrivateKey, public_line

# As OpenSSH's agent takes.
MAX_MESSAGE_BYTES = 256 * 1024
# A proxy logs in once; an answer may be a thousand times as long as its request, or take milliseconds.
MAX_REQUESTS = 500

_FAILURE: Final = 5
_LIST, _IDENTITIES = 11, 12
_SIGN, _SIGNATURE = 13, 14
_RSA_FLAGS: Final = {2: "rsa-sha2-256", 4: "rsa-sha2-512"}
# The second is OpenSSH's, with the host's key behind (PROTOCOL, section 1.11).
_METHODS: Final = (b"publickey", b"publickey-hostbound-v00@openssh.com")


class AgentError(LayerError):
    """The proxy does not keep to the agent protocol; the connection is of no more use."""


class SessionAgent:
    """Requests in, answers out. Without an offer it is an agent that has no key."""

    __slots__ = ("_credentials", "_kept", "_keys", "_requests")

    def __init__(self) -> None:
        self._credentials: SshCredentials | None = None
        self._keys: tuple[bytes, ...] = ()  # what may be asked for: the certificate, the bare key
        self._kept = b""
        self._requests = 0

    def offer(self, credentials: SshCredentials) -> None:
        """Lists the certificate from now on, and signs for it."""
        bare = public_line(credentials.private_key)
        self._keys = tuple(base64.b64decode(x.split()[1]) for x in (credentials.certificate, bare))
        self._credentials = credentials

    def __call__(self, data: bytes) -> bytes:
        """The answers to all requests that are complete with these bytes.

        Raises:
            AgentError: a request is larger than MAX_MESSAGE_BYTES.
        """
        data = self._kept + data
        answers = []
        position = 0
        while len(data) - position >= 4:
            length = int.from_bytes(data[position : position + 4])
            if not 0 < length <= MAX_MESSAGE_BYTES:
                raise AgentError(f"the proxy sent an agent request of {length} bytes")
            if len(data) - position - 4 < length:
                break
            position += 4
            answers.append(string(self._answer(data[position : position + length])))
            position += length
        self._kept = data[position:]
        return b"".join(answers)

    def _answer(self, request: bytes) -> bytes:
        self._requests += 1
        if self._requests > MAX_REQUESTS:
            return bytes([_FAILURE])
        if request[0] == _LIST:
            listed = b"".join(string(key) + string(b"teleport") for key in self._keys[:1])
            return struct.pack(">BI", _IDENTITIES, len(self._keys[:1])) + listed
        if request[0] != _SIGN or self._credentials is None:
            return bytes([_FAILURE])
        try:
            key, position = take_string(request, 1)
            data, position = take_string(request, position)
            flags = int.from_bytes(_read(request, position, 4))
            is_login = key in self._keys and _is_login(data, self._credentials.user, self._keys)
        except ValueError:
            return bytes([_FAILURE])
        private = self._credentials.private_key
        algorithm = _algorithm(private, flags)
        if not is_login or algorithm is None:
            return bytes([_FAILURE])
        return bytes([_SIGNATURE]) + string(sign(private, data, algorithm))


def _is_login(data: bytes, user: str, keys: tuple[bytes, ...]) -> bool:
    """Whether this is what a user signs to log in with one of the keys (RFC 4252 section 7)."""
    _session, position = take_string(data, 0)
    kind = _read(data, position, 1)[0]
    name, position = take_string(data, position + 1)
    service, position = take_string(data, position)
    method, position = take_string(data, position)
    has_signature = _read(data, position, 1)[0]
    _algorithm, position = take_string(data, position + 1)
    key, position = take_string(data, position)
    return (
        kind == USERAUTH_REQUEST
        and name == user.encode()
        and service == b"ssh-connection"
        and method in _METHODS
        and bool(has_signature)
        and key in keys
    )


def _algorithm(key: SshPrivateKey, flags: int) -> str | None:
    """What to sign with; None: not with what is asked for."""
    if isinstance(key, RSAPrivateKey):
        return _RSA_FLAGS.get(flags)  # RFC 8332. Without a flag it would be SHA-1.
    return next(iter(algorithms_of(key)), None) if flags == 0 else None


def _read(data: bytes, position: int, count: int) -> bytes:
    found = data[position : position + count]
    if len(found) < count:
        raise ValueError("a request ends inside a field")
    return found

"""Key exchange, authentication and rekeying: paramiko's `Transport`, without its thread.

A Transport reads messages in a thread that blocks. Here nothing blocks: `start` and `receive` do, for
one message, what its `run` does, and what it sends goes to the owner at once. So a connection costs
no thread, all of it happens in the event loop, and new keys take effect between two packets. The
one thing that takes time is arithmetic; the key exchanges that need much of it (the
Diffie-Hellman groups, 10 to 100 ms) are not offered, and the others take less than a millisecond.

What paramiko decides: what the two sides agree on, the keys, strict key exchange, the steps of
authentication. What is decided here: which host key is shown or trusted, whose key may log in and when
it has, and what is an error.
"""

import hmac
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, cast

import paramiko
from paramiko.auth_handler import AuthHandler
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL
from paramiko.kex_curve25519 import KexCurve25519
from paramiko.message import Message

from workers.proxy.layers import LayerError
from workers.proxy.ssh import messages
from workers.proxy.ssh.codec import CtrAndMac, CtrThenMac, Gcm, PacketReader, PacketWriter
from workers.proxy.ssh.host_certificate import HostCertificate, HostCertificateError
from workers.proxy.ssh.signatures import (
    CERTIFICATE_ENDING,
    RSA_ALGORITHMS,
    PrivateKey,
    algorithms_of,
    is_valid,
    sign,
)
from workers.proxy.ssh.version import VERSION
from workers.proxy.teleport.errors import safe_text

log = logging.getLogger(__name__)

# By measured speed: docs/performance.md. Nothing with SHA-1, CBC or 3DES.
FAST_CIPHERS: Final = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
CIPHERS: Final = (*FAST_CIPHERS, "aes128-ctr", "aes192-ctr", "aes256-ctr")
MACS: Final = (
    "hmac-sha2-256-etm@openssh.com",
    "hmac-sha2-512-etm@openssh.com",
    "hmac-sha2-256",
    "hmac-sha2-512",
)
# Every implementation that knows Ed25519, which the local host keys are, knows one of these.
KEY_EXCHANGES: Final = (
    "mlkem768x25519-sha256",
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
)
PUBLIC_KEYS: Final = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    *RSA_ALGORITHMS,
)
ED25519: Final = "ssh-ed25519"
NODE_KEYS: Final = tuple(name + CERTIFICATE_ENDING for name in PUBLIC_KEYS)

_MAX_EXTENSION_MESSAGES = 2  # RFC 8308 section 2.4: after the key exchange and the login
_MAX_EXTENSIONS = 64
_MAX_LOG_CHARACTERS = 400


class TransportError(LayerError):
    """The peer does not keep to the protocol, or cannot be talked to. The text is safe to show."""


class Owner(Protocol):
    """Who carries the messages of a `DrivenTransport`."""

    reader: PacketReader
    writer: PacketWriter

    def send_message(self, payload: bytes) -> None:
        """Sends it now, under the present keys of `writer`."""


class LoginJudge(Protocol):
    """Who decides about logins at the local leg."""

    def is_trusted(self, key_blob: bytes) -> bool:
        """Whether this public key may log in at all."""

    def on_verified(self, user: str) -> None:
        """The program has proved that it holds a trusted key. The answer is still to be sent."""


class DrivenTransport(paramiko.Transport):  # type: ignore[misc] # paramiko has no types
    """One side of one SSH connection; `receive` takes the place of paramiko's thread.

    All methods raise TransportError when the connection is of no more use. `active`, of paramiko,
    is False once it has said goodbye itself; `initial_kex_done` is True after the first key exchange.
    """

    # Paramiko's, as far as they are read or set here.
    _expected_packet: tuple[int, ...]
    active: bool
    initial_kex_done: bool

    _preferred_ciphers: tuple[str, ...] = CIPHERS
    _preferred_macs = MACS
    _preferred_kex = KEY_EXCHANGES
    _preferred_pubkeys = PUBLIC_KEYS
    _preferred_compression = ("none",)
    _kex_info: Mapping[str, type] = {
        **paramiko.Transport._kex_info,  # noqa: SLF001 - nothing public holds it
        "curve25519-sha256": KexCurve25519,  # RFC 8731 name of the same
    }

    def __init__(
        self, owner: Owner, name: str, about: Mapping[str, str], *, is_server: bool
    ) -> None:
        """`name` and `about` (`ipc.connection_id`) are for the log."""
        self._name = name  # both before paramiko's, which logs
        self._about = about
        super().__init__(_NoSocket(), packetizer_class=lambda _: _Packets(owner))
        self.active = True
        self.server_mode = is_server
        self.local_version = VERSION
        self._handler_table = {
            messages.EXT_INFO: self._parse_ext_info,
            messages.NEWKEYS: self._parse_newkeys,
            messages.KEXINIT: self._negotiate_keys,
        }
        self._is_guess_to_skip = False
        self._extensions_left = _MAX_EXTENSION_MESSAGES

    @property
    def is_exchanging(self) -> bool:
        """Whether a key exchange has begun, on either side, and is not over."""
        return self.local_kex_init is not None

    @property
    def is_holding(self) -> bool:
        """Whether we may send nothing but the key exchange (RFC 4253 section 7.1)."""
        return cast("bool", self.in_kex)

    @property
    def is_bound(self) -> bool:
        """Whether the peer may send nothing but the key exchange."""
        return bool(self._expected_packet)

    def begin(self, peer_version: str) -> None:
        """The versions are exchanged: only KEXINIT may come now."""
        self.remote_version = peer_version
        self._expect_packet(messages.KEXINIT)

    def offer_keys(self) -> None:
        """Begins a key exchange, the first or a further one, unless one is under way."""
        if not self.is_exchanging:
            self._guarded(self._send_kex_init)

    def receive(self, payload: bytes, sequence: int) -> None:
        """One message of the transport or authentication layer. DISCONNECT is the owner's."""
        self._guarded(self._receive, payload, sequence)

    def _receive(self, payload: bytes, sequence: int) -> None:
        number = payload[0]
        message = Message(payload[1:])
        message.seqno = sequence
        if number in {messages.IGNORE, messages.DEBUG}:
            self._enforce_strict_kex(number)
            return
        if self._is_guess_to_skip and number >= messages.FIRST_KEX_METHOD:
            self._is_guess_to_skip = False
            return
        if self._expected_packet:
            if number not in self._expected_packet:
                raise TransportError(f"the peer sent message {number} during the key exchange")
            self._expected_packet = ()
            if messages.FIRST_KEX_METHOD <= number <= messages.LAST_KEX_METHOD:
                self.kex_engine.parse_next(number, message)
                return
        elif number == messages.NEWKEYS:
            raise TransportError("the peer changed its keys without a key exchange")
        handler = self._handler_table.get(number)
        if handler is None and self.auth_handler is not None:
            handler = self.auth_handler._handler_table.get(number)  # noqa: SLF001 - as run does
        if handler is not None:
            handler(message)
        elif number != messages.UNIMPLEMENTED:
            self.packetizer.send_message(Message(messages.unimplemented(sequence)))

    def _guarded(self, method: Any, *arguments: object) -> None:
        try:
            method(*arguments)
        except LayerError:
            raise
        except HostCertificateError as error:
            raise TransportError(f"{self._peer} cannot be trusted: {error}") from None
        except (paramiko.SSHException, EOFError) as error:
            raise TransportError(f"{self._peer} does not agree: {_one_line(str(error))}") from error
        except Exception as error:  # foreign bytes lead paramiko and cryptography into many kinds
            log.debug("%s: malformed message", self._name, exc_info=True, extra=self._about)
            raise TransportError(f"{self._peer} sent a malformed message") from error

    @property
    def _peer(self) -> str:
        return "the program" if self.server_mode else "the node"

    # What paramiko calls.

    def close(self) -> None:
        """Authentication ended in a disconnect."""
        self.active = False

    def _log(self, level: int, text: object, *arguments: object) -> None:
        del level, arguments  # its own levels are for programs, not for people
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s: %s", self._name, _one_line(str(text)), extra=self._about)

    def _parse_kex_init(self, message: Message) -> None:
        start = message.packet.tell()
        super()._parse_kex_init(message)
        end = message.packet.tell()
        message.packet.seek(start)
        offered = self._really_parse_kex_init(message)
        message.packet.seek(end)
        # RFC 4253 section 7: a peer that guesses sends the next message at once; if it guessed
        # wrong, that message is to be ignored.
        if offered["kex_follows"]:
            guess = offered["kex_algo_list"][0], offered["server_key_algo_list"][0]
            agreed = self.preferred_kex[0], self.preferred_keys[0]
            self._is_guess_to_skip = guess != agreed

    def _parse_ext_info(self, message: Message) -> None:
        # RFC 8308 section 2.3. Paramiko takes any count.
        self._extensions_left -= 1
        count = int(message.get_int())
        if self._extensions_left < 0 or count > _MAX_EXTENSIONS:
            raise TransportError(f"{self._peer} sent too many extensions")
        self.server_extensions = {message.get_string(): message.get_string() for _ in range(count)}

    def _parse_newkeys(self, message: Message) -> None:
        super()._parse_newkeys(message)
        # Extensions are sent after the first exchange alone (RFC 8308 section 2.4); some servers,
        # paramiko's among them, send them after each.
        self.server_sig_algs = False
        self._extensions_left = _MAX_EXTENSION_MESSAGES


class ServerTransport(DrivenTransport):
    """The local leg: a server towards the program, which logs in with the one trusted key."""

    def __init__(
        self,
        owner: Owner,
        judge: LoginJudge,
        name: str,
        about: Mapping[str, str],
        host_keys: "list[ShownKey]",
    ) -> None:
        super().__init__(owner, name, about, is_server=True)
        for key in host_keys:
            self.add_server_key(key)
        self._judge = judge
        self.server_object = _OnlyPublicKeys(judge)
        self.auth_handler: AuthHandler | None = None

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        return tuple(self.server_key_dict)

    def receive(self, payload: bytes, sequence: int) -> None:
        if payload[0] == messages.KEXINIT:
            self._prefer_speed(payload)
        super().receive(payload, sequence)

    def answer_login(self, *, is_granted: bool) -> None:
        """After `LoginJudge.on_verified`."""
        assert isinstance(self.auth_handler, _ServerLogin)
        self._guarded(self.auth_handler.send_result, is_granted)

    def _prefer_speed(self, payload: bytes) -> None:
        """Offers nothing but the fast ciphers to a program that knows one.

        The program's order decides (RFC 4253 section 7.1), and many have a slow one first. Too late
        when our offer is out: the program waited for it.
        """
        if self.is_exchanging:
            return
        self._preferred_ciphers = CIPHERS
        try:
            offered = self._really_parse_kex_init(Message(payload[1:]))
        except Exception:  # noqa: BLE001 - said when it is read to be followed
            return
        for direction in ("client_encrypt_algo_list", "server_encrypt_algo_list"):
            if not set(FAST_CIPHERS) & set(offered[direction]):
                return
        self._preferred_ciphers = FAST_CIPHERS

    def _parse_newkeys(self, message: Message) -> None:
        super()._parse_newkeys(message)
        if not isinstance(self.auth_handler, _ServerLogin):
            self.auth_handler = _ServerLogin(self, self._judge)


class ClientTransport(DrivenTransport):
    """The upstream leg: a client towards the node, which shows a host certificate."""

    def __init__(
        self, owner: Owner, name: str, about: Mapping[str, str], on_banner: "BannerTaker"
    ) -> None:
        super().__init__(owner, name, about, is_server=False)
        self.auth_handler: _ClientLogin = _ClientLogin(self, on_banner)
        self.shown: HostCertificate | None = None  # the last that was shown
        self.trust: TrustCheck | None = None  # asked about each that is shown, once it is set
        self._trusted_blob: bytes | None = None

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        return NODE_KEYS

    @property
    def is_login_over(self) -> bool:
        """Whether the node has answered `log_in`."""
        return self.auth_handler.auth_event.is_set()

    @property
    def is_granted(self) -> bool:
        """What the node has answered."""
        return bool(self.auth_handler.authenticated)

    def log_in(self, user: str, key: PrivateKey, certificate: bytes, trust: "TrustCheck") -> None:
        """Checks who the node is, then asks it to let the user in.

        `certificate` is the blob of the user certificate for `key`.
        """
        self.trust = trust
        self._guarded(self._check_trust)
        self._guarded(
            self.auth_handler.auth_publickey, user, CertifiedKey(key, certificate), _Answered()
        )

    def _parse_kex_init(self, message: Message) -> None:
        try:
            super()._parse_kex_init(message)
        except paramiko.ssh_exception.IncompatiblePeer as error:
            if "host key" in str(error):
                raise HostCertificateError("it shows no host certificate") from None
            raise

    def _verify_key(self, host_key: bytes, signature: bytes) -> None:
        shown = HostCertificate(host_key, self.host_key_type)
        algorithm = self.host_key_type.removesuffix(CERTIFICATE_ENDING)
        if not is_valid(shown.key, self.H, signature, algorithm):
            raise HostCertificateError("it does not hold the key of its host certificate")
        self.shown = shown
        if self.trust is not None:
            self._check_trust()

    def _check_trust(self) -> None:
        assert self.shown is not None
        assert self.trust is not None
        # A long session may see the certificate that it began with expire.
        if self.shown.blob != self._trusted_blob:
            self.trust(self.shown)
            self._trusted_blob = self.shown.blob


class TrustCheck(Protocol):
    """Raises HostCertificateError unless the node may be trusted."""

    def __call__(self, shown: HostCertificate) -> None: ...


class BannerTaker(Protocol):
    """Takes the text of a banner that the node sent."""

    def __call__(self, text: bytes) -> None: ...


class ShownKey:
    """As much of a paramiko.PKey as is asked of a host key: an Ed25519 key, certified or not."""

    def __init__(self, name: str, blob: bytes, key: PrivateKey) -> None:
        self._name = name
        self._blob = blob
        self._key = key

    def get_name(self) -> str:
        return self._name

    def asbytes(self) -> bytes:
        return self._blob

    def sign_ssh_data(self, data: bytes, _algorithm: str | None = None) -> bytes:
        return sign(self._key, data, ED25519)


class CertifiedKey:
    """As much of a paramiko.PKey as is asked of a user's key with a certificate."""

    def __init__(self, key: PrivateKey, certificate: bytes) -> None:
        self.public_blob = self
        self.key_blob = certificate
        self.key_type = messages.take_string(certificate, 0)[0].decode()
        self.key = key

    def sign_ssh_data(self, data: bytes, algorithm: str) -> bytes:
        return sign(self.key, data, algorithm.removesuffix(CERTIFICATE_ENDING))


class _ServerLogin(AuthHandler):  # type: ignore[misc] # paramiko has no types
    """Logins at the local leg."""

    def __init__(self, transport: ServerTransport, judge: LoginJudge) -> None:
        super().__init__(transport)
        self._judge = judge

    @property
    def _handler_table(self) -> dict[int, Callable[[Message], None]]:
        """Without paramiko's answers to questions, which VNet never asks: it takes any number of them."""
        return {
            messages.SERVICE_REQUEST: self._parse_service_request,
            messages.USERAUTH_REQUEST: self._parse_userauth_request,
        }

    def send_result(self, is_granted: bool) -> None:  # noqa: FBT001 - as paramiko calls
        super()._send_auth_result(
            self.auth_username, "publickey", AUTH_SUCCESSFUL if is_granted else AUTH_FAILED
        )

    def _send_auth_result(self, username: str, method: str, result: int) -> None:
        """Paramiko has checked everything, the signature included."""
        if result == AUTH_SUCCESSFUL:
            self._judge.on_verified(username)
        else:
            super()._send_auth_result(username, method, AUTH_FAILED)

    def _generate_key_from_request(self, algorithm: str, blob: bytes) -> object:
        """Reads trusted keys only. Without a key paramiko would disconnect, not refuse."""
        if not self._judge.is_trusted(blob):
            return _StrangeKey()
        key: object = super()._generate_key_from_request(algorithm, blob)
        return key or _StrangeKey()


class _ClientLogin(AuthHandler):  # type: ignore[misc] # paramiko has no types
    """The login at the node."""

    def __init__(self, transport: ClientTransport, on_banner: BannerTaker) -> None:
        super().__init__(transport)
        self._on_banner = on_banner
        self.auth_event = _Answered()

    @property
    def _handler_table(self) -> dict[int, Callable[[Message], None]]:
        """One login, in one way; after it each further request would cost a signature of ours."""
        if self.auth_event.is_set():
            return {}
        return {
            messages.SERVICE_ACCEPT: self._parse_service_accept,
            messages.USERAUTH_SUCCESS: self._parse_userauth_success,
            messages.USERAUTH_FAILURE: self._parse_userauth_failure,
            messages.USERAUTH_BANNER: self._parse_userauth_banner,
        }

    def _finalize_pubkey_algorithm(self, _key_type: str) -> str:
        """RSA keys sign with what the node says it takes (RFC 8332 section 3.3)."""
        own = algorithms_of(self.private_key.key)
        listed = self.transport.server_extensions.get(b"server-sig-algs", b"").decode()
        taken = {name.removesuffix(CERTIFICATE_ENDING) for name in listed.split(",")}
        chosen = next((name for name in own if name in taken), own[0])
        return chosen + CERTIFICATE_ENDING

    def _parse_userauth_success(self, message: Message) -> None:
        self._check_asked()
        super()._parse_userauth_success(message)

    def _parse_userauth_failure(self, message: Message) -> None:
        self._check_asked()
        super()._parse_userauth_failure(message)

    def _check_asked(self) -> None:
        if not self.auth_method:
            raise TransportError("the node answered a login before there was one")

    def _parse_userauth_banner(self, message: Message) -> None:
        if self.auth_method:  # else nobody knows yet who it is that speaks
            self._on_banner(message.get_string())


class _OnlyPublicKeys(paramiko.ServerInterface):  # type: ignore[misc] # paramiko has no types
    """What paramiko asks a server."""

    def __init__(self, judge: LoginJudge) -> None:
        self._judge = judge

    def get_allowed_auths(self, _username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, _username: str, key: object) -> int:
        """Asked for probes as well as for signed requests; `on_verified` comes for the latter."""
        is_known = not isinstance(key, _StrangeKey) and self._judge.is_trusted(_blob_of(key))
        return int(AUTH_SUCCESSFUL if is_known else AUTH_FAILED)


class _StrangeKey:
    """A key that may not log in; nobody looked into it."""


class _Answered:
    """As much of a threading.Event as paramiko sets."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set


class _NoSocket:
    """In the place of a socket; the owner has the real one."""

    def settimeout(self, _: float) -> None: ...

    def close(self) -> None: ...


class _Packets:
    """In the place of paramiko's Packetizer: hands messages and keys to the owner."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._initial_kex_done = False  # paramiko sets it

    def send_message(self, message: Message) -> None:
        self._owner.send_message(message.asbytes())

    def set_outbound_cipher(self, **keys: Any) -> None:
        self._owner.writer.use(_cipher_of(keys, keys["iv_out"]))

    def set_inbound_cipher(self, **keys: Any) -> None:
        self._owner.reader.use(_cipher_of(keys, keys["iv_in"]))

    def reset_seqno_out(self) -> None:
        self._owner.writer.sequence = 0

    def reset_seqno_in(self) -> None:
        self._owner.reader.sequence = 0

    def need_rekey(self) -> bool:
        """The owner counts."""
        return False

    def set_log(self, _: object) -> None: ...

    def close(self) -> None: ...


def _cipher_of(keys: dict[str, Any], iv: bytes | None) -> Gcm | CtrThenMac | CtrAndMac:
    if keys["aead"]:
        assert iv is not None
        return Gcm(keys["block_engine"], iv)
    mac = hmac.new(keys["mac_key"], digestmod=keys["mac_engine"])
    kind = CtrThenMac if keys["etm"] else CtrAndMac
    return kind(keys["block_engine"], mac, keys["mac_size"])


def _blob_of(key: Any) -> bytes:
    return bytes(key.asbytes())


def _one_line(text: str) -> str:
    return safe_text(text, _MAX_LOG_CHARACTERS)

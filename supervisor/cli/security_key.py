"""Has a security key at USB answer a challenge; whatever of several is touched first.

Blocking, so it runs in threads: one looks for keys, each key has one of its own. Source: CTAP 2.1,
WebAuthn sections 5.1.4 and 10.1; the protocol is that of python-fido2.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import urlsplit

from fido2.client import (
    AssertionSelection,
    ClientDataCollector,
    ClientError,
    Fido2Client,
    UserInteraction,
)
from fido2.ctap import CtapDevice, CtapError
from fido2.ctap2.pin import ClientPin
from fido2.hid import CtapHidDevice, list_descriptors, open_connection
from fido2.hid.base import HidDescriptor
from fido2.rpid import verify_rp_id
from fido2.webauthn import (
    AuthenticationResponse,
    CollectedClientData,
    PublicKeyCredentialCreationOptions,
    PublicKeyCredentialDescriptor,
    PublicKeyCredentialRequestOptions,
    PublicKeyCredentialType,
    UserVerificationRequirement,
)

from ipc.prompts import WebauthnAssertion, WebauthnChallenge

# A key that is plugged in is found so soon.
LOOK_SECONDS = 0.5
# A key that was told to stop does so with its next sign of life, ten of which come in a second.
STOP_SECONDS = 1.0
# A key locks itself after eight wrong ones in all; some tries are left for another day.
MAX_PINS = 3
MAX_KEYS = 8

# Names a key for as long as it is plugged in, and opens it (OSError, or another of the library's).
Found: TypeAlias = tuple[str, Callable[[], CtapDevice]]


class SecurityKeyError(Exception):
    """The key does not sign; the text says why, in one sentence."""


@dataclass(frozen=True, slots=True)
class TouchWanted:
    """A key blinks and waits for its owner."""


@dataclass(frozen=True, slots=True)
class PinWanted:
    """A key wants its PIN: `answer` is called with it; empty for none."""

    answer: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Signed:
    """A key has answered the challenge."""

    assertion: WebauthnAssertion


@dataclass(frozen=True, slots=True)
class KeyFailed:
    """A key cannot answer; others may."""

    reason: str


KeyEvent: TypeAlias = TouchWanted | PinWanted | Signed | KeyFailed


def find_keys() -> Iterator[Found]:
    """The security keys at USB that this user may open."""
    for descriptor in list_descriptors():  # type: ignore[no-untyped-call]  # it has no hints

        def open_it(descriptor: HidDescriptor = descriptor) -> CtapDevice:
            connection = open_connection(descriptor)  # type: ignore[no-untyped-call]  # it has none
            return CtapHidDevice(descriptor, connection)

        yield str(descriptor.path), open_it


class SecurityKeys:
    """Offers one challenge to every key there is and to those that are plugged in, until `stop`.

    `tell` is called in threads of this object.
    """

    def __init__(
        self,
        challenge: WebauthnChallenge,
        tell: Callable[[KeyEvent], None],
        find: Callable[[], Iterator[Found]] | None = None,
    ) -> None:
        self._challenge = challenge
        self._tell = tell
        self._find = find or find_keys
        self._is_over = threading.Event()
        self._offered: dict[str, threading.Thread] = {}
        self._looker = threading.Thread(target=self._look, daemon=True)
        self._looker.start()

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> None:
        """Keys stop to blink. Waits for them, but not for ever."""
        self._is_over.set()
        for thread in [self._looker, *self._offered.values()]:
            if thread is not threading.current_thread():
                thread.join(timeout_seconds)

    def _look(self) -> None:
        while not self._is_over.is_set():
            here = dict(self._find())
            for path in self._offered.keys() - here.keys():
                if not self._offered[path].is_alive():
                    del self._offered[path]  # unplugged; it may come back
            for path, open_it in here.items():
                if path not in self._offered and len(self._offered) < MAX_KEYS:
                    thread = threading.Thread(target=self._offer, args=(open_it,), daemon=True)
                    self._offered[path] = thread
                    thread.start()
            self._is_over.wait(LOOK_SECONDS)

    def _offer(self, open_it: Callable[[], CtapDevice]) -> None:
        try:
            device = open_it()
        except Exception as error:  # noqa: BLE001  # outermost frame; the library raises all sorts
            self._say(KeyFailed(f"the security key cannot be opened ({error})"))
            return
        try:
            assertion = sign(device, self._challenge, self._say, self._is_over)
        except SecurityKeyError as error:
            self._say(KeyFailed(str(error)))
        except Exception as error:  # noqa: BLE001  # see above; unplugging is one of them
            self._say(KeyFailed(f"the security key failed ({type(error).__name__}: {error})"))
        else:
            self._say(Signed(assertion))
        finally:
            device.close()

    def _say(self, event: KeyEvent) -> None:
        if self._is_over.is_set():
            return
        if isinstance(event, Signed):
            self._is_over.set()
        self._tell(event)


def sign(
    device: CtapDevice,
    challenge: WebauthnChallenge,
    tell: Callable[[KeyEvent], None],
    is_over: threading.Event,
) -> WebauthnAssertion:
    """The answer of one key; waits until it is touched or `is_over`.

    Raises:
        SecurityKeyError: the key does not know the cluster, was not touched, or failed.
    """
    names = [(challenge.rp_id, False)]
    if challenge.app_id:
        names.append((challenge.app_id, True))
    for name, is_app_id in names:
        client = Fido2Client(device, _Collector(challenge.origin), _User(tell, is_over))
        try:
            selection = _selection(client, _options(challenge, name), tell, is_over)
        except ClientError as error:
            if error.code is ClientError.ERR.DEVICE_INELIGIBLE and (name, is_app_id) != names[-1]:
                continue
            raise SecurityKeyError(_reason(error)) from error
        return _assertion(selection.get_response(0), is_app_id=is_app_id)
    raise AssertionError("there is at least one name")


def _selection(
    client: Fido2Client,
    options: PublicKeyCredentialRequestOptions,
    tell: Callable[[KeyEvent], None],
    is_over: threading.Event,
) -> AssertionSelection:
    """Asks again where another try helps. Raises ClientError."""
    pins = 0
    while True:
        try:
            return client.get_assertion(options, is_over)
        except ClientError as error:
            if _is(error, CtapError.ERR.PIN_INVALID):
                pins += 1
                if pins == MAX_PINS:
                    raise
                tell(KeyFailed("that PIN is wrong"))
            # Keys wait for a touch about 30 s, people have longer.
            elif error.code is not ClientError.ERR.TIMEOUT or is_over.wait(LOOK_SECONDS):
                raise


def _options(challenge: WebauthnChallenge, rp_id: str) -> PublicKeyCredentialRequestOptions:
    # "preferred" would ask for a PIN where Teleport wants none: the key is a second factor.
    is_required = challenge.user_verification == UserVerificationRequirement.REQUIRED.value
    return PublicKeyCredentialRequestOptions(
        challenge=challenge.challenge,
        rp_id=rp_id,
        allow_credentials=[
            PublicKeyCredentialDescriptor(type=PublicKeyCredentialType.PUBLIC_KEY, id=one)
            for one in challenge.credential_ids
        ],
        user_verification=UserVerificationRequirement.REQUIRED
        if is_required
        else UserVerificationRequirement.DISCOURAGED,
    )


def _assertion(response: AuthenticationResponse, *, is_app_id: bool) -> WebauthnAssertion:
    return WebauthnAssertion(
        credential_id=bytes(response.raw_id),
        client_data=bytes(response.response.client_data),
        authenticator_data=bytes(response.response.authenticator_data),
        signature=bytes(response.response.signature),
        user_handle=bytes(response.response.user_handle or b""),
        used_app_id=is_app_id,
    )


def _is(error: ClientError, code: CtapError.ERR) -> bool:
    return isinstance(error.cause, CtapError) and error.cause.code == code


def _reason(error: ClientError) -> str:
    match error.code:
        case ClientError.ERR.DEVICE_INELIGIBLE:
            return "this security key is not registered with the cluster: use another"
        case ClientError.ERR.TIMEOUT:
            return "the security key was not touched in time"
        case ClientError.ERR.CONFIGURATION_UNSUPPORTED:
            return "this security key has no PIN, and the cluster wants one: set a PIN first"
        case _ if _is(error, CtapError.ERR.PIN_BLOCKED):
            return "this security key is locked after too many wrong PINs: use another"
        case _ if _is(error, CtapError.ERR.PIN_AUTH_BLOCKED):
            return "too many wrong PINs: pull the security key out and plug it in again"
        case _ if _is(error, CtapError.ERR.PIN_INVALID):
            return "too many wrong PINs"
        case _:
            return f"the security key refuses ({error.cause or error.code.name})"


class _User(UserInteraction):
    """What a key wants of its owner, as events."""

    def __init__(self, tell: Callable[[KeyEvent], None], is_over: threading.Event) -> None:
        self._tell = tell
        self._is_over = is_over

    def prompt_up(self) -> None:
        self._tell(TouchWanted())

    def request_pin(self, permissions: ClientPin.PERMISSION, rp_id: str | None) -> str | None:
        del permissions, rp_id
        given, answers = threading.Event(), list[str]()

        def answer(pin: str) -> None:
            answers.append(pin)
            given.set()

        self._tell(PinWanted(answer))
        while not given.wait(LOOK_SECONDS):
            if self._is_over.is_set():
                return None
        return answers[0] or None


class _Collector(ClientDataCollector):
    """The client data of WebAuthn for one origin.

    The name signed for must be the origin's host or a domain above it, or a proxy that was taken
    over could have keys sign for other sites.
    """

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def collect_client_data(
        self,
        options: PublicKeyCredentialCreationOptions | PublicKeyCredentialRequestOptions,
    ) -> tuple[CollectedClientData, str]:
        assert isinstance(options, PublicKeyCredentialRequestOptions)
        name = options.rp_id or ""
        host = urlsplit(name).hostname if name.startswith("https://") else name
        if not verify_rp_id(host or "", self._origin):
            raise SecurityKeyError(
                f"the proxy at {self._origin} wants a signature for {name}, which is another site"
            )
        data = CollectedClientData.create(
            type=CollectedClientData.TYPE.GET, challenge=options.challenge, origin=self._origin
        )
        return data, name

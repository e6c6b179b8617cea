"""What can go wrong between VNet and a Teleport cluster, named by whose fault it is.

Each error knows how a refused connection (`refusal`) and the status page (`state`) show it. The
message is one sentence that may be shown to the user: no secret, no control character.
"""

from ipc.messages import ClusterState, Refusal

MAX_TEXT = 400


def safe_text(text: str, limit: int = MAX_TEXT) -> str:
    """Foreign text as one printable line of at most `limit` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


class TeleportError(Exception):
    """Base: what was asked of the cluster was not answered."""

    refusal: Refusal = Refusal.INTERNAL
    # None: the error says nothing about the state of the cluster.
    state: ClusterState | None = None


class NotLoggedInError(TeleportError):
    """The tsh home has no usable credentials for this cluster."""

    refusal = Refusal.NOT_LOGGED_IN
    state = ClusterState.NO_LOGIN


class LoginExpiredError(TeleportError):
    """The user certificate has expired, or the cluster takes it no longer."""

    refusal = Refusal.NOT_LOGGED_IN
    state = ClusterState.LOGIN_EXPIRED


class HardwareKeyError(TeleportError):
    """The private key is in a hardware token, which VNet cannot use."""

    refusal = Refusal.NOT_LOGGED_IN
    state = ClusterState.HARDWARE_KEY


class NoSshLoginError(TeleportError):
    """The tsh home has no key or certificate for SSH that can be used; the rest of it is well."""

    refusal = Refusal.NOT_LOGGED_IN


class UnreachableError(TeleportError):
    """The proxy or the auth service cannot be reached, or answers nonsense. Try again later."""

    refusal = Refusal.CLUSTER_UNREACHABLE
    state = ClusterState.UNREACHABLE


class LimitExceededError(UnreachableError):
    """The answer is larger than a message may be, or the cluster is asked too often."""


class ZonesUnknownError(TeleportError):
    """The cluster cannot be asked, and it is not known whether the name belongs to it at all.

    `refusal` and `state` are those of the error that stands in the way.
    """

    def __init__(self, cause: TeleportError) -> None:
        super().__init__(str(cause))
        self.refusal = cause.refusal
        self.state = cause.state


class RefusedError(TeleportError):
    """The cluster understood the request and refused it."""

    refusal = Refusal.CERTIFICATE_REFUSED
    state = ClusterState.OK


class MfaRequiredError(RefusedError):
    """The resource needs a second factor for each session."""

    refusal = Refusal.MFA_REQUIRED


class AccessDeniedError(RefusedError):
    """The user's roles do not allow it."""


class DeviceTrustError(RefusedError):
    """Only a device that is registered with the cluster may do it."""


class KeyPolicyError(RefusedError):
    """The cluster wants the private key in a hardware token, which VNet cannot use."""

    state = ClusterState.HARDWARE_KEY


class MfaUnansweredError(MfaRequiredError):
    """Nobody gave the second factor: no answer in time, declined, or none that VNet can ask for."""


class SignInFailedError(MfaUnansweredError):
    """The browser came back from single sign-on with an error; another try may do."""


class NotFoundError(RefusedError):
    """The cluster has no such resource."""

    refusal = Refusal.UNKNOWN_APP


class NotImplementedByClusterError(RefusedError):
    """The cluster's version does not know this method."""


class MisconfiguredError(TeleportError):
    """VNet's own configuration stands in the way; the message names the key."""


class UnknownAppError(TeleportError):
    """The target belongs to a profile that is gone."""

    refusal = Refusal.UNKNOWN_APP


class PortNotAllowedError(TeleportError):
    """The port is not among the app's target ports."""

    refusal = Refusal.PORT_NOT_ALLOWED

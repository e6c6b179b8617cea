"""What a Teleport user certificate says about its holder. Pure; raises only `IdentityError`.

Teleport keeps everything in the subject name (`lib/tlsca/ca.go`):

    CN user name | O roles | OU usage restriction | L logins | STREET route to cluster
    1.3.9999.1.7 origin cluster | .2.8 active access requests | .2.9 reissue forbidden | ...

The certificate is walked here and not by an X.509 library, because Teleport writes subjects that
strict libraries refuse (empty values, strings longer than RFC 5280's upper bounds).
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from workers.proxy.teleport import der

# A user with thousands of roles and traits still fits; the subject is read once per login.
MAX_CERTIFICATE_BYTES = 256 * 1024
MAX_ATTRIBUTES = 20_000

_COMMON_NAME = "2.5.4.3"
_LOCALITY = "2.5.4.7"
_STREET = "2.5.4.9"
_ORGANIZATION = "2.5.4.10"
_ORGANIZATIONAL_UNIT = "2.5.4.11"
_TELEPORT = "1.3.9999."


class IdentityError(ValueError):
    """The bytes are no certificate that Teleport issued to a user."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The holder of a user certificate. Text fields are empty when the subject lacks them."""

    user: str
    roles: tuple[str, ...]
    usages: tuple[str, ...]
    logins: tuple[str, ...]
    route_to_cluster: str
    issuer: str  # name of the root cluster
    origin_cluster: str
    active_requests: tuple[str, ...]
    is_reissue_forbidden: bool
    pinned_ip: str
    private_key_policy: str
    mfa_device: str
    app_session: str
    app_target_port: str
    not_before: datetime
    not_after: datetime
    public_key: bytes  # DER, SubjectPublicKeyInfo

    @property
    def root_cluster(self) -> str:
        """Name of the cluster that issued the certificate."""
        return self.issuer or self.origin_cluster


def read_identity(certificate: bytes) -> Identity:
    """Reads a DER certificate (RFC 5280 section 4.1).

    Raises:
        IdentityError: malformed, too large, or without a user name or role.
    """
    if len(certificate) > MAX_CERTIFICATE_BYTES:
        raise IdentityError(f"a certificate of {len(certificate)} bytes is too large")
    try:
        return _identity(certificate)
    except der.DerError as error:
        raise IdentityError(f"not a certificate: {error}") from error


def _identity(certificate: bytes) -> Identity:
    outer, _ = der.read_element(certificate)
    to_be_signed = der.children(der.expect(outer, der.SEQUENCE), 3)
    if not to_be_signed:
        raise der.DerError("an empty certificate")
    fields = der.children(der.expect(to_be_signed[0], der.SEQUENCE), 12)
    if fields and fields[0].tag == 0xA0:  # version
        fields = fields[1:]
    if len(fields) < 6:
        raise der.DerError("fields are missing")
    _serial, _algorithm, issuer, validity, subject, public_key = fields[:6]
    times = der.children(der.expect(validity, der.SEQUENCE), 2)
    if len(times) != 2:
        raise der.DerError("validity is incomplete")
    values = _attributes(subject)

    def first(attribute: str) -> str:
        return next(iter(values.get(attribute, ())), "")

    def every(attribute: str) -> tuple[str, ...]:
        return tuple(v for v in values.get(attribute, ()) if v)

    if not first(_COMMON_NAME) or not every(_ORGANIZATION):
        raise IdentityError("the certificate names no Teleport user with roles")
    return Identity(
        user=first(_COMMON_NAME),
        roles=every(_ORGANIZATION),
        usages=every(_ORGANIZATIONAL_UNIT),
        logins=every(_LOCALITY),
        route_to_cluster=first(_STREET),
        issuer=next(iter(_attributes(issuer).get(_COMMON_NAME, ())), ""),
        origin_cluster=first(_TELEPORT + "1.7"),
        active_requests=every(_TELEPORT + "2.8"),
        is_reissue_forbidden=first(_TELEPORT + "2.9") == "true",
        pinned_ip=first(_TELEPORT + "2.15"),
        private_key_policy=first(_TELEPORT + "1.15"),
        mfa_device=first(_TELEPORT + "1.8"),
        app_session=first(_TELEPORT + "1.4"),
        app_target_port=first(_TELEPORT + "1.21"),
        not_before=_time(times[0]),
        not_after=_time(times[1]),
        public_key=public_key.encoded,
    )


def _attributes(name: der.Element) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    left = MAX_ATTRIBUTES
    for rdn in der.children(der.expect(name, der.SEQUENCE), MAX_ATTRIBUTES):
        pairs = der.children(der.expect(rdn, der.SET), left)
        left -= len(pairs)
        for pair in pairs:
            parts = der.children(der.expect(pair, der.SEQUENCE), 2)
            if len(parts) != 2:
                raise der.DerError("an attribute is incomplete")
            kind = der.object_identifier(der.expect(parts[0], der.OBJECT_IDENTIFIER).contents)
            values.setdefault(kind, []).append(der.text(parts[1]))
    return values


def _time(element: der.Element) -> datetime:
    formats = {der.UTC_TIME: "%y%m%d%H%M%SZ", der.GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}
    if element.tag not in formats:
        raise der.DerError("a time of an unknown kind")
    try:
        moment = datetime.strptime(element.contents.decode("ascii"), formats[element.tag]).replace(
            tzinfo=UTC
        )
    except ValueError as error:
        raise der.DerError("a malformed time") from error
    # RFC 5280 section 4.1.2.5.1: two-digit years from 50 are of the last century; strptime
    # draws the line at 69.
    if element.tag == der.UTC_TIME and moment.year >= 2050:
        moment = moment.replace(year=moment.year - 100)
    return moment

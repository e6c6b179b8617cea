"""The Teleport identity in the subject of a user certificate. Pure.

Order of RDNs and string types are those of Go's crypto/x509: O, OU, L, STREET, postalCode, CN,
each one RDN with all its values, then one RDN per custom attribute.
"""

import json
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from cryptography import x509
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID

from demo.cluster.errors import IdentityError

USAGE_APPS = "usage:apps"
USAGE_DATABASES = "usage:db"


class Attribute(Enum):
    """Custom attributes of lib/tlsca below 1.3.9999."""

    APP_SESSION_ID = "1.3.9999.1.4"
    APP_CLUSTER_NAME = "1.3.9999.1.5"
    APP_PUBLIC_ADDR = "1.3.9999.1.6"
    TELEPORT_CLUSTER = "1.3.9999.1.7"
    MFA_VERIFIED = "1.3.9999.1.8"
    LOGIN_IP = "1.3.9999.1.9"
    APP_NAME = "1.3.9999.1.10"
    PRIVATE_KEY_POLICY = "1.3.9999.1.15"
    USER_TYPE = "1.3.9999.1.20"
    APP_TARGET_PORT = "1.3.9999.1.21"
    DATABASE_SERVICE = "1.3.9999.2.1"
    DATABASE_PROTOCOL = "1.3.9999.2.2"
    DATABASE_USER = "1.3.9999.2.3"
    DATABASE_NAME = "1.3.9999.2.4"
    ACCESS_REQUEST = "1.3.9999.2.8"
    DISALLOW_REISSUE = "1.3.9999.2.9"
    PREVIOUS_IDENTITY_EXPIRES = "1.3.9999.2.12"


@dataclass(frozen=True, slots=True)
class AppRoute:
    """RouteToApp: which app, through which session. `target_port` 0 means unset."""

    name: str
    public_addr: str
    cluster_name: str
    session_id: str
    target_port: int = 0


@dataclass(frozen=True, slots=True)
class DatabaseRoute:
    """RouteToDatabase: which database service, as which user, in which of its databases.

    User and database may be empty: some protocols say them themselves.
    """

    service_name: str
    protocol: str
    username: str = ""
    database: str = ""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a certificate speaks for, and what it is good for. `expires` is NotAfter.

    `not_before` is only known of a certificate that was read; `mfa_verified` is the ID of the
    device that answered.
    """

    user: str
    roles: tuple[str, ...]
    teleport_cluster: str
    expires: datetime
    principals: tuple[str, ...] = ()
    usage: tuple[str, ...] = ()
    route_to_cluster: str = ""
    traits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    route_to_app: AppRoute | None = None
    route_to_database: DatabaseRoute | None = None
    access_requests: tuple[str, ...] = ()
    login_ip: str = ""
    mfa_verified: str = ""
    previous_identity_expires: datetime | None = None
    disallow_reissue: bool = False
    not_before: datetime | None = None

    def is_current(self, now: datetime) -> bool:
        """Whether the certificate is valid at this moment."""
        return self.expires > now and (self.not_before is None or self.not_before <= now)

    def may_be_used_for(self, usage: str) -> bool:
        """Whether the certificate is unrestricted, or restricted to this usage among others."""
        return not self.usage or usage in self.usage


def encode_subject(identity: Identity) -> x509.Name:
    """The subject name of a certificate for this identity."""
    traits = json.dumps({name: list(values) for name, values in identity.traits.items()})
    shared = (
        (NameOID.ORGANIZATION_NAME, identity.roles),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, identity.usage),
        (NameOID.LOCALITY_NAME, identity.principals),
        (NameOID.STREET_ADDRESS, (identity.route_to_cluster,)),
        (NameOID.POSTAL_CODE, (traits,)),
        (NameOID.COMMON_NAME, (identity.user,)),
    )
    rdns = [
        x509.RelativeDistinguishedName([go_attribute(oid, value) for value in dict.fromkeys(found)])
        for oid, values in shared
        if (found := tuple(value for value in values if value))
    ]
    rdns += [
        x509.RelativeDistinguishedName([go_attribute(x509.ObjectIdentifier(oid.value), text)])
        for oid, text in _custom_attributes(identity)
    ]
    return x509.Name(rdns)


def go_attribute(oid: x509.ObjectIdentifier, text: str) -> x509.NameAttribute[str]:
    """One attribute with the string type Go would choose: PrintableString where it can be."""
    # X.680 section 41.4; Go leaves "*" and "&" to UTF8String when it writes.
    printable = text.isascii() and all(c.isalnum() or c in " '()+,-./:=?" for c in text)
    kind = _ASN1Type.PrintableString if printable else _ASN1Type.UTF8String
    return x509.NameAttribute(oid, text, _type=kind)


def _custom_attributes(identity: Identity) -> Iterator[tuple[Attribute, str]]:
    if (route := identity.route_to_app) is not None:
        yield Attribute.APP_SESSION_ID, route.session_id
        if route.public_addr:
            yield Attribute.APP_PUBLIC_ADDR, route.public_addr
        if route.cluster_name:
            yield Attribute.APP_CLUSTER_NAME, route.cluster_name
        yield Attribute.APP_NAME, route.name
        if route.target_port:
            yield Attribute.APP_TARGET_PORT, str(route.target_port)
    if (database := identity.route_to_database) is not None:
        yield Attribute.DATABASE_SERVICE, database.service_name
        if database.protocol:
            yield Attribute.DATABASE_PROTOCOL, database.protocol
        if database.username:
            yield Attribute.DATABASE_USER, database.username
        if database.database:
            yield Attribute.DATABASE_NAME, database.database
    yield Attribute.TELEPORT_CLUSTER, identity.teleport_cluster
    if identity.mfa_verified:
        yield Attribute.MFA_VERIFIED, identity.mfa_verified
    if identity.login_ip:
        yield Attribute.LOGIN_IP, identity.login_ip
    yield Attribute.PRIVATE_KEY_POLICY, "none"
    yield Attribute.USER_TYPE, "local"
    for request in identity.access_requests:
        yield Attribute.ACCESS_REQUEST, request
    if identity.disallow_reissue:
        yield Attribute.DISALLOW_REISSUE, "true"
    if identity.previous_identity_expires is not None:
        text = identity.previous_identity_expires.strftime("%Y-%m-%dT%H:%M:%SZ")
        yield Attribute.PREVIOUS_IDENTITY_EXPIRES, text


def decode_peer(peer: Mapping[str, Any] | None) -> Identity:
    """The identity of a verified TLS peer, from what `SSLObject.getpeercert()` returns.

    Raises:
        IdentityError: no certificate, or a subject without user or without roles.
    """
    if not peer:
        raise IdentityError("the client presented no certificate")
    values: dict[str, list[str]] = {}
    for rdn in peer["subject"]:
        for name, value in rdn:
            values.setdefault(name, []).append(value)
    user, roles = values.get("commonName", [""])[0], tuple(values.get("organizationName", ()))
    if not user or not roles:
        raise IdentityError("the certificate names no user or no role")

    def one(attribute: Attribute) -> str:
        return values.get(attribute.value, [""])[0]

    previous = one(Attribute.PREVIOUS_IDENTITY_EXPIRES)
    return Identity(
        user=user,
        roles=roles,
        teleport_cluster=one(Attribute.TELEPORT_CLUSTER),
        expires=datetime.fromtimestamp(ssl.cert_time_to_seconds(peer["notAfter"]), UTC),
        principals=tuple(values.get("localityName", ())),
        usage=tuple(values.get("organizationalUnitName", ())),
        route_to_cluster=values.get("streetAddress", [""])[0],
        traits=_decode_traits(values.get("postalCode", ["{}"])[0]),
        route_to_app=_decode_route(one),
        route_to_database=_decode_database_route(one),
        access_requests=tuple(values.get(Attribute.ACCESS_REQUEST.value, ())),
        login_ip=one(Attribute.LOGIN_IP),
        mfa_verified=one(Attribute.MFA_VERIFIED),
        previous_identity_expires=datetime.fromisoformat(previous) if previous else None,
        disallow_reissue=one(Attribute.DISALLOW_REISSUE) == "true",
        not_before=_peer_time(peer, "notBefore"),
    )


def _decode_route(one: Callable[[Attribute], str]) -> AppRoute | None:
    route = AppRoute(
        name=one(Attribute.APP_NAME),
        public_addr=one(Attribute.APP_PUBLIC_ADDR),
        cluster_name=one(Attribute.APP_CLUSTER_NAME),
        session_id=one(Attribute.APP_SESSION_ID),
        target_port=int(one(Attribute.APP_TARGET_PORT) or "0"),
    )
    routes = route.session_id and route.public_addr and route.cluster_name
    return route if routes else None


def _decode_database_route(one: Callable[[Attribute], str]) -> DatabaseRoute | None:
    route = DatabaseRoute(
        service_name=one(Attribute.DATABASE_SERVICE),
        protocol=one(Attribute.DATABASE_PROTOCOL),
        username=one(Attribute.DATABASE_USER),
        database=one(Attribute.DATABASE_NAME),
    )
    return route if route.service_name else None


def _peer_time(peer: Mapping[str, Any], name: str) -> datetime | None:
    text = peer.get(name)
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(text), UTC) if text else None


def _decode_traits(text: str) -> dict[str, tuple[str, ...]]:
    decoded: dict[str, list[str]] = json.loads(text or "{}")
    return {name: tuple(values) for name, values in decoded.items()}

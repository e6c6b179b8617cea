from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from demo.cluster.authorities import issue_user_certificate, make_authority
from demo.cluster.errors import IdentityError
from demo.cluster.identity import (
    AppRoute,
    DatabaseRoute,
    Identity,
    decode_peer,
    encode_subject,
)

NOW = datetime.now(UTC).replace(microsecond=0)
IDENTITY = Identity(
    user="alice@acme.test",
    roles=("access", "dev*"),
    teleport_cluster="demo.test",
    expires=NOW + timedelta(hours=1),
    principals=("root", "alice"),
    usage=("usage:apps",),
    route_to_cluster="leaf.demo.test",
    traits={"logins": ("alice", "jürgen")},
    route_to_app=AppRoute("pg", "pg.demo.test", "demo.test", "00ff", 5432),
    route_to_database=DatabaseRoute("orders", "postgres", "bob", "app"),
    access_requests=("r1", "r2"),
    login_ip="127.0.0.1",
    mfa_verified="device",
    previous_identity_expires=NOW + timedelta(hours=2),
    disallow_reissue=True,
    not_before=NOW,
)
CA = make_authority("demo.test", NOW)


def peer_of(identity):
    """What a server sees of a client with a certificate for `identity`."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = issue_user_certificate(CA, identity, key.public_key(), NOW)
    decoded = x509.load_pem_x509_certificate(pem)
    names = {
        NameOID.COMMON_NAME: "commonName",
        NameOID.ORGANIZATION_NAME: "organizationName",
        NameOID.ORGANIZATIONAL_UNIT_NAME: "organizationalUnitName",
        NameOID.LOCALITY_NAME: "localityName",
        NameOID.STREET_ADDRESS: "streetAddress",
        NameOID.POSTAL_CODE: "postalCode",
    }
    return {
        "subject": tuple(
            tuple((names.get(a.oid, a.oid.dotted_string), a.value) for a in rdn)
            for rdn in decoded.subject.rdns
        ),
        "notBefore": decoded.not_valid_before_utc.strftime("%b %d %H:%M:%S %Y GMT"),
        "notAfter": decoded.not_valid_after_utc.strftime("%b %d %H:%M:%S %Y GMT"),
    }


def test_identity_survives_the_certificate():
    decoded = decode_peer(peer_of(IDENTITY))
    assert set(decoded.roles) == set(IDENTITY.roles)
    assert set(decoded.principals) == set(IDENTITY.principals)
    # The values of one RDN are a set: DER sorts them.
    same = {"roles": IDENTITY.roles, "principals": IDENTITY.principals}
    for name in Identity.__slots__:
        assert same.get(name, getattr(decoded, name)) == getattr(IDENTITY, name), name


def test_repeated_values_share_one_rdn_and_custom_ones_do_not():
    rdns = encode_subject(IDENTITY).rdns
    shape = [(rdn.get_attributes_for_oid(next(iter(rdn)).oid)[0].oid, len(rdn)) for rdn in rdns]
    assert shape[:6] == [
        (NameOID.ORGANIZATION_NAME, 2),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, 1),
        (NameOID.LOCALITY_NAME, 2),
        (NameOID.STREET_ADDRESS, 1),
        (NameOID.POSTAL_CODE, 1),
        (NameOID.COMMON_NAME, 1),
    ]
    assert all(oid.dotted_string.startswith("1.3.9999.") for oid, _ in shape[6:])
    requests = [rdn for rdn in rdns if next(iter(rdn)).oid.dotted_string == "1.3.9999.2.8"]
    assert len(requests) == 2


def test_strings_are_printable_where_they_can_be():
    der = encode_subject(IDENTITY).public_bytes()
    assert b"\x13\x06access" in der  # PrintableString
    assert b"\x0c\x04dev*" in der  # UTF8String
    assert b"\x0c\x0falice@acme.test" in der


def test_issuer_of_user_certificates_names_the_cluster():
    key = ec.generate_private_key(ec.SECP256R1())
    pem = issue_user_certificate(CA, IDENTITY, key.public_key(), NOW)
    issuer = x509.load_pem_x509_certificate(pem).issuer
    for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME):
        assert issuer.get_attributes_for_oid(oid)[0].value == "demo.test"


def test_cluster_name_of_64_characters_makes_an_authority():
    name = f"{'a' * 59}.test"
    assert len(name) == 64
    subject = make_authority(name, NOW).tls.certificate.subject
    assert subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == name


@pytest.mark.parametrize(
    "peer",
    [
        None,
        {},
        {"subject": ((("commonName", "alice"),),), "notAfter": "Jan  1 00:00:00 2030 GMT"},
        {"subject": ((("organizationName", "r"),),), "notAfter": "Jan  1 00:00:00 2030 GMT"},
    ],
)
def test_certificate_without_user_or_role_is_rejected(peer):
    with pytest.raises(IdentityError):
        decode_peer(peer)


def test_route_needs_session_address_and_cluster():
    route = AppRoute("pg", "", "demo.test", "00ff")
    peer = peer_of(Identity("alice", ("access",), "demo.test", NOW, route_to_app=route))
    assert decode_peer(peer).route_to_app is None


def test_database_route_stands_in_its_own_attributes():
    subject = {a.oid.dotted_string: a.value for a in encode_subject(IDENTITY)}
    assert [subject[f"1.3.9999.2.{number}"] for number in (1, 2, 3, 4)] == [
        *("orders", "postgres", "bob", "app")
    ]


def test_certificate_is_current_between_its_dates():
    hour = timedelta(hours=1)
    assert IDENTITY.is_current(NOW)
    assert not IDENTITY.is_current(NOW - hour)
    assert not IDENTITY.is_current(NOW + hour)

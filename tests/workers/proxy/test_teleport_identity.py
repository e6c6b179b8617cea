from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from teleport_fakes import CLUSTER, NOW, USER_SUBJECT, der, name, oid, user_certificate

from workers.proxy.teleport import der as reader
from workers.proxy.teleport.identity import IdentityError, read_identity

CERTIFICATE = der(user_certificate())


def read(subject):
    return read_identity(der(user_certificate(subject=subject)))


def test_a_user_certificate_tells_who_and_until_when():
    identity = read_identity(CERTIFICATE)
    assert identity.user == "alice"
    assert identity.roles == ("access", "auditor")
    assert identity.logins == ("root",)
    assert identity.route_to_cluster == CLUSTER
    assert identity.root_cluster == CLUSTER
    assert identity.active_requests == ("request-1",)
    assert identity.not_after == NOW + timedelta(hours=12)
    assert not identity.is_reissue_forbidden


def test_an_app_certificate_tells_its_session_and_port():
    identity = read([*USER_SUBJECT, (oid("1.4"), "session"), (oid("1.21"), "8000")])
    assert (identity.app_session, identity.app_target_port) == ("session", "8000")


def test_repeated_values_in_one_set_are_all_read():
    # Go writes all values of one attribute into one multi-valued RDN.
    rdn = x509.RelativeDistinguishedName(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, role) for role in ("a", "b", "c")]
    )
    subject = x509.Name([rdn, *name([(NameOID.COMMON_NAME, "bob")]).rdns])
    encoded = subject.public_bytes()
    original = name(USER_SUBJECT).public_bytes()
    patched = _replace_subject(CERTIFICATE, original, encoded)
    assert set(read_identity(patched).roles) == {"a", "b", "c"}


def _replace_subject(certificate, old, new):
    """The certificate with another subject; signatures are not looked at here."""
    outer, _ = reader.read_element(certificate)
    signed, *rest = reader.children(outer, 3)
    assert signed.contents.count(old) == 1
    body = _wrap(0x30, signed.contents.replace(old, new))
    return _wrap(0x30, body + b"".join(element.encoded for element in rest))


def _wrap(tag, contents):
    size = len(contents)
    length = bytes([size]) if size < 128 else b"\x84" + size.to_bytes(4, "big")
    return bytes([tag]) + length + contents


def test_empty_values_do_not_hinder():
    """Go writes them; X.509 libraries refuse them."""
    original = name(USER_SUBJECT).public_bytes()
    usage = _wrap(0x31, _wrap(0x30, b"\x06\x03\x55\x04\x0b" + b"\x0c\x00"))
    subject = _wrap(0x30, reader.read_element(original)[0].contents + usage)
    identity = read_identity(_replace_subject(CERTIFICATE, original, subject))
    assert (identity.user, identity.usages) == ("alice", ())


@pytest.mark.parametrize(
    "subject",
    [
        [(NameOID.COMMON_NAME, "alice")],
        [(NameOID.ORGANIZATION_NAME, "access")],
        [(oid("1.7"), CLUSTER)],
    ],
)
def test_a_certificate_without_user_or_roles_is_refused(subject):
    with pytest.raises(IdentityError, match="no Teleport user"):
        read(subject)


@pytest.mark.parametrize("year", [2049, 2050, 2075, 9999])
def test_both_forms_of_time_are_read(year):
    not_after = datetime(year, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert read_identity(der(user_certificate(not_after))).not_after == not_after


def test_a_huge_certificate_is_refused_unread():
    with pytest.raises(IdentityError, match="too large"):
        read_identity(bytes(300_000))


def test_a_subject_with_too_many_attributes_is_refused():
    rdn = _wrap(0x31, b"")
    subject = _wrap(0x30, rdn * 20_001)
    original = name(USER_SUBJECT).public_bytes()
    with pytest.raises(IdentityError, match="more than"):
        read_identity(_replace_subject(CERTIFICATE, original, subject))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_only_identity_error(data):
    with pytest.raises(IdentityError):
        read_identity(data)


@given(
    st.lists(st.tuples(st.integers(0, len(CERTIFICATE) - 1), st.integers(0, 255)), max_size=8),
    st.integers(0, len(CERTIFICATE)),
)
def test_damaged_certificates_raise_only_identity_error(changes, end):
    data = bytearray(CERTIFICATE)
    for position, value in changes:
        data[position] = value
    for candidate in (bytes(data), bytes(data[:end])):
        try:
            identity = read_identity(candidate)
        except IdentityError:
            continue
        assert identity.user


@given(
    st.lists(
        st.tuples(
            st.sampled_from([NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME, oid("2.8")]),
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=16),
        ),
        max_size=20,
    )
)
def test_whatever_text_a_subject_holds_comes_out_unchanged(extra):
    subject = x509.Name(
        [
            x509.NameAttribute(kind, value, _validate=False)
            for kind, value in [*USER_SUBJECT, *extra]
        ]
    )
    original = name(USER_SUBJECT).public_bytes()
    identity = read_identity(_replace_subject(CERTIFICATE, original, subject.public_bytes()))
    values = [value for kind, value in extra if kind == oid("2.8")]
    assert identity.active_requests == ("request-1", *values)
    assert identity.roles[2:] == tuple(v for k, v in extra if k == NameOID.ORGANIZATION_NAME)

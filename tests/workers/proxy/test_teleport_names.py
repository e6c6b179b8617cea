import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.proxy.teleport.names import (
    auth_alpn,
    encode_cluster_name,
    is_label,
    is_zone,
    name_predicate,
    normalise,
    public_addr_predicate,
    quote,
    split_host_port,
)


def test_cluster_names_are_sent_as_hex():
    assert encode_cluster_name("root.test") == "726f6f742e74657374.teleport.cluster.local"


def test_the_auth_protocol_comes_before_h2():
    assert auth_alpn("a") == ["teleport-auth@61.teleport.cluster.local", "h2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("proxy.test:3080", ("proxy.test", 3080)),
        ("proxy.test", ("proxy.test", 443)),
        ("Proxy.Test.:443", ("proxy.test", 443)),
        ("https://proxy.test:8443/", ("proxy.test", 8443)),
        ("[::1]:3080", ("::1", 3080)),
        ("::1", ("::1", 443)),
    ],
)
def test_addresses_are_split(text, expected):
    assert split_host_port(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":443",
        "a:0",
        "a:65536",
        "a:x",
        "a:-1",
        "a/b:1",
        "a:٣",
        "..:1",
        "a\nb",
        "a\x1b",
        "\ud800",
    ],
)
def test_impossible_addresses_are_refused(text):
    with pytest.raises(ValueError):
        split_host_port(text)


@given(st.text())
def test_splitting_raises_only_value_error(text):
    try:
        host, port = split_host_port(text)
    except ValueError:
        return
    assert host
    assert 1 <= port <= 65535


@pytest.mark.parametrize("zone", ["a.test", "corp.example.test", "_x.a-b.test", "1.test"])
def test_zones(zone):
    assert is_zone(zone)


@pytest.mark.parametrize(
    "zone", ["", "test", ".test", "a..b", "10.0.0.1", "a b.test", "-a.test", "é.test", "a.test."]
)
def test_what_is_no_zone(zone):
    assert not is_zone(zone)


@pytest.mark.parametrize("text", ["orders", "a-1", "a_b", "a" * 63])
def test_labels(text):
    assert is_label(text)


@pytest.mark.parametrize("text", ["", "a.b", "Orders", "a" * 64, "-a", "a b", "é"])
def test_what_is_no_label(text):
    assert not is_label(text)


def test_normal_form_has_no_capitals_and_no_final_dot():
    assert normalise("A.Test.") == "a.test"


def test_predicate_asks_every_spelling_once():
    assert public_addr_predicate(["A.test"]) == (
        'resource.spec.public_addr == "A.test" || resource.spec.public_addr == "A.test."'
        ' || resource.spec.public_addr == "a.test" || resource.spec.public_addr == "a.test."'
    )
    assert public_addr_predicate(["a.test."]).count("==") == 2


def test_a_name_is_asked_for_as_given_and_lower_case():
    assert name_predicate("Orders") == 'name == "Orders" || name == "orders"'
    assert name_predicate("orders") == 'name == "orders"'


def test_a_name_cannot_leave_its_quotes():
    assert quote('x" || true || "') == r'"x\" || true || \""'
    assert quote("a\\") == r'"a\\"'


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_quoted_text_reads_back_as_the_same_text(text):
    # Python's string literals agree with Go's in everything that quote writes.
    quoted = quote(text)
    assert ast.literal_eval(quoted) == text
    assert quoted.isprintable()

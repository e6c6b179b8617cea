import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.cluster.errors import PredicateError
from demo.cluster.predicate import compile_predicate, unquote

FIELDS = {
    "name": "pg",
    "labels": {"env": "prod"},
    "resource.metadata.name": "pg",
    "resource.metadata.labels": {"env": "prod"},
    "resource.spec.public_addr": "pg.demo.test",
}


@pytest.mark.parametrize(
    ("expression", "matches"),
    [
        ("", True),
        ('resource.spec.public_addr == "pg.demo.test"', True),
        ('resource.spec.public_addr == "PG.demo.test"', False),
        (
            'resource.spec.public_addr == "x" || resource.spec.public_addr == "pg.demo.test"',
            True,
        ),
        ('resource.metadata.name == "pg" && name != "pg"', False),
        ('name == "a" && name == "b" || name == "pg"', True),
        ('name == "pg" || name == "pg" && name == "b"', True),
        ('(name == "pg" || name == "pg") && name == "b"', False),
        ('!(name == "x")', True),
        ('labels["env"] == "prod"', True),
        ('resource.metadata.labels["none"] == ""', True),
        ("name == `pg`", True),
        (r'name == "\x70\u0067"', True),
        (r'name == "p\147"', True),
        ('equals(name, "pg")', True),
        ('hasPrefix(resource.spec.public_addr, "pg.")', True),
        ('search("DEMO", "prod")', True),
        ('search("demo", "nowhere")', False),
        ('exists(labels["env"])', True),
        ('exists(labels["none"])', False),
    ],
)
def test_expression_is_evaluated_as_the_server_does(expression, matches):
    assert compile_predicate(expression)(FIELDS) is matches


@pytest.mark.parametrize(
    "expression",
    [
        "==",
        'name == "pg',
        "name ==",
        'name == "pg" ||',
        'name == "pg" "x"',
        "(name",
        'name == "a" | name == "b"',
        'resource.spec.secret == "x"',
        'name == "pg" || resource.spec.secret == "x"',
        '"pg"',
        'name && name == "pg"',
        r'name == "\q"',
        r'name == "\ud800"',
        'labels == "x"',
        'unknown("x")',
        'name["x"] == ""',
        "!" * 100 + 'name == "pg"',
        "(" * 100 + 'name == "pg"' + ")" * 100,
        'name == "' + "x" * 70000 + '"',
    ],
)
def test_bad_expression_is_refused(expression):
    with pytest.raises(PredicateError):
        compile_predicate(expression)(FIELDS)


def go_quote(text):
    """A Go string literal, with every character escaped."""
    return '"' + "".join(f"\\U{ord(c):08x}" for c in text) + '"'


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_escaped_string_is_read_back(text):
    assert unquote(go_quote(text)) == text


@given(st.text() | st.text('name=&|!()"`\\.[],resouc metad', max_size=60))
def test_any_expression_raises_only_its_own_error(expression):
    with contextlib.suppress(PredicateError):
        assert compile_predicate(expression)(FIELDS) in {True, False}


@pytest.mark.parametrize(
    ("expression", "needs"),
    [
        ('name == "a"', {("name", "a")}),
        ('"a" == name', {("name", "a")}),
        (
            'equals(name, "a") || (resource.metadata.name == "b")',
            {("name", "a"), ("resource.metadata.name", "b")},
        ),
        ('name == "a" && search("x")', {("name", "a")}),
        ('search("x") && name == "a"', {("name", "a")}),
        ('name == "a" || search("x")', None),
        ('name != "a"', None),
        ('!(name == "a")', None),
        ('labels["name"] == "a"', None),
        ("name == resource.metadata.name", None),
        ("", None),
    ],
)
def test_expression_tells_what_a_match_needs(expression, needs):
    assert compile_predicate(expression).needs == needs


TEXTS = st.sampled_from(["pg", "x", "pg.demo.test", ""])
EQUALITIES = st.builds(
    '{} {} "{}"'.format,
    st.sampled_from(["name", "resource.metadata.name", "resource.spec.public_addr"]),
    st.sampled_from(["==", "!="]),
    TEXTS,
)
EXPRESSIONS = st.recursive(
    EQUALITIES,
    lambda inner: st.one_of(
        st.builds("({} || {})".format, inner, inner),
        st.builds("({} && {})".format, inner, inner),
        st.builds("!({})".format, inner),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS, TEXTS, TEXTS)
def test_every_match_holds_one_of_the_needed_equalities(expression, name, address):
    fields = {**FIELDS, "name": name, "resource.spec.public_addr": address}
    predicate = compile_predicate(expression)
    if predicate(fields) and predicate.needs is not None:
        assert any(fields[field] == text for field, text in predicate.needs)

r"""The predicate language of resource listing, the part that clients use. Pure.

    or      = and , { "||" , and }
    and     = unary , { "&&" , unary }
    unary   = "!" , unary | equality
    equality= primary , [ ( "==" | "!=" ) , primary ]
    primary = "(" , or , ")" | string | field | call
    field   = name , { "." , name | "[" , string , "]" }

Strings are Go's: "interpreted" with escapes, or `raw`. The whole expression is evaluated with
each resource's fields; a field that resources do not have is an error, also where `&&` or `||`
would not look at it. Raises only PredicateError.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from demo.cluster.errors import PredicateError

MAX_EXPRESSION_BYTES = 64 * 1024
MAX_DEPTH = 64

# What an expression evaluates against: labels under "labels" as a mapping, the rest text.
Fields = Mapping[str, "str | Mapping[str, str]"]
# Field and text of an equality.
Equality = tuple[str, str]
_Value = bool | str | Mapping[str, str]
_Evaluate = Callable[[Fields], _Value]

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<symbol>==|!=|&&|\|\||[!()\[\].,])
    | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<string>"(?:[^"\\\n]|\\.)*")
    | (?P<raw>`[^`]*`)
    )""",
    re.VERBOSE,
)
_ESCAPE = re.compile(
    r"""\\(?:(?P<simple>[abfnrtv\\"])|x(?P<x>[0-9a-fA-F]{2})|(?P<octal>[0-7]{3})
    |u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})|(?P<bad>.?))""",
    re.VERBOSE | re.DOTALL,
)
_SIMPLE = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92, '"': 34}


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class _Node:
    """A part of an expression. `field` or `text` if it is only that; see `Predicate.needs`."""

    evaluate: _Evaluate
    field: str = ""
    text: str | None = None
    needs: frozenset[Equality] | None = None


@dataclass(frozen=True, slots=True)
class Predicate:
    """A compiled expression: called with a resource's fields it tells whether that matches.

    Of the equalities in `needs` at least one holds for every resource that matches; None when
    nothing is known. An index of resources needs to look no further.

    Raises:
        PredicateError: a field that the resource's kind does not have, or no boolean result.
    """

    evaluate: _Evaluate
    needs: frozenset[Equality] | None = None

    def __call__(self, fields: Fields) -> bool:
        result = self.evaluate(fields)
        if not isinstance(result, bool):
            raise PredicateError("failed to parse predicate expression: it is no condition")
        return result


@functools.lru_cache(maxsize=64)
def compile_predicate(expression: str) -> Predicate:
    """The predicate that an expression describes; an empty one matches everything."""
    if not expression.strip():
        return Predicate(lambda _fields: True)
    node = _Parser(_tokens(expression)).parse()
    return Predicate(node.evaluate, node.needs)


def _tokens(expression: str) -> list[_Token]:
    if len(expression.encode("utf-8", "surrogatepass")) > MAX_EXPRESSION_BYTES:
        raise PredicateError("failed to parse predicate expression: it is too long")
    found: list[_Token] = []
    at = 0
    text = expression.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise PredicateError(f"failed to parse predicate expression: at character {at}")
        kind = match.lastgroup or ""
        found.append(_Token(kind, match[kind]))
        at = match.end()
    return found


def unquote(literal: str) -> str:
    """The text of a Go string literal with its double quotes."""
    out = bytearray()
    at = 0
    body = literal[1:-1]
    for match in _ESCAPE.finditer(body):
        out += body[at : match.start()].encode("utf-8", "surrogatepass")
        out += _escaped(match)
        at = match.end()
    out += body[at:].encode("utf-8", "surrogatepass")
    return out.decode("utf-8", "replace")


def _escaped(match: re.Match[str]) -> bytes:
    if simple := match["simple"]:
        return bytes([_SIMPLE[simple]])
    if match["x"] is not None:
        return bytes([int(match["x"], 16)])
    code = match["u"] or match["U"]
    number = int(code, 16) if code else int(match["octal"] or "777", 8)
    is_surrogate = 0xD800 <= number < 0xE000
    if match["bad"] is not None or is_surrogate or number > (0x10FFFF if code else 0xFF):
        raise PredicateError(f"failed to parse predicate expression: escape {match[0]!r}")
    return chr(number).encode() if code else bytes([number])


class _Parser:
    """Recursive descent over the token list; depth is bounded."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._parse_or()
        if self._at != len(self._tokens):
            raise self._error()
        return node

    def _error(self) -> PredicateError:
        rest = self._tokens[self._at].text if self._at < len(self._tokens) else "the end"
        return PredicateError(f"failed to parse predicate expression: unexpected {rest[:80]!r}")

    def _take(self, *symbols: str) -> str | None:
        if self._at < len(self._tokens):
            token = self._tokens[self._at]
            if token.kind == "symbol" and token.text in symbols:
                self._at += 1
                return token.text
        return None

    def _expect(self, symbol: str) -> None:
        if self._take(symbol) is None:
            raise self._error()

    def _parse_or(self) -> _Node:
        nodes = [self._parse_and()]
        while self._take("||"):
            nodes.append(self._parse_and())
        if len(nodes) == 1:
            return nodes[0]
        parts = [node.evaluate for node in nodes]
        known = [node.needs for node in nodes if node.needs is not None]
        needs = frozenset[Equality]().union(*known) if len(known) == len(nodes) else None
        # Lists, not generators: every part is evaluated, so that its errors show.
        return _Node(lambda f: any([_truth(part(f)) for part in parts]), needs=needs)  # noqa: C419

    def _parse_and(self) -> _Node:
        nodes = [self._parse_unary()]
        while self._take("&&"):
            nodes.append(self._parse_unary())
        if len(nodes) == 1:
            return nodes[0]
        parts = [node.evaluate for node in nodes]
        needs = next((node.needs for node in nodes if node.needs is not None), None)
        return _Node(lambda f: all([_truth(part(f)) for part in parts]), needs=needs)  # noqa: C419

    def _parse_unary(self) -> _Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise PredicateError("failed to parse predicate expression: nested too deeply")
        try:
            if self._take("!"):
                inner = self._parse_unary().evaluate
                return _Node(lambda f: not _truth(inner(f)))
            return self._parse_equality()
        finally:
            self._depth -= 1

    def _parse_equality(self) -> _Node:
        left = self._parse_primary()
        operator = self._take("==", "!=")
        if operator is None:
            return left
        return _equality(left, self._parse_primary(), is_wanted=operator == "==")

    def _parse_primary(self) -> _Node:
        if self._take("("):
            inner = self._parse_or()
            self._expect(")")
            return inner
        if self._at == len(self._tokens):
            raise self._error()
        token = self._tokens[self._at]
        if token.kind in {"string", "raw"}:
            self._at += 1
            text = unquote(token.text) if token.kind == "string" else token.text[1:-1]
            return _Node(lambda _f: text, text=text)
        if token.kind == "name":
            return self._parse_name()
        raise self._error()

    def _parse_name(self) -> _Node:
        path = [self._next_name()]
        if self._take("("):
            return self._parse_call(path[0])
        while self._take("."):
            path.append(self._next_name())
        name = ".".join(path)
        if name in {"true", "false"}:
            return _Node(lambda _f: name == "true")
        if not self._take("["):
            return _Node(lambda f: _lookup(f, name), field=name)
        key = self._parse_primary().evaluate
        self._expect("]")
        return _Node(lambda f: _label(_lookup(f, name), key(f)))

    def _next_name(self) -> str:
        if self._at < len(self._tokens) and self._tokens[self._at].kind == "name":
            self._at += 1
            return self._tokens[self._at - 1].text
        raise self._error()

    def _parse_call(self, function: str) -> _Node:
        arguments: list[_Node] = []
        while not self._take(")"):
            if arguments:
                self._expect(",")
            arguments.append(self._parse_or())
        arity = {"equals": 2, "hasPrefix": 2, "exists": 1}.get(function)
        if function != "search" and arity != len(arguments):
            raise PredicateError(f"failed to parse predicate expression: {function}(...)")
        if function == "equals":
            return _equality(*arguments, is_wanted=True)
        values = [node.evaluate for node in arguments]
        if function == "hasPrefix":
            return _Node(lambda f: _text(values[0](f)).startswith(_text(values[1](f))))
        if function == "exists":
            return _Node(lambda f: values[0](f) != "")
        return _Node(lambda f: matches_search(f, [_text(value(f)) for value in values]))


def _equality(left: _Node, right: _Node, *, is_wanted: bool) -> _Node:
    needs = None
    if is_wanted and left.field and right.text is not None:
        needs = frozenset({(left.field, right.text)})
    elif is_wanted and right.field and left.text is not None:
        needs = frozenset({(right.field, left.text)})
    one, other = left.evaluate, right.evaluate
    return _Node(lambda f: (_comparable(one(f)) == _comparable(other(f))) is is_wanted, needs=needs)


def matches_search(fields: Fields, words: list[str]) -> bool:
    """Whether every word occurs, without case, in some text field or label of the resource."""
    text = search_text(fields)
    return all(word.lower() in text for word in words)


def search_text(fields: Fields) -> str:
    """All texts and labels of a resource in lower case, apart from each other by a NUL."""
    texts: list[str] = []
    for value in fields.values():
        if isinstance(value, str):
            texts.append(value)
        else:
            texts.extend(part for item in value.items() for part in item)
    return "\0".join(texts).lower()


def _lookup(fields: Fields, name: str) -> _Value:
    value = fields.get(name)
    if value is None:
        raise PredicateError(f"failed to parse predicate expression: {name} is not defined")
    return value


def _label(labels: _Value, key: _Value) -> _Value:
    if isinstance(labels, bool | str):
        raise PredicateError("failed to parse predicate expression: only labels have keys")
    return labels.get(_text(key), "")


def _truth(value: _Value) -> bool:
    if not isinstance(value, bool):
        raise PredicateError("failed to parse predicate expression: a condition is expected")
    return value


def _text(value: _Value) -> str:
    if not isinstance(value, str):
        raise PredicateError("failed to parse predicate expression: a string is expected")
    return value


def _comparable(value: _Value) -> bool | str:
    if not isinstance(value, bool | str):
        raise PredicateError("failed to parse predicate expression: labels cannot be compared")
    return value

"""Plain values that nearly fit a type, for the targets whose decoder is not written in Python.

A fuzzer learns nothing of such a decoder, so the bytes decide what is at the edge instead: lengths
and numbers at their limits and one beyond, parts left out, parts of another type.
"""

import math

import msgspec
from byte_choices import Choices

_STRANGE = [
    None,
    True,
    -1,
    0,
    2**63,
    -(2**63),
    math.nan,
    math.inf,
    1e300,
    "",
    "\0",
    "ü\u202e\n",
    "x" * 501,
    b"",
    b"\xff" * 17,
    [],
    [[[]]],
    {},
    {"t": "Stop"},
]
# Of a long list so many parts differ.
_DIFFERENT = 4
_LETTERS = ["a", "0", "-", ".", "ü", "\n", "\x1b", "proxy-1", "\U0001f600"]


def build(kind: object, choices: Choices) -> object:
    """A value for `kind`, a type or what `msgspec.inspect.type_info` tells of one."""
    info = kind if isinstance(kind, msgspec.inspect.Type) else msgspec.inspect.type_info(kind)
    if choices.below(24) == 23:
        return choices.pick(_STRANGE)
    match info:
        case msgspec.inspect.Metadata():
            return build(info.type, choices)
        case msgspec.inspect.UnionType():
            return build(choices.pick(info.types), choices)
        case msgspec.inspect.StructType():
            return _struct(info, choices)
        case msgspec.inspect.ListType():
            length = _length(info, choices, 3)
            parts = [build(info.item_type, choices) for _ in range(min(length, _DIFFERENT))]
            return parts + parts[:1] * (length - len(parts))
        case msgspec.inspect.DictType():
            length = _length(info, choices, 3)
            keys = [_key(info, choices) for _ in range(min(length, _DIFFERENT))]
            keys += [f"key_{number}" for number in range(length - len(keys))]
            values = [build(info.value_type, choices) for _ in range(min(length, _DIFFERENT))]
            return dict(zip(keys, values * (length // _DIFFERENT + 1), strict=False))
        case msgspec.inspect.StrType():
            length = _length(info, choices, 12)
            return (choices.pick(_LETTERS) * length)[:length]
        case msgspec.inspect.BytesType():
            length = _length(info, choices, 20)
            return (choices.take(length) or b"x").ljust(length, b"\xff")[:length]
        case msgspec.inspect.BoolType():
            return bool(choices.below(2))
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            return _number(info, choices)
        case msgspec.inspect.EnumType():
            return choices.pick([member.value for member in info.cls])
        case _:
            return None


def _struct(info, choices: Choices) -> object:
    fields = [field for field in info.fields if choices.below(24) != 23]
    values = {field.encode_name: build(field.type, choices) for field in fields}
    if info.array_like:
        return list(values.values())
    if info.tag_field is not None:
        values[info.tag_field] = info.tag
    if choices.below(48) == 47:
        values[choices.pick(["other", "\x1b[2J", "x" * 1000])] = None
    return values


def _key(info, choices: Choices) -> str:
    key = build(info.key_type, choices)
    return key if isinstance(key, str) else str(key)


def _length(info, choices: Choices, usual: int) -> int:
    least = info.min_length or 0
    most = info.max_length
    near = [least, least + choices.below(usual + 1), least + choices.below(usual + 1)]
    edges = [least - 1, *([most, most + 1] if most is not None else [least])]
    number = choices.pick(edges) if choices.below(12) == 11 else choices.pick(near)
    return max(0, min(number, 5000 if most is None else most + 1))


def _number(info, choices: Choices) -> object:
    least = info.ge if info.ge is not None else -(2**40)
    most = info.le if info.le is not None else 2**40
    number = choices.pick([least, most, 0, 1, choices.byte(), least - 1, most + 1, least, most])
    if isinstance(info, msgspec.inspect.FloatType):
        return choices.pick([float(number), number / 3, number, math.nan])
    return number

"""Arbitrary bytes, or fields that nearly fit, as a message of the bus or the channel.

Byte 0 picks who speaks and who listens, byte 1 whether the rest is the message or tells what to
build. Values of messages are in `typed_values`.
"""

import math

import msgspec
from byte_choices import Choices
from error_texts import check_text
from typed_values import build

from ipc import codec
from ipc.errors import ConversationError, MalformedMessageError
from ipc.messages import AnyMessage
from ipc.permits import PERMITS, Role

PAIRS = [*sorted(PERMITS), (Role.TUN, Role.DNS)]
_ALL = msgspec.inspect.type_info(AnyMessage).types
_KINDS = {
    pair: [info for info in _ALL if info.cls in PERMITS.get(pair, _ALL)] or list(_ALL)
    for pair in PAIRS
}


def check(data: bytes) -> None:
    choices = Choices(data)
    speaker, listener = choices.pick(PAIRS)
    if choices.below(2):
        info = choices.pick(_KINDS[speaker, listener])
        body = msgspec.msgpack.encode(build(info, choices))
    else:
        body = choices.rest()
    try:
        message = codec.decode(body, speaker, listener)
    except ConversationError as error:
        check_text(error)
        return
    assert type(message) in PERMITS[speaker, listener]
    try:
        again = codec.encode(message)
    except MalformedMessageError:
        # Fields that were left out come back, so it may have grown; a full one need not fit.
        assert len(body) > codec.MAX_MESSAGE_BYTES // 16
        return
    # Bytes and not values are compared: a NaN is not equal to itself.
    assert codec.encode(codec.decode(again, speaker, listener)) == again
    assert len(repr(message)) < 64 * (len(body) + 64)
    if speaker is not Role.SUPERVISOR:
        check_numbers(msgspec.to_builtins(message))


def check_numbers(value: object) -> None:
    """No number from a worker is one that cannot be compared or added to a time."""
    if isinstance(value, float):
        assert math.isfinite(value)
    elif isinstance(value, dict):
        for each in value.values():
            check_numbers(each)
    elif isinstance(value, list):
        for each in value:
            check_numbers(each)

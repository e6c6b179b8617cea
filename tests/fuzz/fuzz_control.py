"""A line on the control socket, which any user of the machine may write.

The first byte says whether the rest is the line or tells what to build (`typed_values`).
"""

import msgspec
from byte_choices import Choices
from typed_values import build

from supervisor import control_messages as cm


def check(data: bytes) -> None:
    choices = Choices(data)
    if choices.below(2):
        line = msgspec.json.encode(build(cm.AnyRequest, choices))
    else:
        line = choices.rest()
    try:
        request = cm.decode(line[: cm.MAX_REQUEST_BYTES])
    except msgspec.MsgspecError:
        return
    assert isinstance(request, cm.Request)
    assert cm.decode(cm.encode(request)) == request

"""A line on the socket for connections, from either side, and what is shown of it in a terminal.

Byte 0 picks the side and whether the rest is the line or tells what to build (`typed_values`).
"""

import msgspec
from byte_choices import Choices
from typed_values import build

from ipc import connection_list as c
from supervisor.cli import connection_view
from supervisor.cli.connection_report import Told, ends_of, merge
from supervisor.cli.socket_owners import owners

SIDES = [(c.decode_from_proxy, c.FromProxy), (c.decode_look, c.Look)]
WIDTH = 80


def check(data: bytes) -> None:
    choices = Choices(data)
    kind = choices.below(4)
    decode, whole = SIDES[kind % 2]
    line = choices.rest() if kind < 2 else msgspec.json.encode(build(whole, choices))
    try:
        message = decode(line)
    except msgspec.MsgspecError:
        return
    again = c.encode(message)
    assert again.endswith(b"\n")
    assert again.count(b"\n") == 1
    assert decode(again) == message
    check_shown(message)


def check_shown(message: c.FromProxy | c.Look) -> None:
    targets = [message] if isinstance(message, c.TargetTold) else []
    connections = [message] if isinstance(message, c.ConnectionTold) else []
    found = merge([Told("proxy-0", targets, connections)], {}, [])
    msgspec.json.encode(found)
    for shown in connection_view.lines(found, WIDTH, 1.8e9, has_colour=False):
        assert shown.isprintable()
        assert len(shown) <= WIDTH
    owners([ends_of(connection) for connection in connections])

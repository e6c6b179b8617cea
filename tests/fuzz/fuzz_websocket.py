"""WebSocket frames from a server: any stream in any pieces is read as a slow reader reads the whole.

Layout: see `byte_choices.pieces_of`. The first byte of the stream says whether the stream is raw or
tells an honest server which frames to send.
"""

from byte_choices import Choices, pieces_of

from workers.proxy.websocket import WebSocketClient, WebSocketError


def check(data: bytes) -> None:
    choices = Choices(data)
    is_raw = choices.below(2) == 0
    stream, pieces = pieces_of(choices)
    if is_raw:
        check_stream(stream, pieces)
        return
    sent, framed = honest_server(Choices(stream))
    lengths = [len(piece) for piece in pieces] or [1]
    client = WebSocketClient()
    found, position, number = b"", 0, 0
    while position < len(framed):
        length = lengths[number % len(lengths)]
        found += b"".join(client.feed(framed[position : position + length]))
        position += length
        number += 1
    assert found == sent
    check_encoder(pieces)


def check_stream(stream: bytes, pieces: list[bytes]) -> None:
    client = WebSocketClient()
    found, failed = b"", False
    try:
        for piece in pieces:
            views = client.feed(piece)
            assert all(views), "an empty view"
            found += b"".join(views)
            assert len(client._header) < 10
            assert len(client._control) <= 125
    except WebSocketError:
        failed = True
    payload, is_valid, is_closed, replies = slow_reading(stream)
    assert failed is not is_valid
    if failed:
        # What came in the same piece as the mistake is lost with the connection.
        assert payload.startswith(found)
        return
    assert found == payload
    assert client.is_ended is is_closed
    answer = client.take_replies()
    assert answer == (replies[-1] if replies else b"")
    assert client.take_replies() == b""
    assert client.close() == (b"" if is_closed else client_frame(8, b"\x03\xe8"))


def slow_reading(stream: bytes) -> tuple[bytes, bool, bool, list[bytes]]:
    """(payload, whether all of it keeps to the rules, whether it was closed, what is to be sent).

    A mistake is one as soon as the byte is there that makes it one.
    """
    payload, replies, is_open = b"", [], False
    while stream:
        first, second = stream[0], stream[1] if len(stream) > 1 else 0
        if first & 0x70 or second & 0x80:
            return payload, False, False, replies
        size = {126: 4, 127: 10}.get(second & 127, 2)
        if len(stream) < size:
            break
        length = int.from_bytes(stream[2:size]) if size > 2 else second
        opcode, is_final = first & 15, first & 0x80
        if length >= 2**63 or opcode not in {0, 2, 8, 9, 10}:
            return payload, False, False, replies
        if opcode >= 8 and (length > 125 or not is_final):
            return payload, False, False, replies
        if opcode < 8:
            if is_open != (opcode == 0):
                return payload, False, False, replies
            is_open = not is_final
        body, stream = stream[size : size + length], stream[size + length :]
        if opcode < 8:
            payload += body
        elif len(body) == length:
            if opcode == 9:
                replies.append(client_frame(10, body))
            elif opcode == 8:
                replies.append(client_frame(8, body[:2]))
                return payload, True, True, replies
    return payload, True, False, replies


def client_frame(opcode: int, body: bytes) -> bytes:
    """A frame of at most 125 bytes as a client masks it, with a key of zeros."""
    return bytes([0x80 | opcode, 0x80 | len(body), 0, 0, 0, 0]) + body


def honest_server(choices: Choices) -> tuple[bytes, bytes]:
    """(payload, frames) of a server that sends it in messages, fragments and lengths as chosen."""
    sent, framed, is_open = b"", b"", False
    while choices:
        if choices.below(4) == 3:
            body = choices.take(choices.below(126))
            framed += bytes([0x80 | choices.pick([9, 10]), len(body)]) + body
            continue
        body = choices.take(choices.byte() * choices.pick([1, 1, 3]))
        is_final = choices.below(2)
        start = (0 if is_open else 2) | is_final << 7
        width = choices.pick([1, 2, 8])
        if width == 1 and len(body) < 126:
            head = bytes([start, len(body)])
        elif width == 8:
            head = bytes([start, 127]) + len(body).to_bytes(8)
        else:
            head = bytes([start, 126]) + len(body).to_bytes(2)
        framed += head + body
        sent += body
        is_open = not is_final
    return sent, framed


def check_encoder(pieces: list[bytes]) -> None:
    client = WebSocketClient()
    for piece in pieces:
        frame = client.frame(piece)
        assert frame[0] == 0x82
        size = {126: 4, 127: 10}.get(frame[1] & 127, 2)
        length = int.from_bytes(frame[2:size]) if size > 2 else frame[1] & 127
        assert frame[1] & 0x80
        assert frame[size : size + 4] == bytes(4)
        assert length == len(piece)
        assert frame[size + 4 :] == piece

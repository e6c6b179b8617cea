"""An HTTP answer of a proxy or a load balancer, in any pieces.

Layout: see `byte_choices.pieces_of`. A stream that is cut is read as the whole is.
"""

from byte_choices import Choices, pieces_of
from error_texts import check_text

from workers.proxy.connection_upgrade import ConnectionUpgrade, UpgradeError
from workers.proxy.http_head import MAX_HEAD_BYTES, HttpHead, HttpHeadError, describe

KEY = b"0123456789abcdef"


def check(data: bytes) -> None:
    stream, pieces = pieces_of(Choices(data))
    whole, cut = reading([stream]), reading(pieces)
    assert whole == cut
    upgrade = ConnectionUpgrade("teleport.demo.test", 443, key=KEY)
    assert upgrade.request.endswith(b"\r\n\r\n")
    assert upgrade.request.isascii()
    try:
        rest = upgrade.feed(stream)
    except UpgradeError as error:
        check_text(error)
    else:
        assert rest is None or stream.endswith(rest)


def reading(pieces: list[bytes]) -> object:
    """What came of it: the kind of error, None, or (status, fields, rest)."""
    head, position = HttpHead(), 0
    try:
        for number, piece in enumerate(pieces):
            rest = head.feed(piece)
            position += len(piece)
            if rest is not None:
                assert 100 <= head.status <= 999
                assert describe(head.status).isprintable()
                assert len(head.fields) <= MAX_HEAD_BYTES
                return head.status, head.fields, rest + b"".join(pieces[number + 1 :])
            assert len(head._collected) <= MAX_HEAD_BYTES + len(piece)
    except HttpHeadError as error:
        check_text(error)
        return HttpHeadError
    return None

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.cluster.errors import FramingError
from demo.cluster.framing import PING, FrameDecoder, encode_frame
from demo.cluster.totp import accepts_totp, totp_code


@given(st.lists(st.binary(max_size=50)), st.lists(st.integers(1, 9)))
def test_payload_survives_any_chunks_and_pings_vanish(payloads, sizes):
    wire = b"".join(encode_frame(data) if data else PING for data in payloads)
    decoder = FrameDecoder()
    out, at = b"", 0
    for size in [*sizes, len(wire)]:
        out += decoder.feed(wire[at : at + size])
        at += size
    assert out == b"".join(payloads)
    assert not decoder.is_inside_frame


@pytest.mark.parametrize("wire", [b"\0", b"\0\0\0", b"\0\0\0\2x"])
def test_cut_frame_is_noticed(wire):
    decoder = FrameDecoder()
    decoder.feed(wire)
    assert decoder.is_inside_frame


def test_frame_beyond_the_limit_is_refused():
    with pytest.raises(FramingError):
        FrameDecoder(max_frame_bytes=9).feed(b"\0\0\0\x0a")


def test_empty_data_is_no_frame():
    with pytest.raises(ValueError, match="ping"):
        encode_frame(b"")


# RFC 6238 appendix B, SHA-1, the last six digits; the secret is ASCII "12345678901234567890".
@pytest.mark.parametrize(
    ("seconds", "code"),
    [(59, "287082"), (1111111109, "081804"), (1234567890, "005924"), (20000000000, "353130")],
)
def test_totp_follows_the_rfc(seconds, code):
    secret = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"
    assert totp_code(secret, seconds) == code
    assert accepts_totp(secret, code, seconds + 30)
    assert not accepts_totp(secret, code, seconds + 90)

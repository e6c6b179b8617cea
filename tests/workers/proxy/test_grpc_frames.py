"""Messages of ProxySSH by hand, against the protobuf package."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from workers.proxy.grpc_frames import (
    AGENT,
    MAX_MESSAGE_BYTES,
    MAX_OVERHEAD_BYTES,
    SSH,
    GrpcError,
    MessageReader,
    dial_message,
    frame_head,
    read_frame,
    status_of,
)
from workers.proxy.teleport.pb.transport_pb2 import (
    ClusterDetails,
    Frame,
    ProxySSHRequest,
    ProxySSHResponse,
)

payloads = st.binary(max_size=300)
tags = st.integers(0, 63)
# Fields in any order, known or not, well made or nearly.
fields = st.one_of(
    payloads.map(lambda p: ProxySSHResponse(ssh=Frame(payload=p)).SerializeToString()),
    payloads.map(lambda p: ProxySSHResponse(agent=Frame(payload=p)).SerializeToString()),
    st.just(ProxySSHResponse(details=ClusterDetails(fips_enabled=True)).SerializeToString()),
    st.just(ProxySSHResponse(ssh=Frame()).SerializeToString()),
    st.tuples(tags, st.binary(max_size=4)).map(lambda t: bytes([t[0] << 1 & 0x7F]) + t[1]),
    st.binary(max_size=5),
)


def message_of(data: bytes) -> bytes:
    assert data[0] == 0
    assert int.from_bytes(data[1:5]) == len(data) - 5
    return data[5:]


@given(st.lists(fields, max_size=5).map(b"".join))
@example(bytes.fromhex("0b0c"))  # a group
@example(bytes.fromhex("120412020a00"))
def test_any_message_is_read_as_protobuf_reads_it(message):
    try:
        expected = ProxySSHResponse.FromString(message)
    except DecodeError:
        expected = None
    try:
        kind, payload = read_frame(memoryview(message))
    except GrpcError:
        assert expected is None
        return
    if expected is None:
        return  # it looks into fields that mean nothing here
    which = expected.WhichOneof("frame")
    assert kind == {None: 0, "ssh": SSH, "agent": AGENT}[which]
    assert bytes(payload) == (getattr(expected, which).payload if which else b"")


@given(st.one_of(st.binary(min_size=1, max_size=300), st.integers(1, 70_000).map(bytes)))
def test_frames_are_written_as_protobuf_writes_them(payload):
    for kind, name in ((SSH, "ssh"), (AGENT, "agent")):
        head = frame_head(kind, len(payload))
        assert len(head) <= MAX_OVERHEAD_BYTES
        request = ProxySSHRequest(**{name: Frame(payload=payload)})
        assert message_of(head + payload) == request.SerializeToString()
        assert read_frame(memoryview(message_of(head + payload))) == (kind, payload)


@given(st.text(), st.text())
def test_the_target_is_written_as_protobuf_writes_it(host_port, cluster):
    request = ProxySSHRequest.FromString(message_of(dial_message(host_port, cluster)))
    assert (request.dial_target.host_port, request.dial_target.cluster) == (host_port, cluster)
    assert request.WhichOneof("frame") is None


@given(st.lists(st.binary(max_size=50), max_size=10), st.lists(st.integers(1, 40)))
def test_messages_come_out_whole_whatever_the_pieces(messages, cuts):
    stream = b"".join(b"\0" + len(m).to_bytes(4) + m for m in messages)
    # Room for some of it, sometimes for none.
    reader, found, position = MessageReader(memoryview(bytearray(len(cuts) * 8))), [], 0
    for cut in [*cuts, len(stream)]:
        piece = memoryview(stream)[position : position + cut]
        position += cut
        found += [bytes(m) for m in reader.feed([piece[:3], piece[3:]] if cut % 2 else [piece])]
    assert found == messages
    assert reader.is_between_messages


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (b"\1\0\0\0\0", "compressed"),
        (b"\0" + (MAX_MESSAGE_BYTES + 1).to_bytes(4), f"of {MAX_MESSAGE_BYTES + 1} bytes"),
    ],
)
def test_messages_that_are_not_taken(start, why):
    reader = MessageReader(memoryview(bytearray(100)))
    assert reader.feed([memoryview(start[:4])]) == []
    with pytest.raises(GrpcError, match=why):
        reader.feed([memoryview(start[4:])])


def test_a_large_message_in_tiny_pieces_takes_no_time_to_speak_of():
    reader = MessageReader(memoryview(bytearray(100)))
    reader.feed([memoryview(b"\0" + MAX_MESSAGE_BYTES.to_bytes(4))])
    piece = memoryview(bytes(64))
    for _ in range(MAX_MESSAGE_BYTES // 64 - 1):
        assert reader.feed([piece]) == []
    assert [len(m) for m in reader.feed([piece])] == [MAX_MESSAGE_BYTES]


@pytest.mark.parametrize(
    ("trailers", "expected"),
    [
        ({b"grpc-status": b"5", b"grpc-message": b"no%20node: n%C3%B6"}, (5, "no node: nö")),
        ({b"grpc-status": b"0"}, (0, "")),
        ({b"grpc-status": b"-1"}, (None, "")),
        ({b"grpc-status": b"x", b"grpc-message": b"%ff%zz\xe9"}, (None, "\ufffd%zzé")),
        ({}, (None, "")),
    ],
)
def test_the_status_in_trailers(trailers, expected):
    assert status_of(trailers.items()) == expected

import contextlib
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from message_samples import KINDS, SAMPLES

from ipc import codec
from ipc import messages as m
from ipc.errors import ForbiddenMessageError, MalformedMessageError
from ipc.permits import PERMITS, Role, is_permitted, role_of

PAIRS = [(speaker, listener) for speaker in Role for listener in Role]


def a_permitted_pair(kind: type[m.Message]) -> tuple[Role, Role]:
    return next(pair for pair, kinds in PERMITS.items() if kind in kinds)


def raw(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


def test_samples_cover_every_message():
    assert {type(sample) for sample in SAMPLES} == set(KINDS)


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_message_survives_its_bytes(message):
    speaker, listener = a_permitted_pair(type(message))
    assert codec.decode(codec.encode(message), speaker, listener) == message


@pytest.mark.parametrize(("speaker", "listener"), PAIRS, ids=str)
def test_whatever_the_table_lacks_is_refused(speaker, listener):
    permitted = PERMITS.get((speaker, listener), frozenset())
    for message in SAMPLES:
        data = codec.encode(message)
        if type(message) in permitted:
            assert codec.decode(data, speaker, listener) == message
        else:
            with pytest.raises(ForbiddenMessageError, match=type(message).__name__):
                codec.decode(data, speaker, listener)


def test_each_message_may_be_said_by_somebody():
    assert set(KINDS) == frozenset().union(*PERMITS.values())


def test_workers_of_one_role_and_dns_and_tun_have_nothing_to_say_to_each_other():
    for role in Role:
        assert not any(is_permitted(role, role, sample) for sample in SAMPLES)
    assert (Role.TUN, Role.DNS) not in PERMITS
    assert (Role.DNS, Role.TUN) not in PERMITS


def test_nobody_but_the_supervisor_configures():
    for (speaker, _), kinds in PERMITS.items():
        if speaker is not Role.SUPERVISOR:
            assert not kinds & {m.ConfigureTun, m.ConfigureDns, m.ConfigureProxy, m.Stop}


@pytest.mark.parametrize(("slot", "role"), [("tun", Role.TUN), ("proxy-63", Role.PROXY)])
def test_slot_names_its_role(slot, role):
    assert role_of(slot) is role


@pytest.mark.parametrize("slot", ["", "tun2", "Proxy-1", "-1"])
def test_slot_of_no_role_is_an_error(slot):
    with pytest.raises(ValueError, match="is not a valid Role"):
        role_of(slot)


@pytest.mark.parametrize(
    ("speaker", "data"),
    [
        (Role.PROXY, b""),
        (Role.PROXY, b"\xc1"),  # the one byte MessagePack never uses
        (Role.PROXY, b"\x80"),
        (Role.PROXY, raw(t="Nothing")),
        (Role.PROXY, raw(t="Ready", version=1, extra=1)),
        (Role.PROXY, raw(t="Ready", version="1")),
        (Role.PROXY, raw(t="Ready") + b"\0"),
        (Role.PROXY, raw(t="OpenListener", address=b"12345", port=1)),
        (Role.PROXY, raw(t="OpenListener", address=b"123", port=1)),
        (Role.PROXY, raw(t="CloseListener", address=b"1" * 15, port=1)),
        (Role.PROXY, raw(t="OpenListener", address=b"1234", port=65536)),
        (Role.PROXY, raw(t="OpenListener", address=b"1234", port=-1)),
        (Role.PROXY, raw(t="OpenListener", address="1234", port=1)),
        (Role.TUN, raw(t="Heartbeat", counters={"queries": -1})),
        (Role.TUN, raw(t="Heartbeat", counters={"queries": 2**64 - 1})),
        (Role.TUN, raw(t="Heartbeat", counters={"q" * 65: 1})),
        (Role.TUN, raw(t="Heartbeat", counters={str(number): 1 for number in range(501)})),
        (Role.TUN, raw(t="PeerMisbehaved", slot="../etc", reason="")),
        (Role.TUN, raw(t="PeerMisbehaved", slot="dns\n", reason="")),
        (Role.TUN, raw(t="PeerMisbehaved", slot="dns", reason="r" * 501)),
        (Role.PROXY, raw(t="ClustersReported", clusters=[], problem=b"\xff")),
        (Role.PROXY, b"\x91" * 5000),  # arrays in arrays
        (Role.PROXY, b"\xdf\xff\xff\xff\xff"),  # a map of four thousand million entries
    ],
)
def test_malformed_bytes_are_named_so(speaker, data):
    with pytest.raises(MalformedMessageError):
        codec.decode(data, speaker, Role.SUPERVISOR)


@pytest.mark.parametrize(
    "data", [raw(t="\x1b[2J\n"), raw(t="Ready", **{"\x1b" * 50_000: 1}), raw(t="t" * 50_000)]
)
def test_the_reason_is_one_short_printable_line(data):
    with pytest.raises(MalformedMessageError) as caught:
        codec.decode(data, Role.PROXY, Role.SUPERVISOR)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 200


def test_a_name_that_is_no_utf8_is_malformed():
    data = raw(t="ResolveName", request_id=1, name="aaaa").replace(b"aaaa", b"\xff\xfe\xfd\xfc")
    with pytest.raises(MalformedMessageError):
        codec.decode(data, Role.DNS, Role.PROXY)


def test_message_above_the_cap_is_neither_encoded_nor_decoded():
    big = m.SetLogLevel(level="x" * codec.MAX_MESSAGE_BYTES)
    with pytest.raises(MalformedMessageError, match="SetLogLevel"):
        codec.encode(big)
    with pytest.raises(MalformedMessageError, match="more than a message may have"):
        codec.decode(bytes(codec.MAX_MESSAGE_BYTES + 1), Role.SUPERVISOR, Role.TUN)


def test_message_of_just_the_cap_passes():
    overhead = len(codec.encode(m.SetLogLevel(level="x" * 70_000))) - 70_000
    message = m.SetLogLevel(level="x" * (codec.MAX_MESSAGE_BYTES - overhead))
    data = codec.encode(message)
    assert len(data) == codec.MAX_MESSAGE_BYTES
    assert codec.decode(data, Role.SUPERVISOR, Role.TUN) == message


@given(st.binary(max_size=200), st.sampled_from(PAIRS))
def test_decoder_raises_only_its_own_errors(data, pair):
    with contextlib.suppress(MalformedMessageError, ForbiddenMessageError):
        codec.decode(data, *pair)


def test_100000_random_and_mutated_messages_raise_only_their_own_errors():
    rng = random.Random(20261122)
    encoded = [codec.encode(sample) for sample in SAMPLES]
    decoded = 0
    for number in range(100_000):
        data = bytearray(rng.choice(encoded) if number % 4 else rng.randbytes(rng.randrange(64)))
        for _ in range(rng.randrange(4)):
            mutate(data, rng)
        with contextlib.suppress(MalformedMessageError, ForbiddenMessageError):
            codec.decode(bytes(data), *rng.choice(PAIRS))
            decoded += 1
    assert decoded > 100  # else only the first check was tried


def mutate(data: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(data) + 1)
    match rng.randrange(4):
        case 0:
            data[place : place + 1] = rng.randbytes(1)
        case 1:
            del data[place : place + rng.randrange(1, 9)]
        case 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        case _:
            del data[place:]


def test_keys_of_a_worker_do_not_show_in_its_representation():
    keys = m.BusKeys(public="p" * 40, secret="s" * 40, peers={})
    assert "ssss" not in repr(keys)
    assert "ssss" not in repr(m.UpstreamChanged(upstream=[]))

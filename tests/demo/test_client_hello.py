import ssl

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from demo.cluster.clienthello import ClientHello, parse_client_hello
from demo.cluster.errors import ClientHelloError


def real_hello(server_name, protocols):
    """What OpenSSL sends."""
    context = ssl.create_default_context()
    context.check_hostname = False
    if protocols:
        context.set_alpn_protocols(protocols)
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=server_name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


HELLO = real_hello("teleport.demo.test", ["teleport-tcp-ping", "teleport-tcp"])
EXPECTED = ClientHello("teleport.demo.test", ("teleport-tcp-ping", "teleport-tcp"))


def cut_into_records(record, size):
    body = record[5:]
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"\x16\x03\x01" + len(p).to_bytes(2, "big") + p for p in pieces)


def test_name_and_protocols_are_read_in_order():
    assert parse_client_hello(HELLO) == EXPECTED


def test_hello_without_extensions_of_interest_has_neither():
    assert parse_client_hello(real_hello(None, [])) == ClientHello(None, ())


@pytest.mark.parametrize("size", [1, 7, 100])
def test_hello_may_be_cut_into_records(size):
    assert parse_client_hello(cut_into_records(HELLO, size)) == EXPECTED


def test_every_beginning_of_a_hello_wants_more():
    assert all(parse_client_hello(HELLO[:end]) is None for end in range(len(HELLO)))


def test_bytes_after_the_hello_do_not_matter():
    assert parse_client_hello(HELLO + b"\x14\x03\x03\x00\x01\x01") == EXPECTED


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x02\x00\x00\x05",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
    ],
)
def test_what_is_no_hello_is_refused(data):
    with pytest.raises(ClientHelloError):
        parse_client_hello(data)


def test_hello_that_never_ends_is_refused():
    endless = b"\x16\x03\x01\x40\x00" + b"\x01\x00\x20\x00" + bytes(16380)
    with pytest.raises(ClientHelloError):
        parse_client_hello(endless * 3, limit=4096)


@st.composite
def mutated_hellos(draw):
    data = bytearray(HELLO)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data) - 1))
        data[at] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


@given(mutated_hellos() | st.binary(max_size=400) | st.binary().map(b"\x16\x03\x01".__add__))
@example(b"")
def test_any_bytes_raise_only_its_own_error(data):
    try:
        result = parse_client_hello(data)
    except ClientHelloError:
        return
    assert result is None or isinstance(result, ClientHello)

"""Programs and nodes that do not keep to the protocol: a clear end, bounded memory, nothing left."""

import contextlib
import os
import random
import socket
import struct
import threading
import time
from pathlib import Path

import paramiko
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import mlkem
from ssh_bed import DEADLINE_SECONDS, NAME, Cluster, Gateway, until
from ssh_raw_peers import RawClient, RawNode, ScriptedPeer, until_closed

from workers.proxy.layers import Plain
from workers.proxy.relay import RelayEnd
from workers.proxy.ssh import messages
from workers.proxy.ssh.codec import PLAIN_BYTES, PacketReader, PacketWriter
from workers.proxy.ssh.messages import string
from workers.proxy.ssh.session import SshSession, SshSettings, _Phase

VERSION = b"SSH-2.0-Test\r\n"
IMPATIENT = SshSettings(
    login_seconds=0.4, node_seconds=0.4, refused_seconds=0.4, linger_seconds=0.4
)
U32 = struct.Struct(">I").pack


@pytest.fixture
def cluster():
    return Cluster()


@pytest.fixture
def gateway(cluster, tmp_path):
    """A node that only says its version, and hears everything."""
    settings = SshSettings(linger_seconds=0.3)
    with (
        ScriptedPeer(greets_and_listens) as node,
        Gateway(tmp_path, node.port, cluster, settings) as gateway,
    ):
        threads = threading.active_count()
        yield gateway
        until(lambda: gateway.call(len, gateway.reactor) == 0)
        until(lambda: threading.active_count() <= threads)  # those of the test's own ends


def greets_and_listens(connection):
    connection.sendall(VERSION)
    until_closed(connection)


def trusted(gateway):
    return paramiko.Ed25519Key.from_private_key_file(str(gateway.directory / "id_vnet"))


def connected(gateway):
    return socket.create_connection(("127.0.0.1", gateway.port), DEADLINE_SECONDS)


def clear_packet(payload):
    return PacketWriter().pack(payload)


IGNORED = clear_packet(b"\x02" + string(b"x"))
KEYS = "ssh-ed25519,ssh-ed25519-cert-v01@openssh.com"


def kexinit(names=("curve25519-sha256", KEYS), follows=0):
    """Offers what we take, of a client or a server."""
    names = [
        *names,
        *["aes128-ctr"] * 2,
        *["hmac-sha2-256"] * 2,
        *["none"] * 2,
        *[""] * 2,
    ]
    return (
        b"\x14"
        + bytes(16)
        + b"".join(string(x.encode()) for x in names)
        + bytes([follows, *bytes(4)])
    )


def strict(side):
    return f"curve25519-sha256,kex-strict-{side}-v00@openssh.com", KEYS


def random_packets(count, seed=1):
    chance = random.Random(seed)
    numbers = [n for n in range(1, 256) if n not in {1, 20}]
    return b"".join(
        clear_packet(bytes([chance.choice(numbers)]) + chance.randbytes(chance.randrange(60)))
        for _ in range(count)
    )


PROGRAMS = {
    "something else": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "something else first"),
    "garbage": (bytes(range(128, 256)), "something else first"),
    "an endless line": (b"SSH-2.0-" + b"x" * 100_000, "a line without an end"),
    "a long version": (b"SSH-2.0-" + b"x" * 300 + b"\r\n", "version is too long"),
    "version 1": (b"SSH-1.5-old\r\n", "not 2.0"),
    "a version with control characters": (b"SSH-2.0-a\x1b[2J\r\n", "control characters"),
    "a version that is no text": (b"SSH-2.0-\xff\xfe\r\n", "not ASCII"),
    "a huge packet": (VERSION + b"\xff\xff\xff\xf4", "a packet of 4294967284 bytes"),
    "an impossible packet": (VERSION + U32(13), "which no packet has"),
    "wrong padding": (VERSION + U32(12) + b"\x0c" + bytes(11), "wrong padding"),
    "no key exchange": (VERSION + clear_packet(b"\x32" + bytes(40)), "message 50 during"),
    "a channel": (VERSION + clear_packet(b"\x5a" + bytes(40)), "message 90 before the login"),
    "data": (VERSION + clear_packet(b"\x5e" + bytes(8)), "message 94 before the login"),
    "keys at once": (VERSION + clear_packet(b"\x15"), "message 21 during"),
    "nothing in common": (
        VERSION + clear_packet(kexinit().replace(b"curve25519-sha256", b"curve25519-sha257")),
        "no acceptable kex algorithm",
    ),
    "a broken offer": (VERSION + clear_packet(b"\x14" + bytes(20) + b"\xff" * 9), "the program"),
    "a second offer": (
        VERSION + clear_packet(kexinit()) * 2,
        "message 20 during the key exchange",
    ),
    "a broken key": (
        VERSION + clear_packet(kexinit()) + clear_packet(b"\x1e" + string(b"short")),
        "malformed",
    ),
    "the neutral point as a key": (
        VERSION + clear_packet(kexinit()) + clear_packet(b"\x1e" + string(bytes(32))),
        "the program",
    ),
    # What CVE-2023-48795 does to a connection (OpenSSH, PROTOCOL, section 1.10).
    "something before a strict offer": (
        VERSION + IGNORED + clear_packet(kexinit(strict("c"))),
        "KEXINIT was not the first packet",
    ),
    "something behind a strict offer": (
        VERSION + clear_packet(kexinit(strict("c"))) + IGNORED,
        "In strict-kex mode, but was sent",
    ),
    "10,000 random packets": (VERSION + random_packets(10_000), "the program sent"),
    "10,000 packets to be ignored": (
        VERSION + IGNORED * 10_000,
        "too many messages before the login",
    ),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_program_that_talks_nonsense(case, gateway, cluster):
    data, text = PROGRAMS[case]
    with connected(gateway) as connection:
        try:
            connection.sendall(data)
            until_closed(connection)
        except ConnectionError:
            pass  # it was reset while we wrote
        outcome = gateway.ended()
    assert outcome.end is RelayEnd.BROKEN
    assert text in outcome.error
    assert outcome.error.isprintable()
    assert cluster.asked == []


def test_what_is_wrong_is_said_where_it_can_be_understood(gateway):
    with connected(gateway) as connection:
        connection.sendall(VERSION + clear_packet(b"\x5a" + bytes(40)))
        answer = until_closed(connection)
    assert answer.startswith(b"SSH-2.0-VNet\r\n")
    assert b"VNet: the program sent message 90 before the login" in answer


@pytest.mark.parametrize("length", [0, 5, len(VERSION), len(VERSION) + 30, len(VERSION) + 400])
def test_a_program_that_is_cut_off_on_its_way(length, gateway):
    data = VERSION + clear_packet(kexinit()) + clear_packet(b"\x1e" + string(os.urandom(32)))
    with connected(gateway) as connection:
        connection.sendall(data[:length])
    assert gateway.ended().end in {RelayEnd.PROGRAM_CLOSED, RelayEnd.PROGRAM_RESET}


GUESSED = "mlkem768x25519-sha256,curve25519-sha256", "ssh-ed25519-cert-v01@openssh.com,ssh-ed25519"


@pytest.mark.parametrize("is_right", [False, True])
def test_a_program_that_guesses_the_key_exchange(is_right, gateway):
    """As dropbear does: it sends its key behind its offer, without waiting for ours."""
    names = GUESSED if is_right else ("curve25519-sha256", GUESSED[1])
    offer = kexinit(names, follows=1)
    key = os.urandom(32)
    if is_right:
        pair = mlkem.MLKEM768PrivateKey.generate().public_key().public_bytes_raw()
        tries = [b"\x1e" + string(pair + key)]
    else:
        tries = [b"\x1ethe wrong guess", b"\x1e" + string(key)]
    with connected(gateway) as connection:
        connection.sendall(VERSION + b"".join(map(clear_packet, [offer, *tries])))
        reader, plain = PacketReader(), memoryview(bytearray(PLAIN_BYTES))
        seen = b""
        while not seen.endswith(b"\n"):
            seen += connection.recv(1)
        numbers = []
        while 21 not in numbers:
            data = connection.recv(1 << 16)
            assert data, numbers
            reader.feed(memoryview(data))
            while 21 not in numbers and reader.next(plain) >= 0:
                numbers.append(plain[1])
            reader.keep()
    assert numbers == [20, 31, 21]


def test_a_program_that_says_nothing(cluster, tmp_path):
    with (
        ScriptedPeer(greets_and_listens) as node,
        Gateway(tmp_path, node.port, cluster, IMPATIENT) as gateway,
        connected(gateway) as connection,
    ):
        assert until_closed(connection).startswith(b"SSH-2.0-VNet\r\n")
        assert gateway.ended().error == "the program did not log in in time"


def test_a_program_that_sends_single_bytes_gets_in(cluster, tmp_path):
    """A client behind something that cuts its stream into pieces."""
    with RawNode(cluster) as node, Gateway(tmp_path, node.port, cluster) as gateway:
        pieces = socket.create_server(("127.0.0.1", 0))

        def cut():
            near, _ = pieces.accept()
            far = connected(gateway)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=pass_on, args=(far, near, 1 << 16), daemon=True).start()
            pass_on(near, far, 1)

        thread = threading.Thread(target=cut, daemon=True)
        thread.start()
        with RawClient(pieces.getsockname()[1], trusted(gateway)) as client:
            client.send(b"\x50" + string(b"x") + b"\1")
            assert node.take() == b"\x50" + string(b"x") + b"\1"
        thread.join(DEADLINE_SECONDS)
        pieces.close()


def pass_on(source, target, size):
    try:
        while data := source.recv(size):
            target.sendall(data)
    except OSError:
        pass
    finally:
        source.close()
        target.close()


NODES = {
    "garbage": (bytes(range(128, 256)) * 100, "a line without an end"),
    "an endless line": (b"x" * 100_000, "a line without an end"),
    "endless lines": (b"a line\r\n" * 100_000, "too much before its version"),
    "version 1": (b"SSH-1.5-old\r\n", "not 2.0"),
    "a huge packet": (VERSION + b"\xff\xff\xff\xf4", "a packet of 4294967284 bytes"),
    "10,000 random packets": (VERSION + random_packets(10_000), "the node sent"),
    "an answer to nothing": (VERSION + clear_packet(b"\x34"), "message 52 during"),
    "a channel": (VERSION + clear_packet(b"\x5a" + bytes(40)), "message 90 before the login"),
    "the end at once": (b"", "closed the connection"),
    "the end after its version": (VERSION, "closed the connection"),
    "the end after its offer": (VERSION + clear_packet(kexinit()), "closed the connection"),
    "something before a strict offer": (
        VERSION + IGNORED + clear_packet(kexinit(strict("s"))),
        "KEXINIT was not the first packet",
    ),
    "something behind a strict offer": (
        VERSION + clear_packet(kexinit(strict("s"))) + IGNORED,
        "In strict-kex mode, but was sent",
    ),
    "a goodbye": (
        VERSION + clear_packet(b"\x01" + U32(12) + string(b"too many\x1b users") + string(b"")),
        "the node ended the connection: too many users",
    ),
    "a broken host key": (
        VERSION
        + clear_packet(kexinit())
        + clear_packet(b"\x1f" + string(b"key") + string(os.urandom(32)) + string(b"signature")),
        "the node cannot be trusted: its host certificate cannot be read",
    ),
}


@pytest.mark.parametrize("case", NODES)
def test_a_node_that_talks_nonsense_is_told_of_when_the_program_logs_in(case, cluster, tmp_path):
    data, text = NODES[case]
    with (
        ScriptedPeer(lambda connection: connection.sendall(data)) as node,
        Gateway(tmp_path, node.port, cluster) as gateway,
    ):
        with RawClient(gateway.port, None) as client:
            with pytest.raises(paramiko.AuthenticationException):
                client.transport.auth_publickey("root", trusted(gateway))
            banner = client.transport.get_banner().decode()
        outcome = gateway.ended()
        assert text in outcome.error or "connection to the node broke" in outcome.error
        assert banner == f"VNet: {outcome.error}\n"
        assert cluster.asked == []  # nobody is asked for a second factor in vain
        assert outcome.end is RelayEnd.BROKEN
        until(lambda: gateway.call(len, gateway.reactor) == 0)


def test_a_node_that_says_nothing(cluster, tmp_path):
    with (
        ScriptedPeer(until_closed) as node,
        Gateway(tmp_path, node.port, cluster, SshSettings(node_seconds=0.3)) as gateway,
        RawClient(gateway.port, None) as client,
    ):
        until(gateway.sessions[0]._node_answer.done)
        with pytest.raises(paramiko.AuthenticationException):
            client.transport.auth_publickey("root", trusted(gateway))
        assert client.transport.get_banner() == (
            b"VNet: the node does not answer the key exchange\n"
        )


def test_a_node_that_lets_in_and_goes_has_not_let_in(cluster, tmp_path, monkeypatch):
    """Its end is noticed before the program has been told."""
    after = SshSession._after_node_message

    def answered_and_gone(session):
        after(session)
        if session._node_answer.done():
            session._on_end_of(session._upstream, session._local)

    monkeypatch.setattr(SshSession, "_after_node_message", answered_and_gone)
    with RawNode(cluster) as node, Gateway(tmp_path, node.port, cluster) as gateway:
        client = RawClient(gateway.port, None)
        with client, pytest.raises(paramiko.AuthenticationException):
            client.transport.auth_publickey("root", trusted(gateway))
        assert "closed the connection" in gateway.ended().error


def test_lines_before_the_node_s_version_are_skipped(cluster, tmp_path):
    def greet(connection):
        connection.sendall(b"Welcome\r\nto this\nnode\r\n" + VERSION)
        seen.append(connection.recv(1 << 16))
        until_closed(connection)

    seen = []
    with (
        ScriptedPeer(greet) as node,
        Gateway(tmp_path, node.port, cluster) as gateway,
        RawClient(gateway.port, None),
    ):
        until(lambda: gateway.sessions[0]._upstream.version is None)
        assert not gateway.sessions[0]._node_ready.done()
    assert seen[0].startswith(b"SSH-2.0-VNet\r\n")  # without having been waited for


# Both logged in.


@pytest.fixture
def pair(cluster, tmp_path):
    with (
        RawNode(cluster) as node,
        Gateway(tmp_path, node.port, cluster) as gateway,
        RawClient(gateway.port, trusted(gateway)) as client,
    ):
        yield client, node, gateway


OPEN = b"\x5a" + string(b"a type of tomorrow") + U32(7) + U32(1 << 20) + U32(1 << 15) + b"extra"


def test_connection_messages_pass_as_they_are(pair):
    client, node, _ = pair
    passed = [
        OPEN,
        b"\x50" + string(b"keepalive@openssh.com") + b"\1",
        b"\x50" + string(b"no-more-sessions@openssh.com") + b"\0",
        b"\x51" + U32(8022),
        b"\x52",
        b"\x5b" + U32(1) + U32(2) + U32(3) + U32(4) + b"more",
        b"\x5c" + U32(1) + U32(2) + string(b"no") + string(b""),
        b"\x5d" + U32(1) + U32(2**32 - 1),
        b"\x5e" + U32(2**32 - 1) + string(b""),
        b"\x5f" + U32(1) + U32(1) + string(b"error"),
        b"\x60" + U32(0),
        b"\x61" + U32(0),
        b"\x62" + U32(0) + string(b"signal") + b"\0" + string(b"TERM"),
        b"\x63" + U32(0),
        b"\x64" + U32(0),
        b"\x53whatever",
        b"\x5e" + U32(5) + string(os.urandom(200_000)),
        b"\x5e" + U32(5) + string(b"last"),
    ]
    for source, target in ((client, node), (node, client)):
        source.send(*passed)
        assert [target.take() for _ in passed] == passed


def test_a_node_s_host_keys_are_kept_from_the_program(pair):
    client, node, _ = pair
    keys = string(b"hostkeys-00@openssh.com")
    node.send(b"\x50" + keys + b"\0" + string(b"key"), b"\x50" + string(b"next") + b"\1")
    assert client.take() == b"\x50" + string(b"next") + b"\1"
    # One that wants a reply is replaced, so that the replies keep their order.
    node.send(b"\x50" + keys + b"\1" + string(b"key"))
    assert client.take() == b"\x50" + string(b"nothing@vnet") + b"\1"
    client.send(b"\x50" + keys + b"\0")  # in the other direction it is anybody's
    assert node.take() == b"\x50" + keys + b"\0"


def test_other_messages_are_not_passed_on(pair):
    client, node, _ = pair
    for number in (2, 3, 4, 101, 192, 255):
        client.send(bytes([number]) + string(b"text") + bytes(8))
    client.send(b"\x5e" + U32(5) + string(b"last"))
    assert node.take() == b"\x5e" + U32(5) + string(b"last")
    assert node.is_quiet()


MALFORMED = [
    b"\x5e",
    b"\x5e" + U32(1),
    b"\x5e" + U32(1) + U32(5) + b"four",
    b"\x5e" + U32(1) + string(b"data") + b"more",
    b"\x5f" + U32(1) + U32(1),
    b"\x50" + string(b"name"),
    b"\x50" + string(b"n" * 2000) + b"\0",
    b"\x5a" + string(b"session") + U32(1) + U32(2),
    b"\x5a\xff\xff\xff\xff",
    b"\x5b" + U32(1) * 3,
    b"\x5c" + U32(1) * 2,
    b"\x5d" + U32(1),
    b"\x60\0\0",
    b"\x62" + U32(1) + string(b"exec"),
]


@pytest.mark.parametrize("payload", MALFORMED, ids=lambda payload: payload[:8].hex())
@pytest.mark.parametrize("side", ["the program", "the node"])
def test_malformed_connection_messages_end_the_session(side, payload, pair):
    client, node, gateway = pair
    source, target = (client, node) if side == "the program" else (node, client)
    source.send(b"\x60" + U32(9), payload)
    assert target.take() == b"\x60" + U32(9)  # what came before arrives
    source.gone()
    target.gone()
    outcome = gateway.ended()
    assert outcome.end is RelayEnd.BROKEN
    assert outcome.error == f"{side} sent a malformed message {payload[0]}"


def test_a_goodbye_is_passed_on_behind_the_data(pair):
    client, node, gateway = pair
    data = b"\x5e" + U32(5) + string(os.urandom(30_000))
    goodbye = messages.disconnect(messages.BY_APPLICATION, "I am off")
    said = []
    node.transport._parse_disconnect = lambda message: said.append(message.asbytes())
    client.send(*[data] * 50, goodbye)
    assert [node.take() for _ in range(50)] == [data] * 50
    node.gone()
    assert b"I am off" in said[0]
    assert gateway.ended().end is RelayEnd.PROGRAM_CLOSED


@pytest.mark.parametrize("side", ["program", "node"])
def test_a_side_that_closes_without_a_word_ends_the_other_behind_the_data(side, pair):
    client, node, gateway = pair
    source, target = (client, node) if side == "program" else (node, client)
    data = b"\x5e" + U32(5) + string(os.urandom(30_000))
    source.send(*[data] * 50)
    source.transport.sock.shutdown(socket.SHUT_WR)
    assert [target.take() for _ in range(50)] == [data] * 50
    target.gone()
    assert (
        gateway.ended().end
        is {
            "program": RelayEnd.PROGRAM_CLOSED,
            "node": RelayEnd.APP_CLOSED,
        }[side]
    )


CREDIT = b"credit"


class Narrow(Plain):
    """A layer whose far end allows nothing from the moment it is shut until it gives credit."""

    def __init__(self):
        self.is_shut = False
        self._kept = b""

    @property
    def pending_bytes(self):
        return len(self._kept)

    def decrypt(self, records):
        if bytes(records) != CREDIT:
            return memoryview(records)
        self.is_shut = False
        return memoryview(b"")

    def encrypt(self, data):
        if not self.is_shut:
            return data
        self._kept += data
        return b""

    def take_records(self):
        if self.is_shut:
            return b""
        kept, self._kept = self._kept, b""
        return kept


@pytest.mark.parametrize(("count", "has_gone"), [(30, False), (2, True)])
def test_what_the_far_end_does_not_allow_yet_is_sent_when_it_does(
    count, has_gone, cluster, tmp_path
):
    """More than may wait; or less, and the program has gone: then the end follows at once."""
    layers, settings = [], SshSettings(linger_seconds=10 * DEADLINE_SECONDS)

    def narrow():
        layers.append(Narrow())
        return layers[0]

    with (
        RawNode(cluster) as node,
        Gateway(tmp_path, node.port, cluster, settings, narrow) as gateway,
        RawClient(gateway.port, trusted(gateway)) as client,
    ):
        layers[0].is_shut = True
        data = b"\x5e" + U32(5) + string(os.urandom(30_000))
        client.send(*[data] * count)
        if has_gone:
            client.transport.sock.shutdown(socket.SHUT_WR)
            until(lambda: gateway.sessions[0]._phase is _Phase.ENDING)
        else:
            until(lambda: gateway.sessions[0]._upstream.pending_bytes > 512 * 1024)
        assert node.is_quiet()
        node.transport.sock.sendall(CREDIT)
        assert [node.take() for _ in range(count)] == [data] * count
        if has_gone:
            node.gone()
            assert gateway.ended().end is RelayEnd.PROGRAM_CLOSED


class Talkative(Narrow):
    """A layer that answers whatever comes from the moment it is shut."""

    def decrypt(self, records):
        return memoryview(b"") if self.is_shut else memoryview(records)

    def take_records(self):
        return bytes(100_000) if self.is_shut else b""


def test_a_far_end_that_wants_answers_of_the_layer_and_reads_none_costs_bounded_memory(
    cluster, tmp_path
):
    layers = []

    def talkative():
        layers.append(Talkative())
        return layers[0]

    with (
        RawNode(cluster) as node,
        Gateway(tmp_path, node.port, cluster, SshSettings(), talkative) as gateway,
        RawClient(gateway.port, trusted(gateway)) as client,
    ):
        node.stop_reading()
        client.send(b"\x5e" + U32(5) + string(b"the last that is read"))
        node.take()
        layers[0].is_shut = True

        def send_on():
            with contextlib.suppress(OSError):
                node.transport.sock.sendall(b"ping")
            return gateway.outcomes

        until(send_on)
        assert gateway.ended().end is RelayEnd.BROKEN
        assert "does not read" in gateway.ended().error


@pytest.mark.parametrize("side", ["program", "node"])
def test_a_side_that_never_reads_costs_bounded_memory(side, pair):
    """Its peer sends as if the windows were endless."""
    client, node, gateway = pair
    source, target = (node, client) if side == "program" else (client, node)
    target.stop_reading()
    data = b"\x5e" + U32(5) + string(bytes(32_000))
    sent = []

    def send_for_ever():
        try:
            while True:
                source.send(data)
                sent.append(len(data))
        except Exception:  # noqa: BLE001 - the connection is closed at the end
            return

    threading.Thread(target=send_for_ever, daemon=True).start()
    session = gateway.sessions[0]
    leg = session._local if side == "program" else session._upstream
    until(lambda: leg.pending_bytes > 0)
    before = psutil.Process().memory_info().rss
    until(lambda: is_stuck(sent))
    settings = SshSettings()
    assert leg.pending_bytes <= settings.max_pending_bytes + 2 * 256 * 1024
    assert psutil.Process().memory_info().rss < before + 64 * 1024 * 1024
    gateway.call(session.abort)
    source.gone()


def is_stuck(sent):
    before = len(sent)
    time.sleep(0.3)
    return before and len(sent) == before


def test_both_sides_may_change_keys_in_the_middle_of_everything(pair):
    client, node, gateway = pair
    data = [b"\x5e" + U32(n) + string(os.urandom(20_000)) for n in range(40)]

    def send(transport):
        for payload in data:
            transport._send_user_message(paramiko.Message(payload))

    def change_keys(transport):
        for _ in range(5):
            transport.renegotiate_keys()

    threads = [
        threading.Thread(target=work, args=(peer.transport,))
        for peer in (client, node)
        for work in (send, change_keys)
    ]
    for thread in threads:
        thread.start()
    for target in (client, node):
        assert [target.take() for _ in data] == data
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive()
    assert not gateway.outcomes


def test_many_sessions_leave_nothing(cluster, tmp_path):
    rounds = []
    with (
        ScriptedPeerForMany(greets_and_listens) as node,
        Gateway(tmp_path, node.port, cluster) as gateway,
    ):
        for _ in range(2):
            connections = [connected(gateway) for _ in range(100)]
            for connection in connections:
                connection.sendall(VERSION + clear_packet(kexinit()))
            for connection in connections:
                connection.close()
            gateway.ended(100 * (len(rounds) + 1))
            until(lambda: gateway.call(len, gateway.reactor) == 0)
            gateway.sessions.clear()
            until(lambda: node.open == 0)
            rounds.append(len(list(Path("/proc/self/fd").iterdir())))
    assert rounds[1] <= rounds[0]
    assert gateway.identity.looked_up.count(NAME) == 200


class ScriptedPeerForMany:
    """As `ScriptedPeer`, for any number of connections."""

    def __init__(self, act):
        self._act = act
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listener.getsockname()[1]
        self.open = 0
        self._lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.open += 1
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection):
        connection.settimeout(DEADLINE_SECONDS)
        try:
            with connection:
                self._act(connection)
        except OSError:
            pass
        with self._lock:
            self.open -= 1

"""The bus over real ZeroMQ sockets in a directory of the test's own."""

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
import zmq

from ipc import codec
from ipc import messages as m
from ipc.bus import HIGH_WATER_MARK, BusClient, BusContext, BusServer, Sender
from ipc.curve import make_key_pair
from ipc.errors import (
    BusyError,
    ConversationError,
    ForbiddenMessageError,
    MalformedMessageError,
    PeerGoneError,
)

DEADLINE_SECONDS = 20.0
SLOTS = ("tun", "dns", "proxy-0", "proxy-1")
QUESTION = m.ResolveName(request_id=1, name="pg.example.test")
ANSWER = m.NameResolved(request_id=1, outcome=m.NameOutcome.NOT_OURS)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # polled: the handshakes run in libzmq's threads
            await asyncio.sleep(0.002)


class Peer:
    """One worker slot on the bus, and what it heard."""

    def __init__(self, bed: "Bed", slot: str) -> None:
        self.slot = slot
        self.heard: list[tuple[str, m.AnyMessage]] = []
        self.breaches: list[tuple[str, ConversationError]] = []
        self.connects = self.disconnects = 0
        self.senders: list[Sender] = []  # of what was heard as a server
        self.context = BusContext(bed.directory, slot, bed.keys_of(slot))

    def serve(self) -> BusServer:
        return self.context.serve(self._hear_sender, self._note_breach)

    def join(self, server: str) -> BusClient:
        return self.context.join(
            server,
            lambda message: self._hear(server, message),
            self._note_breach,
            self._connected,
            self._disconnected,
        )

    def _hear_sender(self, sender: Sender, message: m.AnyMessage) -> None:
        self.senders.append(sender)
        self._hear(sender.slot, message)

    def sender(self, slot: str) -> Sender:
        """Who spoke last for a slot."""
        return next(sender for sender in reversed(self.senders) if sender.slot == slot)

    def _hear(self, slot: str, message: m.AnyMessage) -> None:
        self.heard.append((slot, message))

    def _note_breach(self, slot: str, error: ConversationError) -> None:
        self.breaches.append((slot, error))

    def _connected(self) -> None:
        self.connects += 1

    def _disconnected(self) -> None:
        self.disconnects += 1


class Bed:
    """A bus directory with keys for four slots."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pairs = {slot: make_key_pair() for slot in SLOTS}
        self._peers: list[Peer] = []

    def keys_of(self, slot: str) -> m.BusKeys:
        public, secret = self.pairs[slot]
        peers = {other: pair[0] for other, pair in self.pairs.items() if other != slot}
        return m.BusKeys(public=public, secret=secret, peers=peers)

    def peer(self, slot: str) -> Peer:
        peer = Peer(self, slot)
        self._peers.append(peer)
        return peer

    @contextlib.contextmanager
    def raw_client(self, server: str, keys: tuple[str, str]):
        """A DEALER without any of our code, with whatever keys."""
        context = zmq.Context()
        try:
            with context.socket(zmq.DEALER) as client:
                client.linger = 0
                client.curve_publickey, client.curve_secretkey = (key.encode() for key in keys)
                client.curve_serverkey = self.pairs[server][0].encode()
                client.connect(f"ipc://{self.directory / server}")
                yield client
        finally:
            context.destroy(linger=0)

    def close(self) -> None:
        for peer in self._peers:
            peer.context.close()


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def run_in_bed(tmp_path: Path, scenario) -> None:
    """Runs `await scenario(bed)` and checks that nothing is left open."""

    async def main() -> None:
        bed = Bed(tmp_path)
        try:
            await scenario(bed)
        finally:
            bed.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))  # what uvloop opens once
        before, threads = open_descriptors(), threading.active_count()
        runner.run(main())
        deadline = time.monotonic() + DEADLINE_SECONDS
        while open_descriptors() > before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert threading.active_count() <= threads  # one of a test before may have ended


def test_client_and_server_talk_both_ways(tmp_path):
    async def scenario(bed: Bed) -> None:
        proxy, dns = bed.peer("proxy-0"), bed.peer("dns")
        server, client = proxy.serve(), dns.join("proxy-0")
        client.send(QUESTION)
        await until(lambda: proxy.heard)
        assert proxy.heard == [("dns", QUESTION)]
        server.send(proxy.sender("dns"), ANSWER)
        await until(lambda: dns.heard)
        assert dns.heard == [("proxy-0", ANSWER)]
        assert dns.connects == 1
        assert not proxy.breaches
        assert not dns.breaches

    run_in_bed(tmp_path, scenario)


def test_many_messages_keep_their_order(tmp_path):
    async def scenario(bed: Bed) -> None:
        proxy, dns = bed.peer("proxy-0"), bed.peer("dns")
        proxy.serve()
        client = dns.join("proxy-0")
        wanted = [m.ResolveName(request_id=number, name="a.test") for number in range(2000)]
        for message in wanted:
            client.send(message)
        await until(lambda: len(proxy.heard) == len(wanted))
        assert [message for _, message in proxy.heard] == wanted

    run_in_bed(tmp_path, scenario)


def test_server_tells_its_clients_apart(tmp_path):
    async def scenario(bed: Bed) -> None:
        tun = bed.peer("tun")
        server = tun.serve()
        proxies = [bed.peer("proxy-0"), bed.peer("proxy-1")]
        for proxy in proxies:
            proxy.join("tun").send(m.ProxyHello())
        await until(lambda: len(tun.heard) == 2)
        for proxy in proxies:
            server.send(tun.sender(proxy.slot), m.DialAbandoned(flow_id=int(proxy.slot[-1])))
        await until(lambda: all(proxy.heard for proxy in proxies))
        assert [proxy.heard[0][1].flow_id for proxy in proxies] == [0, 1]

    run_in_bed(tmp_path, scenario)


@pytest.mark.parametrize("whose_public", ["own", "stolen"])
def test_client_with_an_unknown_key_gets_nothing_through(tmp_path, whose_public):
    async def scenario(bed: Bed) -> None:
        proxy, dns = bed.peer("proxy-0"), bed.peer("dns")
        proxy.serve()
        stranger = make_key_pair()
        # The public key of dns is no secret among workers; without its secret it opens nothing.
        public = stranger[0] if whose_public == "own" else bed.pairs["dns"][0]
        with bed.raw_client("proxy-0", (public, stranger[1])) as client:
            for _ in range(20):
                client.send(codec.encode(QUESTION), zmq.NOBLOCK)
            # One who may speak is heard meanwhile, later than the stranger was refused.
            dns.join("proxy-0").send(QUESTION)
            await until(lambda: proxy.heard)
            dns.join("proxy-0").send(QUESTION)
            await until(lambda: len(proxy.heard) == 2)
        assert [slot for slot, _ in proxy.heard] == ["dns", "dns"]
        assert not proxy.breaches

    run_in_bed(tmp_path, scenario)


def test_client_that_knows_another_server_key_is_not_fooled(tmp_path):
    async def scenario(bed: Bed) -> None:
        impostor, dns = bed.peer("proxy-0"), bed.peer("dns")
        impostor.serve()
        # dns looks for proxy-1, and finds proxy-0 on its path.
        (tmp_path / "proxy-1").symlink_to(tmp_path / "proxy-0")
        dns.join("proxy-1").send(QUESTION)
        honest = bed.peer("tun")
        honest.serve()
        bed.peer("proxy-1").join("tun").send(m.ProxyHello())
        await until(lambda: honest.heard)
        assert {sender.slot for sender in honest.senders} == {"proxy-1"}
        assert not impostor.heard
        assert not dns.connects
        assert not dns.disconnects

    run_in_bed(tmp_path, scenario)


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        ([codec.encode(m.ProxyHello())], ForbiddenMessageError),
        ([codec.encode(m.Stop(grace_seconds=1))], ForbiddenMessageError),
        ([b"\xc1garbage"], MalformedMessageError),
        ([b""], MalformedMessageError),
        ([b"", codec.encode(QUESTION)], ForbiddenMessageError),
        ([b"proxy-1", b"", codec.encode(QUESTION)], ForbiddenMessageError),
    ],
)
def test_breach_is_told_with_the_slot_of_the_key(tmp_path, frames, error):
    async def scenario(bed: Bed) -> None:
        proxy = bed.peer("proxy-0")
        proxy.serve()
        with bed.raw_client("proxy-0", bed.pairs["dns"]) as client:
            client.send_multipart(frames)
            await until(lambda: proxy.breaches)
        [(slot, found)] = proxy.breaches
        assert slot == "dns"
        assert type(found) is error
        assert not proxy.heard

    run_in_bed(tmp_path, scenario)


@pytest.mark.parametrize("identity", [b"tun", b"proxy-1", b"x" * 255])
def test_client_is_who_its_key_says_whatever_it_calls_itself(tmp_path, identity):
    async def scenario(bed: Bed) -> None:
        proxy, tun = bed.peer("proxy-0"), bed.peer("tun")
        proxy.serve()
        tun.join("proxy-0")
        with bed.raw_client("proxy-0", bed.pairs["dns"]) as client:
            client.close()
        context = zmq.Context()
        try:
            client = context.socket(zmq.DEALER)
            client.linger = 0
            client.setsockopt(zmq.ROUTING_ID, identity)
            client.curve_publickey, client.curve_secretkey = (
                key.encode() for key in bed.pairs["dns"]
            )
            client.curve_serverkey = bed.pairs["proxy-0"][0].encode()
            client.connect(f"ipc://{tmp_path / 'proxy-0'}")
            client.send(codec.encode(QUESTION))
            await until(lambda: proxy.heard)
            assert proxy.heard == [("dns", QUESTION)]
        finally:
            context.destroy(linger=0)

    run_in_bed(tmp_path, scenario)


def test_message_above_the_cap_never_reaches_the_server(tmp_path):
    async def scenario(bed: Bed) -> None:
        proxy, dns = bed.peer("proxy-0"), bed.peer("dns")
        proxy.serve()
        with bed.raw_client("proxy-0", bed.pairs["dns"]) as client:
            client.send(bytes(codec.MAX_MESSAGE_BYTES + 1))
            client.send(bytes(10 * codec.MAX_MESSAGE_BYTES))
            dns.join("proxy-0").send(QUESTION)
            await until(lambda: proxy.heard)
        assert proxy.heard == [("dns", QUESTION)]
        assert not proxy.breaches

    run_in_bed(tmp_path, scenario)


def test_client_is_back_after_the_server_was_restarted(tmp_path):
    async def scenario(bed: Bed) -> None:
        first, proxy = bed.peer("tun"), bed.peer("proxy-0")
        first.serve()
        client = proxy.join("tun")
        await until(lambda: proxy.connects == 1)
        assert not proxy.disconnects
        first.context.close()
        await until(lambda: proxy.disconnects)
        second = bed.peer("tun")
        server = second.serve()
        await until(lambda: proxy.connects == 2)
        # Vain attempts in between are none.
        assert proxy.disconnects == 1
        client.send(m.ProxyHello())
        await until(lambda: second.heard)
        server.send(second.sender("proxy-0"), m.DialAbandoned(flow_id=5))
        await until(lambda: proxy.heard)

    run_in_bed(tmp_path, scenario)


def test_client_may_come_before_the_server(tmp_path):
    async def scenario(bed: Bed) -> None:
        dns, proxy = bed.peer("dns"), bed.peer("proxy-0")
        dns.join("proxy-0").send(QUESTION)
        proxy.serve()
        await until(lambda: proxy.heard)
        assert dns.connects == 1

    run_in_bed(tmp_path, scenario)


def test_restarted_client_takes_the_place_of_its_predecessor(tmp_path):
    async def scenario(bed: Bed) -> None:
        tun, first = bed.peer("tun"), bed.peer("proxy-0")
        server = tun.serve()
        first.join("tun").send(m.ProxyHello())
        await until(lambda: tun.heard)
        second = bed.peer("proxy-0")
        second.join("tun").send(m.ProxyHello())
        await until(lambda: len(tun.heard) == 2)
        first.context.close()
        server.send(tun.sender("proxy-0"), m.DialAbandoned(flow_id=5))
        await until(lambda: second.heard)
        assert not first.heard

    run_in_bed(tmp_path, scenario)


def test_peer_that_has_left_is_gone_also_when_it_is_back(tmp_path):
    async def scenario(bed: Bed) -> None:
        tun, proxy = bed.peer("tun"), bed.peer("proxy-0")
        server = tun.serve()
        proxy.join("tun").send(m.ProxyHello())
        await until(lambda: tun.heard)
        before = tun.sender("proxy-0")
        proxy.context.close()

        def is_gone() -> bool:
            try:
                server.send(before, m.DialAbandoned(flow_id=5))
            except PeerGoneError:
                return True
            return False

        await until(is_gone)
        back = bed.peer("proxy-0")
        back.join("tun").send(m.ProxyHello())
        await until(lambda: len(tun.heard) == 2)
        assert is_gone()
        server.send(tun.sender("proxy-0"), m.DialAbandoned(flow_id=6))
        await until(lambda: back.heard)
        assert back.heard == [("tun", m.DialAbandoned(flow_id=6))]

    run_in_bed(tmp_path, scenario)


def test_answer_goes_to_the_process_that_asked_while_its_slot_has_two(tmp_path):
    async def scenario(bed: Bed) -> None:
        proxy, old, successor = bed.peer("proxy-0"), bed.peer("dns"), bed.peer("dns")
        server = proxy.serve()
        for number, peer in enumerate((old, successor)):
            peer.join("proxy-0").send(m.ResolveName(request_id=number, name="a.test"))
            await until(lambda number=number: len(proxy.heard) == number + 1)
        answers = [
            m.NameResolved(request_id=number, outcome=m.NameOutcome.FAILED) for number in (0, 1)
        ]
        for sender, answer in reversed(list(zip(proxy.senders, answers, strict=True))):
            assert sender.slot == "dns"
            server.send(sender, answer)
        await until(lambda: old.heard and successor.heard)
        assert old.heard == [("proxy-0", answers[0])]
        assert successor.heard == [("proxy-0", answers[1])]

    run_in_bed(tmp_path, scenario)


def test_closed_end_is_deaf_and_mute_and_the_others_of_its_context_go_on(tmp_path):
    async def scenario(bed: Bed) -> None:
        proxy, tun, dns = bed.peer("proxy-0"), bed.peer("tun"), bed.peer("dns")
        server, client = proxy.serve(), proxy.join("tun")
        tun_server, dns_client = tun.serve(), dns.join("proxy-0")
        client.send(m.ProxyHello())
        dns_client.send(QUESTION)
        await until(lambda: tun.heard and proxy.heard)

        client.close()
        with pytest.raises(BusyError, match="closed"):
            client.send(m.ProxyHello())
        server.send(proxy.sender("dns"), ANSWER)
        await until(lambda: dns.heard)

        def is_gone() -> bool:
            try:
                tun_server.send(tun.sender("proxy-0"), m.DialAbandoned(flow_id=1))
            except PeerGoneError:
                return True
            return False

        await until(is_gone)
        server.close()
        with pytest.raises(PeerGoneError, match="closed"):
            server.send(proxy.sender("dns"), ANSWER)
        assert proxy.heard == [("dns", QUESTION)]
        assert proxy.connects == 1
        assert not proxy.disconnects
        client.close()
        server.close()

    run_in_bed(tmp_path, scenario)


def test_successor_on_the_same_path_is_found_when_its_predecessor_closes(tmp_path):
    """As spawn makes it: the path is the successor's while the old one still serves."""

    async def scenario(bed: Bed) -> None:
        old, dns = bed.peer("proxy-0"), bed.peer("dns")
        server = old.serve()
        client = dns.join("proxy-0")
        client.send(QUESTION)
        await until(lambda: old.heard)
        successor = bed.peer("proxy-0")
        successor.serve()
        client.send(QUESTION)
        await until(lambda: len(old.heard) == 2)
        server.close()
        assert (tmp_path / "proxy-0").is_socket()
        await until(lambda: dns.connects == 2)
        client.send(QUESTION)
        await until(lambda: successor.heard)
        assert len(old.heard) == 2

    run_in_bed(tmp_path, scenario)


def test_client_whose_server_is_away_is_busy_at_last(tmp_path):
    async def scenario(bed: Bed) -> None:
        dns = bed.peer("dns")
        client = dns.join("proxy-0")
        for _ in range(HIGH_WATER_MARK):
            client.send(QUESTION)
        with pytest.raises(BusyError, match="proxy-0 does not read"):
            client.send(QUESTION)

    run_in_bed(tmp_path, scenario)


def test_server_whose_client_does_not_read_is_busy_and_loses_no_other(tmp_path):
    async def scenario(bed: Bed) -> None:
        proxy, dns, tun = bed.peer("proxy-0"), bed.peer("dns"), bed.peer("tun")
        server = proxy.serve()
        with bed.raw_client("proxy-0", bed.pairs["dns"]) as deaf:
            deaf.send(codec.encode(QUESTION))
            await until(lambda: proxy.heard)
            big = m.AddressResolved(request_id=1, name="n" * 253)
            with pytest.raises(BusyError, match="dns does not read"):
                repeat(lambda: server.send(proxy.sender("dns"), big))
        tun.serve()
        bed.peer("proxy-1").join("tun").send(m.ProxyHello())
        await until(lambda: tun.heard)
        assert not dns.heard

    run_in_bed(tmp_path, scenario)


def repeat(action: Callable[[], None]) -> None:
    """Until it raises, within reason."""
    for _ in range(200_000):
        action()
    raise AssertionError


def test_failing_receiver_leaves_no_message_behind(tmp_path):
    async def scenario(bed: Bed) -> None:
        failures = []
        asyncio.get_running_loop().set_exception_handler(lambda _, report: failures.append(report))
        proxy, dns = bed.peer("proxy-0"), bed.peer("dns")
        count = 0

        def fail_each_time(_sender: Sender, _message: m.AnyMessage) -> None:
            nonlocal count
            count += 1
            raise ZeroDivisionError

        proxy.context.serve(fail_each_time, lambda *_: None)
        client = dns.join("proxy-0")
        for _ in range(10):
            client.send(QUESTION)
        await until(lambda: count == 10)
        assert len(failures) == 10

    run_in_bed(tmp_path, scenario)


def test_closing_ends_even_when_the_socket_could_not_be_bound(tmp_path):
    async def scenario(bed: Bed) -> None:
        peer = bed.peer("proxy-0")
        bed.directory.joinpath("proxy-0").mkdir()
        with pytest.raises(OSError):
            peer.serve()
        peer.context.close()  # libzmq's term would wait for ever here

    run_in_bed(tmp_path, scenario)


def test_socket_is_open_to_the_group_only(tmp_path):
    async def scenario(bed: Bed) -> None:
        bed.peer("tun").serve()
        assert (tmp_path / "tun").stat().st_mode & 0o777 == 0o770

    run_in_bed(tmp_path, scenario)

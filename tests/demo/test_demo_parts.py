"""What the demo does without namespaces: configuration, upstream DNS, the way out."""

import asyncio
import contextlib
import os
import random
import signal
import tomllib
import warnings
from pathlib import Path

import pytest
from dnslib import QTYPE, RCODE, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from demo import private_network, session, upstream_dns
from demo.errors import DemoError
from demo.private_network import CANNOT_SET_UP

NAMES = {"teleport.demo.test": "127.0.1.1"}

scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f")),
)
keys = st.from_regex(r"[a-z_]{1,10}", fullmatch=True)
values = st.one_of(scalars, st.lists(scalars, max_size=3))


@given(
    st.dictionaries(
        keys,
        st.one_of(values, st.dictionaries(keys, st.one_of(values, st.dictionaries(keys, values)))),
        max_size=5,
    )
)
def test_configuration_survives_being_written_as_toml(config):
    assert tomllib.loads(session.toml(config)) == config


def test_wrong_configuration_is_told_with_every_problem(tmp_path):
    path = tmp_path / "vnet.toml"
    path.write_text("dns = 3\nnetwork.mtu = 1")
    with pytest.raises(DemoError, match=r"dns: expected a table.*network\.mtu"):
        session._read_config(path)
    with pytest.raises(DemoError, match="No such file"):
        session._read_config(tmp_path / "none.toml")
    path.write_text("network.mtu = 1500")
    assert session._read_config(path) == {"network": {"mtu": 1500}}
    assert session._read_config(None) == {}


def test_wrong_files_end_with_the_status_of_a_demo_that_cannot_be_set_up(tmp_path, capsys):
    (tmp_path / "bad.toml").write_text("x = ")
    for arguments in ((None, tmp_path / "bad.toml"), (tmp_path / "bad.toml", None)):
        assert session.run_demo(*arguments, ["true"]) == CANNOT_SET_UP
        assert capsys.readouterr().err.startswith("vnet demo: ")
    assert session.run_cluster(tmp_path / "none.toml", tmp_path) == CANNOT_SET_UP
    missing = f"vnet demo: {tmp_path / 'none.toml'}: No such file or directory\n"
    assert capsys.readouterr().err == missing


def test_a_user_without_an_account_is_told(tmp_path, monkeypatch, capsys):
    def unknown(_uid: int):
        raise KeyError

    monkeypatch.setattr(session.pwd, "getpwuid", unknown)
    assert session.run_demo(None, None, ["true"]) == CANNOT_SET_UP
    assert session.run_cluster(None, tmp_path) == CANNOT_SET_UP
    told = f"vnet demo: the system knows no user of uid {os.getuid()}: run as another\n"
    assert capsys.readouterr().err == told * 2


# -- upstream DNS --


def ask(name: str, kind: str = "A") -> DNSRecord:
    reply = upstream_dns.answer(DNSRecord.question(name, kind).pack(), NAMES)
    assert reply is not None
    return DNSRecord.parse(reply)


@pytest.mark.parametrize(
    "name", ["teleport.demo.test", "TELEPORT.demo.TEST", "teleport.demo.test."]
)
def test_name_of_a_proxy_has_its_address(name):
    reply = ask(name)
    assert reply.header.rcode == RCODE.NOERROR
    assert [str(record.rdata) for record in reply.rr] == ["127.0.1.1"]
    assert str(reply.q.qname).rstrip(".") == name.rstrip(".")
    assert reply.header.ra


@pytest.mark.parametrize(
    ("name", "kind", "rcode"),
    [
        ("teleport.demo.test", "AAAA", RCODE.NOERROR),
        ("teleport.demo.test", "MX", RCODE.NOERROR),
        ("demo.test", "A", RCODE.NOERROR),
        ("x.teleport.demo.test", "A", RCODE.NXDOMAIN),
        ("other.test", "A", RCODE.NXDOMAIN),
    ],
)
def test_other_questions_have_no_answer(name, kind, rcode):
    reply = ask(name, kind)
    assert reply.header.rcode == rcode
    assert reply.rr == []


def test_10000_odd_queries_get_an_answer_or_none():
    rng = random.Random(7)
    good = DNSRecord.question("teleport.demo.test", "A").pack()
    for _ in range(10_000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        upstream_dns.answer(bytes(data[: rng.randrange(len(data) + 1)]), NAMES)


def test_queries_are_answered_over_udp_and_tcp():
    async def scenario() -> None:
        port = free_port()
        server = asyncio.create_task(upstream_dns.serve("127.0.0.1", port, NAMES))
        query = DNSRecord.question("teleport.demo.test", "A").pack()
        reader, writer = await connect("127.0.0.1", port)
        for _ in range(2):
            writer.write(len(query).to_bytes(2, "big") + query)
            reply = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            assert QTYPE[DNSRecord.parse(reply).rr[0].rtype] == "A"
        writer.write(b"\0\3abc")  # what is none ends the connection
        assert await reader.read() == b""
        writer.close()
        loop, answered = asyncio.get_running_loop(), asyncio.Queue()

        class Client(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, addr) -> None:
                answered.put_nowait(data)

        transport, _ = await loop.create_datagram_endpoint(Client, remote_addr=("127.0.0.1", port))
        transport.sendto(b"junk")
        transport.sendto(query)
        async with asyncio.timeout(10):
            assert DNSRecord.parse(await answered.get()).rr
        transport.close()
        server.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await server

    asyncio.run(scenario())


def free_port() -> int:
    import socket

    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return end.getsockname()[1]


async def connect(host: str, port: int):
    async with asyncio.timeout(10):
        while True:
            try:
                return await asyncio.open_connection(host, port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)


# -- the way out --


def in_child(action) -> int:
    """The exit status of a forked child that does `action`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DemoError("no empty directory"), "no empty directory"),
        (OSError(28, "No space left on device"), "the demo cannot be set up"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failure_ends_with_its_status_and_a_reason(capfd, error, text):
    def fail() -> int:
        raise error

    def leave() -> None:
        private_network._leave(fail, lambda why: os.write(2, why.encode()))

    assert in_child(leave) == CANNOT_SET_UP
    assert text in capfd.readouterr().err


@pytest.mark.parametrize(("ending", "status"), [("exit 7", 7), ("kill -9 $$", 137)])
def test_status_of_a_child_is_a_shells(ending, status):
    before = signal.getsignal(signal.SIGTERM)
    child = os.posix_spawn("/bin/sh", ["sh", "-c", ending], os.environ)
    assert private_network._wait_passing_signals(child, passes_interrupt=False) == status
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_are_passed_on_and_interrupts_only_if_wanted():
    for passes, status in ((True, 42), (False, 43)):

        def wait(passes: bool = passes) -> None:
            script = "trap 'exit 42' INT; trap 'exit 43' TERM; echo; while :; do sleep 0.05; done"
            reader, writer = os.pipe()
            child = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", script],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)],
                setpgroup=0,
            )
            os.read(reader, 1)  # the traps are set
            real = os.waitpid

            def waitpid(pid: int, options: int) -> tuple[int, int]:
                # By now the handlers are set.
                signal.raise_signal(signal.SIGINT)
                if not passes:
                    signal.raise_signal(signal.SIGTERM)
                return real(pid, options)

            private_network.os.waitpid = waitpid
            os._exit(private_network._wait_passing_signals(child, passes_interrupt=passes))

        assert in_child(wait) == status


def test_stop_that_came_before_the_wait_is_not_missed():
    def wait() -> None:
        demo = session._Demo(Path(), None, {})
        for number in session.STOP_SIGNALS:
            signal.signal(number, demo._take_signal)
        os.kill(os.getpid(), signal.SIGTERM)
        signal.alarm(20)
        demo._wait_for_stop()
        os._exit(0)

    assert in_child(wait) == 0


def test_stop_while_waiting_ends_the_wait():
    def wait() -> None:
        demo = session._Demo(Path(), None, {})
        for number in session.STOP_SIGNALS:
            signal.signal(number, demo._take_signal)
        me = os.getpid()
        if os.fork() == 0:
            import time

            time.sleep(0.2)
            os.kill(me, signal.SIGHUP)
            os._exit(0)
        signal.alarm(20)
        demo._wait_for_stop()
        os._exit(0)

    assert in_child(wait) == 0


def test_directory_is_mounted_on_only_if_it_is_seen_to_be_empty(tmp_path):
    assert private_network._is_empty_directory(tmp_path)
    (tmp_path / "file").touch()
    assert not private_network._is_empty_directory(tmp_path)
    assert not private_network._is_empty_directory(tmp_path / "file")
    assert not private_network._is_empty_directory(tmp_path / "none")

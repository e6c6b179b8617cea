"""How `vnet diag` asks: bounded in time whatever answers, and with the right meaning of each answer."""

import contextlib
import json
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_network import in_own_network

from supervisor.cli.diag_clients import date_of, skew_of
from supervisor.diag import gather, probing, programs, resolve_names
from supervisor.diag.facts import Outcome
from supervisor.diag.model import AttemptStatus, CannotCheckError
from supervisor.diag.parallel import Failed, run_all
from supervisor.ssh_config_include import Inclusion

A, AAAA = bytes((100, 64, 0, 2)), bytes.fromhex("fd000001" + "0" * 22 + "02")
ADDRESSES = {1: A, 28: AAAA}


def record(kind: int, data: bytes, name: bytes = b"\xc0\x0c") -> bytes:
    return name + struct.pack(">HHIH", kind, 1, 0, len(data)) + data


def reply(question: bytes, *records: bytes, code: int = 0) -> bytes:
    header = question[:2] + struct.pack(">5H", 0x8180 | code, 1, len(records), 0, 0)
    return header + question[12:] + b"".join(records)


QUESTION = probing.pack_question(7, "vnet-diag-00.test", "A")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (reply(QUESTION, record(1, A)), "100.64.0.2"),
        (reply(QUESTION, record(5, b"\x01x\x00"), record(1, A)), "100.64.0.2"),
        (reply(QUESTION, record(1, A, b"\x04name\x04test\x00")), "100.64.0.2"),
        (reply(QUESTION), ""),
        (reply(QUESTION, code=3), ""),
        (reply(QUESTION, record(28, AAAA)), ""),
    ],
    ids=["first", "behind an alias", "name in full", "no data", "no such name", "another type"],
)
def test_address_of_an_answer(answer, expected):
    assert probing.read_answer(answer, QUESTION, "A") == expected


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        QUESTION,
        reply(QUESTION, code=2),
        reply(QUESTION, code=5),
        reply(QUESTION, record(1, A))[:-10],
        reply(probing.pack_question(7, "vnet-diag-01.test", "A"), record(1, A)),
    ],
    ids=["nothing", "no answer", "failure", "refused", "cut", "another name"],
)
def test_what_is_no_good_answer_is_an_error(answer):
    with pytest.raises(ValueError):
        probing.read_answer(answer, QUESTION, "A")


@given(st.binary(max_size=80))
def test_no_answer_makes_the_reader_fail_in_another_way(rest):
    with contextlib.suppress(ValueError):
        probing.read_answer(reply(QUESTION) + rest, QUESTION, "A")
    broken = QUESTION[:2] + b"\x81\x80\x00\x01\xff\xff\0\0\0\0" + QUESTION[12:] + rest
    with contextlib.suppress(ValueError):
        probing.read_answer(broken, QUESTION, "A")


@contextlib.contextmanager
def dns_server(answer: Callable[[bytes], bytes | None]) -> Iterator[int]:
    """A DNS server on loopback; its port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.bind(("127.0.0.1", 0))
        end.settimeout(0.1)
        is_over = threading.Event()

        def serve() -> None:
            while not is_over.is_set():
                with contextlib.suppress(TimeoutError):
                    data, client = end.recvfrom(4096)
                    if (said := answer(data)) is not None:
                        # Something foreign first: another id.
                        end.sendto(bytes((said[0] ^ 1, *said[1:])), client)
                        end.sendto(said, client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield end.getsockname()[1]
        finally:
            is_over.set()
            thread.join()


def right(question: bytes) -> bytes:
    kind = struct.unpack(">H", question[-4:-2])[0]
    return reply(question, record(kind, ADDRESSES[kind]))


def test_server_is_asked_for_both_types_with_a_new_name_each_time():
    asked: list[bytes] = []

    def answer(question: bytes) -> bytes:
        asked.append(question)
        return right(question)

    with dns_server(answer) as port:
        facts = probing.ask_server("127.0.0.1", port)
    assert (facts.a, facts.aaaa, facts.error) == ("100.64.0.2", "fd00:1::2", "")
    names = {question[12:-4] for question in asked}
    assert len(names) == len(asked) == 2
    for name in names:
        assert name.startswith(b"\x1avnet-diag-")
        assert name.endswith(b"\x04test\x00")
        int(name[11:27], 16)


def test_server_is_asked_again_and_believed_when_it_answers(monkeypatch):
    monkeypatch.setattr(probing, "QUERY_SECONDS", 1.0)
    monkeypatch.setattr(probing, "PAUSE_SECONDS", 0.01)
    count = 0

    def answer(question: bytes) -> bytes | None:
        nonlocal count
        count += 1
        return right(question) if count > 4 else None

    with dns_server(answer) as port:
        facts = probing.ask_server("127.0.0.1", port)
    assert facts.is_reachable
    assert count == 6


@pytest.mark.parametrize(
    ("answer", "seconds", "words"),
    [
        (lambda _question: None, 0.2, "A: no answer within 0.2 s; AAAA: no answer within 0.2 s"),
        (reply, 5.0, "it answers without records"),
        (lambda question: reply(question, code=2), 5.0, "A: it answers with failure (code 2)"),
    ],
)
def test_server_that_gives_no_address_is_not_reachable(monkeypatch, answer, seconds, words):
    monkeypatch.setattr(probing, "QUERY_SECONDS", seconds)
    monkeypatch.setattr(probing, "PAUSE_SECONDS", 0.01)
    with dns_server(answer) as port:
        facts = probing.ask_server("127.0.0.1", port)
    assert not facts.is_reachable
    assert words in facts.error


def test_server_that_is_not_there_says_so():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.bind(("127.0.0.1", 0))
        port = end.getsockname()[1]
    assert "Connection refused" in probing.ask_server("127.0.0.1", port).error


# -- the system's resolver --


def test_only_what_is_not_found_is_asked_for_a_second_time(monkeypatch):
    monkeypatch.setattr(probing, "PAUSE_SECONDS", 0.01)
    rounds: list[list[str]] = []
    answers = {
        "gone.test": ["not found", [], ""],
        "late.test": ["not found", [], ""],
        "slow.test": ["timeout", [], "try again"],
        "good.test": ["found", ["100.64.0.2"], ""],
    }

    def run(_command: object, *, input: bytes, **_options: object):  # noqa: A002
        names = [name for name, _ in json.loads(input)]
        zones = [name.partition(".")[2] for name in names]
        rounds.append(zones)
        assert len(set(names)) == len(names)
        lines = [json.dumps([number, *answers[zone]]) for number, zone in enumerate(zones)]
        answers["late.test"] = ["found", ["100.64.0.2"], ""]
        text = "\n".join(["nonsense", "[99, 1]", *lines]).encode()
        return subprocess.CompletedProcess([], 0, text, b"")

    monkeypatch.setattr(probing.subprocess, "run", run)
    found = list(probing.resolve_zones(list(answers), ["A"]))
    assert rounds == [list(answers), ["gone.test", "late.test"]]
    assert [fact.outcome for fact in found] == [
        Outcome.NOT_FOUND,
        Outcome.FOUND,
        Outcome.TIMEOUT,
        Outcome.FOUND,
    ]


def test_process_that_asks_is_ended_and_what_it_did_not_say_is_late(monkeypatch):
    def run(*_arguments: object, **_options: object):
        raise subprocess.TimeoutExpired("x", 1)

    monkeypatch.setattr(probing.subprocess, "run", run)
    [fact] = probing.resolve_zones(["a.test"], ["A"])
    assert fact.outcome is Outcome.TIMEOUT


@pytest.mark.root
def test_process_that_asks_needs_nothing_of_vnet_and_answers_each_question():
    def ask() -> None:
        names = [["vnet-diag-1.test", "A"], ["x" * 70 + ".test", "AAAA"]]
        program = Path(resolve_names.__file__)
        done = subprocess.run(
            [sys.executable, "-I", str(program), "20"],
            input=json.dumps(names).encode(),
            capture_output=True,
            check=True,
            timeout=30,
            cwd="/",
        )
        found = sorted(json.loads(line) for line in done.stdout.splitlines())
        assert [number for number, *_ in found] == [0, 1]
        assert found[1][1] == "error"

    # Without a network nobody is asked.
    in_own_network(ask)


@pytest.mark.parametrize(
    ("error", "seconds", "expected"),
    [
        (socket.gaierror(socket.EAI_NONAME, "no"), 0, "not found"),
        (socket.gaierror(socket.EAI_NODATA, "no"), 0, "not found"),
        (socket.gaierror(socket.EAI_AGAIN, "again"), 5, "timeout"),
        (socket.gaierror(socket.EAI_AGAIN, "again"), 0, "error"),
        (socket.gaierror(socket.EAI_FAIL, "fail"), 5, "error"),
        (UnicodeError("label too long"), 0, "error"),
    ],
)
def test_what_the_c_library_says(monkeypatch, error, seconds, expected):
    moments = iter((0.0, float(seconds)))
    monkeypatch.setattr(resolve_names.time, "monotonic", lambda: next(moments))

    def getaddrinfo(name: str, *_rest: object) -> None:
        assert name == "x.test."
        raise error

    monkeypatch.setattr(resolve_names.socket, "getaddrinfo", getaddrinfo)
    assert resolve_names.resolve("x.test", "A")[0] == expected


# -- in parallel, programs, files --


def test_what_hangs_is_left_behind_and_the_rest_counts():
    never = threading.Event()

    def fail() -> str:
        raise OSError("no")

    heard: list[str] = []
    began = time.monotonic()
    found = run_all({"hangs": never.wait, "fails": fail, "works": lambda: "x"}, 2.0, heard.append)
    assert time.monotonic() - began < 10
    never.set()
    assert sorted(heard) == ["fails", "works"]
    assert list(found) == ["hangs", "fails", "works"]
    assert found["works"] == "x"
    failures = {name: result.error for name, result in found.items() if isinstance(result, Failed)}
    assert isinstance(failures["hangs"], TimeoutError)
    assert isinstance(failures["fails"], OSError)


@pytest.fixture
def program(tmp_path, monkeypatch) -> Callable[[str], str]:
    """Makes a program of the system that runs this shell script."""
    monkeypatch.setattr(programs, "PATH", f"{tmp_path}:{programs.PATH}")

    def make(script: str) -> str:
        path = tmp_path / "pretended"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path.name

    return make


def test_output_of_a_program_is_taken_with_its_errors(program):
    attempt = programs.run([program('echo "out $1"; echo err >&2; exit 3'), "x"])
    assert (attempt.command, attempt.output) == ("pretended x", "out x")
    assert (attempt.status, attempt.error) == (AttemptStatus.ERROR, "exit status 3\nerr")


def test_program_that_hangs_or_floods_is_cut(program, monkeypatch):
    monkeypatch.setattr(programs, "SECONDS", 3.0)
    began = time.monotonic()
    attempt = programs.run([program("echo begin; exec sleep 60")])
    assert time.monotonic() - began < 30
    assert attempt.output == "begin"
    assert "ended after 3 s" in attempt.error
    monkeypatch.setattr(programs, "SECONDS", 60.0)
    monkeypatch.setattr(programs, "MAX_BYTES", 1000)
    attempt = programs.run([program("head -c 100000 /dev/zero | tr '\\0' x")])
    assert attempt.output == "x" * 1000 + "\n[cut here]"


def test_program_is_given_no_secret_of_the_caller(program, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://u:canary@h")
    assert "canary" not in programs.run([program("env")]).output


def test_program_that_is_not_there_is_no_failure():
    assert programs.find("no-such-program") is None
    assert "not installed" in programs.run(["no-such-program"]).error


def test_configuration_of_ssh_is_read_as_it_is(tmp_path):
    home, tsh = tmp_path / "home", tmp_path / "tsh"
    assert gather.gather_ssh(home, tsh).text is None
    (home / ".ssh").mkdir(parents=True)
    path = home / ".ssh" / "config"
    path.write_text(f'Include "{tsh}/vnet_ssh_config"\n')
    assert gather.gather_ssh(home, tsh).inclusion is Inclusion.FOR_ALL_HOSTS
    path.write_bytes(b"\xff")
    with pytest.raises(CannotCheckError, match="UTF-8"):
        gather.gather_ssh(home, tsh)
    path.write_bytes(b"#" * (1 << 20))
    with pytest.raises(CannotCheckError, match="bytes or more"):
        gather.gather_ssh(home, tsh)
    path.unlink()
    os.mkfifo(path)
    assert stat.S_ISFIFO(path.stat().st_mode)
    with pytest.raises(OSError, match="regular"):
        gather.gather_ssh(home, tsh)


@pytest.mark.parametrize(
    ("journal", "expected"),
    [
        (None, ()),
        (b'{"schema":1,"changes":[{"type":"file","path":"/etc/x"},{"type":"call","action":"y"}]}', ("/etc/x", "y")),
        (b"{", ("a journal that cannot be read",)),
        (b"[]", ("a journal that cannot be read",)),
    ],
)  # fmt: skip
def test_journal_is_read_without_taking_its_lock(tmp_path, journal, expected):
    if journal is not None:
        (tmp_path / "os-changes.json").write_bytes(journal)
    facts = gather.gather_leftovers(tmp_path)
    assert (facts.changes, facts.is_in_use) == (expected, False)
    assert not (tmp_path / "os-lock").exists()


def test_state_directory_of_a_running_vnet_is_in_use(tmp_path):
    from supervisor.osconfig.journal import Journal

    journal = Journal(tmp_path)
    assert gather.gather_leftovers(tmp_path).is_in_use
    journal.close()
    assert not gather.gather_leftovers(tmp_path).is_in_use
    # Looking takes nothing away from who comes next.
    Journal(tmp_path).close()


def test_own_sockets_are_found_with_their_process():
    with socket.create_server(("127.0.0.1", 0)) as end:
        inode = os.fstat(end.fileno()).st_ino
        found = gather._owners({inode})
    assert found[inode][0] == os.getpid()


def test_samples_of_this_machine_can_be_taken():
    facts = gather.gather_surroundings()
    assert facts.kernel.startswith("Linux version")
    assert facts.capabilities is not None
    assert "lo" in facts.interfaces


# -- the time of a proxy --


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nDate: Sat, 31 Jan 2026 12:00:00 GMT\r\n\r\n", True),
        (b"HTTP/1.1 404 x\r\ndate:Sat, 31 Jan 2026 12:00:00 GMT\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nDate: yesterday\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nDate: \xff\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\n\r\n", False),
        (b"", False),
    ],
)
def test_date_of_a_response(head, expected):
    moment = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
    assert date_of(head) == (moment if expected else None)


@pytest.mark.parametrize(
    ("behind", "took", "expected"), [(0, 0.2, 0.0), (300, 0.2, 300.0), (-300, 4.0, -300.0)]
)
def test_skew_is_right_within_its_own_error(behind, took, expected):
    """A server that is `behind` seconds ahead of us wrote its date at any moment of the exchange."""
    begin = 1_769_860_800.25
    for share in (0.0, 0.5, 1.0):
        written = int(begin + share * took + behind)
        date = datetime.fromtimestamp(written, UTC)
        skew, error = skew_of(date, datetime.fromtimestamp(begin + took, UTC), took)
        assert abs(skew - expected) <= error + 1e-6

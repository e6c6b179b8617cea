"""One worker slot without a process: only its channel is real."""

import gc
import itertools
import logging
import os
import pkgutil
import socket
import threading
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_fakes import make_workers

from ipc import messages as m
from ipc.channel import Channel, make_pair
from ipc.permits import Role
from supervisor import privileges, spawn, standard_streams, worker
from supervisor.allowance import Allowance
from supervisor.confinement.landlock_rules import Reach
from supervisor.privileges import Identity
from supervisor.spawn import Spawned
from supervisor.worker_states import WorkerState

OPENED = m.ListenerOpened(address=b"\x64\x40\3\4", port=80)
REFUSED = m.ListenerRefused(address=b"\x64\x40\3\4", port=80, reason="r" * 500)


def open_descriptors() -> set[str]:
    gc.collect()
    return {entry.name for entry in Path("/proc/self/fd").iterdir() if entry.exists()}


@pytest.fixture
def slot(monkeypatch):
    """(slot, the worker's end of its channel); the process is this one, and is never killed."""
    ours, theirs = make_pair()
    channel = Channel(ours, Role.SUPERVISOR, Role.PROXY, takes_descriptors=False)
    monkeypatch.setattr(worker, "spawn", lambda *_: Spawned(os.getpid(), channel, None, None))
    monkeypatch.setattr(worker.os, "kill", lambda *_: None)
    made = make_workers("proxy-0")["proxy-0"]
    made.start(1.0, logging.NullHandler())
    yield made, Channel(theirs, Role.PROXY, Role.SUPERVISOR, takes_descriptors=True)
    made._empty_outbox()
    ours.close()
    theirs.close()


def fill(made: worker.Worker) -> None:
    while not made.wants_to_write:
        made.send(REFUSED)


def drain(made: worker.Worker, other: Channel) -> list[int]:
    """Everything that waits is received; returns the descriptors."""
    found: list[int] = []
    while made.wants_to_write:
        while (received := other.receive()) is not None:
            found += received[1]
        made.flush()
    while (received := other.receive()) is not None:
        found += received[1]
    return found


def test_what_waits_is_sent_in_order(slot):
    made, other = slot
    fill(made)
    made.send(m.SetLogLevel(level="INFO"))
    last = None
    while made.wants_to_write or last is None:
        while (received := other.receive()) is not None:
            last = received[0]
        made.flush()
    while (received := other.receive()) is not None:
        last = received[0]
    assert last == m.SetLogLevel(level="INFO")


def test_descriptor_that_waits_is_the_one_that_was_meant(slot, tmp_path):
    """A worker that does not read must not get what later has the number of a closed listener."""
    made, other = slot
    meant, secret = tmp_path / "meant", tmp_path / "secret"
    meant.write_text("meant")
    secret.write_text("secret")
    fill(made)
    descriptor = os.open(meant, os.O_RDONLY)
    made.send(OPENED, [descriptor])
    os.close(descriptor)
    taken = os.open(secret, os.O_RDONLY)
    assert taken == descriptor
    [received] = drain(made, other)
    assert os.read(received, 100) == b"meant"
    os.close(received)
    os.close(taken)


@pytest.mark.parametrize("end", ["sent", "emptied"])
def test_copies_of_descriptors_are_closed(slot, end):
    made, other = slot
    before = open_descriptors()
    fill(made)
    with Path(os.devnull).open("rb") as null:
        for _ in range(20):
            made.send(OPENED, [null.fileno()])
        if end == "sent":
            for descriptor in drain(made, other):
                os.close(descriptor)
        else:
            made._empty_outbox()
    assert open_descriptors() <= before


def test_worker_that_reads_nothing_is_killed_once(slot, monkeypatch, caplog):
    made, _ = slot
    monkeypatch.setattr(worker, "MAX_OUTBOX", 10)
    fill(made)
    for _ in range(20):
        made.send(REFUSED)
    assert caplog.text.count("proxy-0 is killed: it does not read its channel") == 1


def test_messages_for_no_process_are_dropped():
    made = make_workers("dns")["dns"]
    made.send(OPENED, [0])
    assert not made.wants_to_write


def test_fork_that_fails_counts_as_a_crash(monkeypatch, caplog):
    def fail(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(worker, "spawn", fail)
    made = make_workers("dns")["dns"]
    made.start(1.0, logging.NullHandler())
    assert made.state is WorkerState.BACKOFF
    assert made.restart_at is not None
    assert made.pid is None
    for now in range(2, 8):
        if made.state is WorkerState.BACKOFF:
            made.start(float(now), logging.NullHandler())
    assert made.state is WorkerState.FAILED
    assert "dns cannot be started: [Errno 24] Too many open files" in caplog.text


FAILURES = {
    "fork": ("os.fork", OSError(11, "EAGAIN")),
    "pipe": ("supervisor.spawn.make_pipe", OSError(24, "Too many open files")),
    "thread": ("threading.Thread.start", RuntimeError("can't start new thread")),
    "wake-up": ("os.pipe", OSError(24, "Too many open files")),
}


@pytest.mark.parametrize(
    ("what", "which"),
    [("fork", 1), ("pipe", 1), ("pipe", 2), ("thread", 1), ("thread", 2), ("wake-up", 4)],
)
def test_failed_spawn_leaves_nothing(monkeypatch, what, which):
    name, error = FAILURES[what]
    module, _, function = name.rpartition(".")
    real = pkgutil.resolve_name(name)
    calls = itertools.count(1)

    def fail(*arguments, **options):
        if next(calls) == which:
            raise error
        return real(*arguments, **options)

    before, threads = open_descriptors(), threading.active_count()
    children = psutil.Process().children()
    monkeypatch.setattr(f"{module}.{function}", fail)
    with pytest.raises(OSError):
        spawn.spawn("dns", Identity(0, 0, None), Reach(), logging.NullHandler())
    monkeypatch.undo()
    for thread in threading.enumerate():
        if thread.name.startswith("log-"):
            thread.join(10)
    # What tests before have left may end meanwhile.
    assert open_descriptors() <= before
    assert threading.active_count() <= threads
    assert set(psutil.Process().children()) <= set(children)


def in_child(action) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_closed_standard_descriptors_are_filled():
    def check() -> None:
        os.close(0)
        os.close(1)
        standard_streams.fill_descriptors()
        assert {str(Path(f"/proc/self/fd/{n}").readlink()) for n in (0, 1)} == {os.devnull}
        before = open_descriptors()
        standard_streams.fill_descriptors()
        assert open_descriptors() == before

    assert in_child(check) == 0


def test_file_limit_is_raised_to_the_hard_one():
    import resource

    def check() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        assert privileges.raise_file_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)

    assert in_child(check) == 0


@pytest.mark.parametrize("kept", [set(), {0, 1, 2}, {0, 1, 2, 5, 9}, {7}])
def test_child_closes_all_but_what_it_keeps(kept):
    def check() -> None:
        with socket.socket() as one, socket.socket():
            os.dup2(one.fileno(), 500)
            for descriptor in kept:
                os.dup2(one.fileno(), descriptor)
            spawn._close_all_but(kept)
            for descriptor in range(600):
                try:
                    os.fstat(descriptor)
                except OSError:
                    assert descriptor not in kept
                else:
                    assert descriptor in kept
            os._exit(0)

    assert in_child(check) == 0


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 100)), max_size=50),
    st.floats(0, 20),
    st.floats(1, 50),
)
def test_nobody_says_more_than_burst_and_rate_allow(steps, per_second, burst):
    allowance, now, said = Allowance(per_second, burst, 0.0), 0.0, 0.0
    for pause, amount in steps:
        now += pause
        if allowance.spend(amount, now):
            said += amount
        assert said <= burst + per_second * now + 1e-6


def test_allowance_comes_back_with_time():
    allowance = Allowance(10.0, 20.0, now=0.0)
    assert allowance.spend(20, now=0.0)
    assert not allowance.spend(1, now=0.0)
    assert allowance.spend(10, now=1.0)
    assert not allowance.spend(21, now=100.0)

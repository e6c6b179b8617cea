"""What one program of the supervisor hands to the next (supervisor.handover, sealed, log_book, worker)."""

import logging
import os
import signal
import struct
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_fakes import CLUSTER, NETWORK

from ipc import messages as m
from ipc.channel import Channel, make_pair
from ipc.logpipe import WorkerLogReceiver, make_pipe
from ipc.order import Stage
from ipc.permits import Role
from supervisor import handover, sealed
from supervisor.config import Config, parse
from supervisor.confinement.landlock_rules import Reach
from supervisor.error_output import ErrorOutputReceiver
from supervisor.handover import Handover, HandoverError, KeptWorker
from supervisor.log_book import LogBook, LogEntry
from supervisor.privileges import Identity
from supervisor.restart_policy import RestartLimits
from supervisor.spawn import Spawned
from supervisor.worker import LastExit, Worker
from supervisor.worker_states import WorkerEvent, WorkerState

LIMITS = RestartLimits(5, 30.0)
WHO = Identity(1, 1, None)
DEADLINE_SECONDS = 10.0
CONFIG = parse('proxy.workers = 3\nteleport.ca_file = "/ca"\n[dns]\nos_integration = "none"\n')


def state(**changed: object) -> Handover:
    worker = handover.KeptWorker(
        slot="tun",
        state=WorkerState.READY,
        stage=Stage.READY,
        process=handover.KeptProcess(
            pid=7,
            channel=20,
            log=21,
            log_unread=b"\0\x10half",
            error_output=-1,
            waiting=[handover.KeptMessage(data=b"x", descriptors=[30, 31])],
        ),
        last_exit=handover.KeptExit(status=None, signal="SIGKILL"),
        crashes=[1.0, 2.0],
        confinement=m.Confined(
            uid=1, no_new_privs=True, capabilities=[], landlock=6, seccomp="list", missing=[]
        ),
    )
    values: dict[str, object] = {
        "pid": os.getpid(),
        "version": "1.2.3",
        "config": msgspec.to_builtins(CONFIG),
        "network": NETWORK,
        "keys": {"tun": m.BusKeys(public="p" * 40, secret="s" * 40, peers={"proxy-0": "q" * 40})},
        "identities": {"tun": handover.KeptIdentity(uid=1, gid=2, extra_group=3)},
        "lock": 10,
        "control": 11,
        "devices": handover.KeptDevices(outer=12, inner=13, namespace=14, dns=[15, 16]),
        "listeners": [handover.KeptListener(address=b"\x64\x40\0\5", port=80, descriptor=17)],
        "workers": [worker],
        "leavers": [msgspec.structs.replace(worker, process=None)],
        "reports": {"proxy-0": handover.KeptReport(clusters=[CLUSTER], problem="")},
        "known_clusters": [CLUSTER],
        "metrics": handover.KeptMetrics(
            descriptor=18, cpu_milliseconds={"tun": 1500}, started_at=1.5
        ),
        "started_at": 5.5,
        "were_ready": True,
        "was_healthy": True,
        "log_level": "DEBUG",
    }
    return Handover(**values | changed)  # type: ignore[arg-type]


def test_what_is_sealed_comes_back_and_cannot_be_changed():
    kept = state()
    descriptor = handover.seal(kept)
    try:
        assert not os.get_inheritable(descriptor)
        with pytest.raises(PermissionError):
            os.write(descriptor, b"x")
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
        for _ in range(2):
            assert handover.unseal(descriptor) == kept
    finally:
        os.close(descriptor)


def test_every_descriptor_is_named():
    assert sorted(state().descriptors()) == [*range(10, 19), 20, 21, 30, 31]


def test_configuration_in_force_comes_back():
    assert handover.config_of(handover.decode(handover.encode(state()))) == CONFIG
    with pytest.raises(HandoverError, match=r"configuration.*not understood"):
        handover.config_of(state(config={"proxy": 7}))
    assert handover.config_of(state(config={})) == Config()


def test_another_version_of_the_format_is_named():
    data = handover.encode(state())
    other = data[:8] + struct.pack(">H", handover.FORMAT + 1) + data[10:]
    with pytest.raises(HandoverError, match=f"format {handover.FORMAT + 1}.*restart VNet"):
        handover.decode(other)


def test_program_that_knows_no_metrics_worker_is_not_handed_one():
    """It would find out when it is too late, and all of VNet would end."""
    without = handover.encode(state())
    assert without[8:10] == b"\0\1"
    metrics = KeptWorker(slot="metrics", state=WorkerState.READY, stage=Stage.READY)
    for changed in ({"workers": [metrics]}, {"leavers": [metrics]}):
        encoded = handover.encode(state(**changed))
        assert encoded[8:10] == b"\0\2"
        assert handover.decode(encoded) == state(**changed)


def test_state_of_a_newer_or_older_program_of_the_same_format_is_understood():
    raw = msgspec.msgpack.decode(handover.encode(state())[10:])
    raw["something_new"] = {"a": [1]}
    del raw["leavers"], raw["log"]
    found = handover.decode(handover.encode(state())[:10] + msgspec.msgpack.encode(raw))
    assert found == state(leavers=[])


@given(st.binary(max_size=200))
def test_any_other_bytes_are_no_state(data):
    for text in (data, handover.encode(state())[:10] + data):
        with pytest.raises(HandoverError):
            handover.decode(text)


def test_other_descriptors_have_no_state(tmp_path):
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    unsealed = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    foreign = sealed.seal("x", b"something else")
    for descriptor in (plain, unsealed, foreign):
        with pytest.raises(HandoverError, match="state"):
            handover.unseal(descriptor)
        os.close(descriptor)
    with pytest.raises(HandoverError, match=f"descriptor {foreign} has no state"):
        handover.unseal(foreign)


def test_what_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(handover, "MAX_BYTES", 100)
    with pytest.raises(HandoverError, match="more than 100"):
        handover.seal(state())
    descriptor = sealed.seal("x", bytes(101))
    with pytest.raises(HandoverError, match="more than 100"):
        handover.unseal(descriptor)
    os.close(descriptor)


# -- kept log lines --


def entry(text: str, worker: str = "tun") -> LogEntry:
    return LogEntry(
        time="2026-01-31T12:00:00.123Z",
        level="info",
        worker=worker,
        pid=7,
        logger="x",
        message=text,
    )


def test_book_goes_on_with_its_lines_and_numbers():
    before = LogBook("a name", max_lines=3)
    for number in range(5):
        before.add(entry(str(number), worker="tun" if number % 2 else "dns"))
    last, lines = before.keep()
    after = LogBook("another", max_lines=3)
    after.restore(before.name, last, lines)
    assert after.read(0) == before.read(0)
    assert after.add(entry("next")).sequence == 6
    piece = after.read(last)
    assert [line.message for line in piece.entries] == ["next"]
    assert (piece.book, piece.has_missed) == ("a name", False)
    assert after.read(0).has_missed


# -- workers --


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while text not in "".join(self.texts):
            assert time.monotonic() < deadline, self.texts
            time.sleep(0.005)


class Far:
    """A child that sleeps, and the worker's ends of its channel and pipes."""

    def __init__(self, records: Records) -> None:
        ours, self.channel = make_pair()
        log_reader, self.log = make_pipe()
        error_reader, self.error = make_pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.pause()
            os._exit(0)
        self.spawned = Spawned(
            self.pid,
            Channel(ours, Role.SUPERVISOR, Role.TUN, takes_descriptors=False),
            WorkerLogReceiver(log_reader, "tun", records, pid=self.pid),
            ErrorOutputReceiver(error_reader, "tun", records, pid=self.pid),
        )
        self.end = Channel(self.channel, Role.TUN, Role.SUPERVISOR, takes_descriptors=True)

    def write_log(self, text: str, *, in_two: bool = False) -> list[bytes]:
        from ipc.logpipe import encode

        data = encode(logging.makeLogRecord({"msg": text, "levelno": 20, "name": "x"}))
        pieces = [data[:5], data[5:]] if in_two else [data]
        os.write(self.log, pieces[0])
        return pieces[1:]

    def close(self) -> None:
        for end in (self.log, self.error):
            os.close(end)
        self.channel.close()


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def far(records):
    made = Far(records)
    yield made
    made.close()


def ready_worker(far: Far) -> Worker:
    worker = Worker("tun", WHO, LIMITS)
    worker._process = far.spawned
    worker._stage = Stage.READY
    for event in (WorkerEvent.SPAWNED, WorkerEvent.BECAME_READY):
        worker._move(event)
    worker.restarts, worker.last_exit = 2, LastExit(None, "SIGKILL")
    worker.counters = {"syns": 4}
    worker.started_at, worker.last_heartbeat = 100.0, 200.0
    worker._policy.crashed(90.0, 0.0)
    return worker


def through(worker: Worker, records: Records) -> Worker:
    """The worker after it was handed over, as bytes."""
    kept = worker.keep(lets_go=True)
    data = handover.encode(state(workers=[kept]))
    [found] = handover.decode(data).workers
    assert found == kept
    # As the kernel does: the old objects never close what the new ones have.
    worker._process.channel._socket.detach()
    return Worker.adopt(found, WHO, LIMITS, Reach(), records)


def reap(worker: Worker) -> None:
    worker.kill("the test is over")
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not worker.has_ended():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    worker.reap(1000.0)


def test_worker_goes_on_with_process_history_and_log(far, records):
    rest = far.write_log("across both programs", in_two=True)
    os.write(far.error, b"a stack, first half\n")
    worker = through(ready_worker(far), records)
    os.write(far.log, rest[0])
    os.write(far.error, b"second half\n")
    records.wait_for("across both programs")
    assert (worker.pid, worker.state, worker.restarts) == (far.pid, WorkerState.READY, 2)
    assert worker.last_exit == LastExit(None, "SIGKILL")
    assert (worker.counters, worker.started_at, worker.last_heartbeat) == (
        {"syns": 4},
        100.0,
        200.0,
    )
    assert worker._policy.crashes == [90.0]
    far.end.send(m.Heartbeat(counters={"syns": 5}))
    assert worker.receive(201.0) == [m.Heartbeat(counters={"syns": 5})]
    worker.send(m.SetLogLevel(level="DEBUG"))
    assert far.end.receive() == (m.SetLogLevel(level="DEBUG"), [])
    for text in ("a stack, first half", "second half"):
        records.wait_for(text)
    reap(worker)
    assert worker.state is WorkerState.BACKOFF


def test_what_waits_for_a_worker_is_still_told_with_its_descriptors(far, records):
    worker = ready_worker(far)
    reader, writer = os.pipe()
    opened = m.ListenerOpened(address=b"\x64\x40\0\5", port=80)
    worker.slot = "proxy-0"  # tun gets no listener
    while not worker.wants_to_write:
        worker.send(m.SetLogLevel(level="DEBUG"))
    worker.send(opened, [reader])
    os.close(reader)
    adopted = through(worker, records)
    adopted.send(opened, [])  # waits already
    assert [message for message, _ in adopted._outbox] == [m.SetLogLevel(level="DEBUG"), opened]
    # What the other end would be given is the pipe.
    os.write(writer, b"x")
    [copy] = adopted._outbox[1][1]
    assert os.read(copy, 1) == b"x"
    os.close(writer)
    reap(adopted)
    assert not adopted.wants_to_write


def test_message_that_a_newer_program_does_not_know_ends_the_worker(far, records):
    worker = ready_worker(far)
    kept = worker.keep(lets_go=True)
    worker._process.channel._socket.detach()
    waiting = [handover.KeptMessage(data=b"\x81\xa1t\xa5Nonce")]
    process = msgspec.structs.replace(kept.process, waiting=waiting)
    adopted = Worker.adopt(
        msgspec.structs.replace(kept, process=process), WHO, LIMITS, Reach(), records
    )
    assert adopted._is_killed
    reap(adopted)
    assert adopted.last_exit == LastExit(None, "SIGKILL")


def test_process_of_an_earlier_version_is_not_told_what_ends_it(far, records):
    """It ends when it hears a message that it does not know, and with it its connections."""
    news = m.SecurityChanged(access=m.Access(uids=[]), http=m.HttpRules())
    worker = ready_worker(far)
    far.end._me = Role.PROXY  # tun is not told
    worker.send(news)
    assert far.end.receive() == (news, [])
    same = through(worker, records)
    same.send(news)
    assert far.end.receive() == (news, [])
    kept = same.keep(lets_go=True)
    same._process.channel._socket.detach()
    # As a program leaves it that knows nothing of this.
    raw = msgspec.to_builtins(kept, builtin_types=(bytes,))
    del raw["process"]["conversation"]
    older = Worker.adopt(msgspec.convert(raw, KeptWorker), WHO, LIMITS, Reach(), records)
    older.send(news)
    older.send(m.SetLogLevel(level="DEBUG"))
    assert far.end.receive() == (m.SetLogLevel(level="DEBUG"), [])
    assert far.end.receive() is None
    # Nor is the program after the next told that it understands more.
    assert older.keep(lets_go=False).process.conversation == 0
    reap(older)


def test_log_is_read_again_when_nothing_came_of_it(far, records):
    worker = ready_worker(far)
    kept = worker.keep(lets_go=True)
    far.write_log("while nobody reads")
    worker.hear_again(kept, records)
    records.wait_for("while nobody reads")
    far.end.send(m.Heartbeat(counters={}))
    assert worker.receive(201.0) == [m.Heartbeat(counters={})]
    reap(worker)


def test_slot_without_a_process_keeps_its_appointment():
    worker = Worker("tun", WHO, LIMITS)
    for event in (WorkerEvent.SPAWNED, WorkerEvent.CRASHED):
        worker._move(event)
    worker.restart_at = 300.0
    adopted = Worker.adopt(worker.keep(lets_go=True), WHO, LIMITS, Reach(), Records())
    assert (adopted.state, adopted.restart_at, adopted.pid) == (WorkerState.BACKOFF, 300.0, None)

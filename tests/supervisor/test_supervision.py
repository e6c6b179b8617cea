"""The supervisor with real forks, real channels and real signals; the workers are pretended."""

import asyncio
import contextlib
import errno
import gc
import os
import re
import signal
import socket
import time
from pathlib import Path

import msgspec
import pretend_worker
import pytest
from run_fakes import CLUSTER, ROOM_BYTES
from supervised_run import NoDataPlane, SupervisedRun, supervised_run

from ipc import codec, counters
from ipc import messages as m
from ipc.socket_owner import SocketDiag
from supervisor import control_messages as cm
from supervisor import worker as slots
from supervisor.channels import Channels
from supervisor.host import Host
from supervisor.supervisor import Supervisor
from supervisor.worker_states import WorkerState

SLOTS = ["tun", "proxy-0", "proxy-1", "ssh", "dns"]


def pids(status) -> dict[str, int]:
    return {worker.name: worker.pid for worker in status.workers}


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True  # before the file was opened, or between that and the reading


def test_all_become_ready_and_end_in_reverse_order(directory):
    with supervised_run(directory) as run:
        found = run.wait_until_healthy()
        assert [worker.name for worker in found.workers] == SLOTS
        assert all(worker.state is WorkerState.READY for worker in found.workers)
        assert all(worker.restarts == 0 for worker in found.workers)
    ended = re.findall(r"INFO supervisor\[\d+\]: (\S+) ended$", run.log, re.MULTILINE)
    assert ended[0] == "dns"
    assert set(ended[1:4]) == {"proxy-0", "proxy-1", "ssh"}
    assert ended[4] == "tun"
    assert all(is_gone(pid) for pid in pids(found).values())


@pytest.mark.parametrize("slot", SLOTS)
def test_killed_worker_is_replaced_and_the_others_notice_nothing(directory, slot):
    with supervised_run(directory) as run:
        before = pids(run.wait_until_healthy())
        os.kill(before[slot], signal.SIGKILL)
        replaced = run.wait_for_worker(slot, restarts=1, state=WorkerState.READY)
        after = pids(run.wait_until_healthy())
        assert replaced.last_exit.signal == "SIGKILL"
        assert {name for name in before if before[name] != after[name]} == {slot}


def test_worker_for_which_there_is_no_socket_to_ask_with_is_started_again(
    directory, monkeypatch, marker
):
    """It would refuse everybody as long as it lives."""
    there_is_one = SocketDiag.open

    def open_or_fail():
        if marker.is_set:
            marker.is_set = False
            raise OSError(errno.EMFILE, "Too many open files")
        return there_is_one()

    marker.is_set = False
    monkeypatch.setattr(SocketDiag, "open", open_or_fail)
    with supervised_run(directory) as run:
        before = pids(run.wait_until_healthy())
        marker.is_set = True
        os.kill(before["proxy-0"], signal.SIGKILL)
        run.wait_for(lambda _: "proxy-0 is killed: there is no socket now to ask with" in run.log)
        run.wait_for_worker("proxy-0", restarts=2, state=WorkerState.READY)
        after = pids(run.wait_until_healthy())
        assert {name for name in before if before[name] != after[name]} == {"proxy-0"}


def test_worker_that_crashes_too_often_is_given_up_and_can_be_brought_back(directory, marker):
    with supervised_run(directory, dns=pretend_worker.crash_while(marker)) as run:
        failed = run.wait_for_worker("dns", state=WorkerState.FAILED)
        assert failed.restarts == 3
        assert failed.last_exit.status == 9
        others = {name: pid for name, pid in pids(run.status()).items() if name != "dns"}
        status = run.wait_for(
            lambda found: all(
                worker.state is WorkerState.READY
                for worker in found.workers
                if worker.name != "dns"
            )
        )
        assert status.health == "degraded"
        assert "vnet restart dns" in status.reasons[0]
        marker.is_set = False
        run.order(cm.Restart(worker="dns"))
        after = pids(run.wait_until_healthy())
        assert {name: after[name] for name in others} == others


def test_crash_of_a_workers_code_is_in_the_log_with_its_stack(directory, marker):
    async def fail(_runtime):
        raise LookupError("of this worker")

    with supervised_run(directory, dns=pretend_worker.once(marker, fail)) as run:
        replaced = run.wait_for_worker("dns", restarts=1, state=WorkerState.READY)
        assert replaced.last_exit.status == 70
        run.wait_for(lambda _found: "LookupError: of this worker" in run.log)
    assert re.search(r"ERROR dns\[\d+\]: dns crashed\n    Traceback", run.log)


def test_worker_whose_loop_hangs_is_killed_and_replaced(directory, marker):
    with supervised_run(directory, tun=pretend_worker.once(marker, pretend_worker.hang)) as run:
        replaced = run.wait_for_worker("tun", restarts=1, state=WorkerState.READY)
        assert replaced.last_exit.signal == "SIGKILL"
        assert "tun hangs, its stack follows: no heartbeat for 1.5 s" in run.log
        assert "tun is killed: it hangs" in run.log
    # The line of the loop's own stack that says where it is stuck.
    assert re.search(r"tun\[\d+\]: (.*\n)*? +File .*pretend_worker.py.* in hang\n", run.log)


def test_stopped_process_is_killed_and_replaced(directory):
    with supervised_run(directory) as run:
        os.kill(pids(run.wait_until_healthy())["dns"], signal.SIGSTOP)
        run.wait_for_worker("dns", restarts=1, state=WorkerState.READY)
        assert "dns is stopped, by a SIGSTOP or a debugger: no heartbeat for 1.5 s" in run.log
    # It can write none.
    assert "stack follows" not in run.log


def test_no_worker_is_to_blame_for_time_in_which_the_supervisor_was_stopped(directory):
    """The kernel tells it in the next turn only that there is something to hear, epoll_wait(2)."""
    with supervised_run(directory) as run:
        before = pids(run.wait_until_healthy())
        for _ in range(2):
            os.kill(run.pid, signal.SIGSTOP)
            time.sleep(1.8)  # more than `hang_seconds`
            os.kill(run.pid, signal.SIGCONT)
            assert pids(run.wait_until_healthy()) == before
        assert "no heartbeat" not in run.log


def test_a_worker_that_wakes_up_after_the_supervisor_is_not_to_blame_either(directory):
    """As when a container goes on that was stopped with all its processes."""
    with supervised_run(directory) as run:
        before = pids(run.wait_until_healthy())
        for pid in (run.pid, before["dns"]):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.8)  # more than `hang_seconds`
        os.kill(run.pid, signal.SIGCONT)
        time.sleep(0.5)  # some turns of its loop, and less than `hang_seconds`
        os.kill(before["dns"], signal.SIGCONT)
        assert pids(run.wait_until_healthy()) == before
        # It is watched as before.
        os.kill(before["dns"], signal.SIGSTOP)
        run.wait_for_worker("dns", restarts=1, state=WorkerState.READY)


def test_worker_that_never_becomes_ready_is_killed(directory, marker, monkeypatch):
    monkeypatch.setattr(slots, "START_SECONDS", 1.0)
    never = pretend_worker.never_ready
    with supervised_run(directory, dns=pretend_worker.once(marker, never)) as run:
        run.wait_for_worker("dns", restarts=1)
        assert "dns hangs, its stack follows: not ready after 1 s" in run.log


def test_commanded_restart_is_no_crash(directory):
    with supervised_run(directory) as run:
        before = pids(run.wait_until_healthy())
        for _ in range(5):  # more often than crashes are allowed
            now = pids(run.wait_until_healthy())["dns"]
            run.order(cm.Restart(worker="dns"))
            run.wait_for(lambda found, now=now: pids(found)["dns"] not in (now, None))
        found = run.wait_until_healthy()
        assert pids(found)["tun"] == before["tun"]
        assert all(worker.restarts == 0 for worker in found.workers)


def test_proxy_that_needs_a_restart_gets_it_and_it_is_no_crash(directory, marker):
    asking = pretend_worker.send_raw(codec.encode(m.NeedsRestart(reason="/home/a/.tsh is new")))
    with supervised_run(directory, proxy_0=pretend_worker.once(marker, asking)) as run:
        run.wait_for(lambda _found: "proxy-0 is restarted: /home/a/.tsh is new" in run.log)
        found = run.wait_until_healthy()
        assert all(worker.restarts == 0 for worker in found.workers)


def test_wish_for_a_restart_does_not_put_off_the_end(directory, monkeypatch):
    monkeypatch.setattr(slots, "GRACE_SECONDS", 0.5)

    async def wish_for_ever(runtime):
        runtime.ready()
        while True:
            runtime.send(m.NeedsRestart(reason="again"))
            await asyncio.sleep(0.05)

    with supervised_run(directory, proxy_0=wish_for_ever) as run:
        run.wait_for(lambda _found: "proxy-0 is killed: it did not end in time" in run.log)
        assert run.worker("proxy-1").state is WorkerState.READY


def test_all_can_be_restarted_at_once(directory):
    with supervised_run(directory) as run:
        before = pids(run.wait_until_healthy())
        run.order(cm.Restart(worker="all"))
        run.wait_for(lambda found: not set(before.values()) & set(pids(found).values()))
        assert all(worker.restarts == 0 for worker in run.wait_until_healthy().workers)


@pytest.mark.parametrize(
    ("owner", "broken"),
    [
        (Supervisor, "_watch"),
        (Supervisor, "_reap"),
        (Supervisor, "_timeout"),
        (Channels, "follow"),
        (Host, "tick"),
    ],
)
def test_fault_of_the_loop_leaves_no_worker_behind(directory, monkeypatch, owner, broken):
    """Whichever part it is, it is broken as well while the workers are stopped."""
    is_broken, piece = pretend_worker.Marker(), getattr(owner, broken)
    is_broken.is_set = False

    def fail(*arguments):
        if is_broken.is_set:
            raise LookupError(broken)
        return piece(*arguments)

    closed = directory / "closed"
    monkeypatch.setattr(owner, broken, fail)
    monkeypatch.setattr(NoDataPlane, "close", note_children(closed))
    run = SupervisedRun(directory, "")
    pretend_worker.BEHAVIOURS.clear()
    run.start()
    children = pids(run.wait_until_healthy())
    is_broken.is_set = True
    assert os.waitstatus_to_exitcode(os.waitpid(run.pid, 0)[1]) == 99
    # One that was told to stop may have ended by itself.
    assert "is killed: VNet ends after an internal error" in run.log
    assert all(is_gone(pid) for pid in children.values())
    # Before what they borrow was closed, and reaped.
    assert closed.read_text() == ""
    assert not run.run_dir.exists()


def note_children(path: Path):
    """A method that writes down which children its process has."""

    def note(_self):
        path.write_text(Path("/proc/thread-self/children").read_text())

    return note


def test_worker_that_does_not_stop_is_killed_in_the_end(directory, monkeypatch):
    monkeypatch.setattr(slots, "GRACE_SECONDS", 0.5)
    with supervised_run(directory, dns=pretend_worker.ignore_stop) as run:
        pid = pids(run.wait_until_healthy())["dns"]
    assert is_gone(pid)
    assert "dns is killed: it did not end in time" in run.log


FORBIDDEN = {
    "garbage": b"\xc1garbage",
    "an order": codec.encode(m.Stop(grace_seconds=1)),
    "a descriptor for itself": codec.encode(m.ListenerOpened(address=b"\x64\x40\3\4", port=1)),
    "what only proxies say": codec.encode(m.OpenListener(address=b"\x64\x40\3\4", port=1)),
    "too much": codec.encode(m.Ready()).ljust(codec.MAX_MESSAGE_BYTES + 1, b"\0"),
    "ready twice": codec.encode(m.Ready()),
    "confined twice": codec.encode(
        m.Confined(
            uid=0, no_new_privs=True, capabilities=[], landlock=9, seccomp="none", missing=[]
        )
    ),
    "a wish that only proxies have": codec.encode(m.NeedsRestart(reason="")),
    "a false witness": codec.encode(m.PeerMisbehaved(slot="tun", reason="I say so")),
    "nobody's name": codec.encode(m.PeerMisbehaved(slot="proxy-9", reason="")),
    "nothing": b"",
}


@pytest.mark.parametrize("datagram", FORBIDDEN.values(), ids=FORBIDDEN)
def test_worker_that_says_what_it_may_not_is_replaced_and_nobody_else(directory, marker, datagram):
    def behave_oddly():
        async def behave(runtime):
            runtime._channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            await pretend_worker.send_raw(datagram)(runtime)

        return behave

    with supervised_run(directory, dns=pretend_worker.once(marker, behave_oddly())) as run:
        run.wait_for_worker("dns", restarts=1, state=WorkerState.READY)
        status = run.wait_until_healthy()
        assert sum(worker.restarts for worker in status.workers) == 1
        assert "dns is killed" in run.log


def test_accused_peer_is_replaced_once(directory, marker):
    accusation = codec.encode(m.PeerMisbehaved(slot="dns", reason="line\n2026 INFO x: forged"))
    hold, unsaid = pretend_worker.Marker(), pretend_worker.Marker()

    async def accuse(runtime):
        runtime.send(m.ClustersReported(clusters=[]))
        runtime.ready()
        while hold.is_set:
            await asyncio.sleep(0.01)
        for _ in range(20):
            os.write(runtime._channel.fileno(), accusation)
        unsaid.is_set = False
        await runtime.stopping.wait()

    async def be_accused(runtime):
        # The second would be accused as well by what is said once it is ready.
        while marker.count and unsaid.is_set:
            await asyncio.sleep(0.01)
        marker.add_one()
        await pretend_worker.work(runtime)

    with supervised_run(directory, proxy_0=accuse, dns=be_accused) as run:
        # Before dns is ready an accusation would be its predecessor's.
        run.wait_until_healthy()
        hold.is_set = False
        run.wait_for_worker("dns", restarts=1, state=WorkerState.READY)
        status = run.wait_until_healthy()
        assert sum(worker.restarts for worker in status.workers) == 1
        assert run.log.count("dns is killed") == 1
    assert "\n2026 INFO x" not in run.log


def test_worker_that_hangs_up_but_lives_on_is_killed(directory, marker):
    def shut(runtime):
        runtime._channel._socket.shutdown(socket.SHUT_RDWR)

    odd = pretend_worker.once(marker, pretend_worker.hang_up(shut))
    with supervised_run(directory, dns=odd) as run:
        run.wait_for_worker("dns", restarts=1, state=WorkerState.READY)


@pytest.mark.parametrize(
    "message",
    [
        m.Heartbeat(counters={f"name{number}": 1 for number in range(400)}),
        m.ClustersReported(
            clusters=[
                m.Cluster(
                    name="x" * 200, profile="p", leaf_of=None, state=m.ClusterState.OK, user="u",
                    expires=None, zones=["BAD"] * 200, ranges=["0.0.0.0/0"] * 20, problem="p" * 500,
                )
            ]
            * 60
        ),
        m.OpenListener(address=b"\x7f\0\0\1", port=1),
    ],
    ids=lambda message: type(message).__name__,
)  # fmt: skip
def test_flood_of_a_worker_does_not_keep_the_supervisor_from_answering(directory, message):
    datagram = codec.encode(message)
    with supervised_run(directory, proxy_0=pretend_worker.flood(datagram)) as run:
        run.wait_for(lambda _found: True)
        # Each question raises if it is not answered in two seconds.
        while (found := run.status()).workers[1].state is not WorkerState.FAILED:
            time.sleep(0.02)
        others = [worker for worker in found.workers if worker.name != "proxy-0"]
        assert {worker.state for worker in others} == {WorkerState.READY}
        assert sum(worker.restarts for worker in others) == 0
        # Whichever limit is met first: it says too much, reads nothing, and sends no heartbeat.
        assert run.log.count("proxy-0 is killed: ") == 4
        assert run.log.count("gets no listener") < 100


def test_dns_is_told_by_each_proxy_that_names_may_have_changed(directory, marker):
    async def note(runtime):
        def hear(message, _descriptors):
            if isinstance(message, m.NamesChanged):
                marker.add_one()

        runtime.on_message = hear
        marker.is_set = False
        await pretend_worker.work(runtime)

    login = m.Cluster(
        name="root.test", profile="proxy.root.test", leaf_of=None, state=m.ClusterState.OK,
        user="alice", expires=None, zones=[], ranges=[],
    )  # fmt: skip
    logged_out = msgspec.structs.replace(login, state=m.ClusterState.NO_LOGIN)
    silent = msgspec.structs.replace(login, state=m.ClusterState.UNREACHABLE)

    async def report(runtime):
        runtime.ready()
        while marker.is_set:
            await asyncio.sleep(0.01)
        for clusters in ([], [login], [silent], [logged_out]):
            runtime.send(m.ClustersReported(clusters=clusters))
        await runtime.stopping.wait()

    with supervised_run(directory, dns=note, proxy_0=report, proxy_1=report) as run:
        run.wait_for(lambda found: [c.state for c in found.clusters or ()] == ["no_login"])
        deadline = time.monotonic() + 20
        while marker.count < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert marker.count == 4


def test_totals_of_an_ended_worker_are_kept(directory, marker):
    counting = codec.encode(m.Heartbeat(counters={"connections_total": 7, "connections_now": 3}))
    odd = pretend_worker.once(marker, pretend_worker.send_raw(counting, b"\xc1"))
    with supervised_run(directory, proxy_0=odd) as run:
        run.wait_for_worker("proxy-0", restarts=1, state=WorkerState.READY)
        found = run.wait_until_healthy().connections
        assert (found.total, found.active) == (7, 0)


def test_totals_of_liars_have_an_end(directory, marker):
    """What is more than 64 bits have could not be handed over to another version."""
    absurd = m.Heartbeat(counters={"connections_total": counters.MOST, "bytes_sent": 5})

    async def lie(runtime):
        if marker.count == 2:
            await pretend_worker.work(runtime)
            return
        marker.add_one()
        await pretend_worker.send_raw(codec.encode(absurd), b"\xc1")(runtime)

    with supervised_run(directory, proxy_0=lie) as run:
        run.wait_for_worker("proxy-0", restarts=2, state=WorkerState.READY)
        found = run.wait_until_healthy().connections
        assert (found.total, found.bytes_sent) == (counters.MOST, 10)


def test_health_is_not_lost_when_a_proxy_that_is_started_again_asks_its_cluster_anew(
    directory, marker, monkeypatch
):
    monkeypatch.setattr("supervisor.clusters.FIRST_ANSWER_SECONDS", 600.0)
    fresh = msgspec.structs.replace(CLUSTER, is_configured=False)

    async def report(runtime):
        """Says that it has an answer if `marker` counts 1."""
        runtime.send(m.ClustersReported(clusters=[fresh]))
        runtime.ready()
        while not runtime.stopping.is_set():
            if marker.count == 1:
                runtime.send(m.ClustersReported(clusters=[CLUSTER]))
                break
            await asyncio.sleep(0.01)
        await runtime.stopping.wait()

    with supervised_run(directory, proxy_0=report, proxy_1=report) as run:
        awaited = run.wait_for(lambda found: "clusters-awaited" in found.reason_ids)
        assert awaited.health == "starting"
        marker.add_one()
        before = pids(run.wait_until_healthy())
        marker.add_one()
        run.order(cm.Restart(worker="proxy-1"))
        found = run.wait_for(
            lambda found: (
                pids(found)["proxy-1"] != before["proxy-1"]
                and all(worker.state == "ready" for worker in found.workers)
            )
        )
        assert (found.health, found.reasons) == ("healthy", [])


# -- what a worker is --


def status_fields(thread: Path) -> dict[str, str]:
    lines = (thread / "status").read_text().splitlines()
    return {name: " ".join(value.split()) for name, value in (line.split(":", 1) for line in lines)}


@pytest.mark.root
def test_every_thread_of_a_worker_has_no_right_left(directory):
    with supervised_run(directory) as run:
        said = {worker.name: worker.confinement for worker in run.wait_until_healthy().workers}
        assert all(confinement.missing == [] for confinement in said.values())
        assert len({said[slot].uid for slot in ("tun", "dns", "proxy-0")}) == 3
        assert said["proxy-0"].uid == said["proxy-1"].uid == run.settings.user.uid
        for slot, pid in pids(run.status()).items():
            for thread in Path(f"/proc/{pid}/task").iterdir():
                found = status_fields(thread)
                uid = str(said[slot].uid)
                assert found["Uid"].split() == [uid] * 4
                assert found["Gid"].split() == [uid] * 4
                assert found["NoNewPrivs"] == "1"
                assert found["Seccomp"] == "2"
                assert found["Umask"] == "0077"
                for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                    assert int(found[name], 16) == 0, (slot, name)
                assert len(found["Groups"].split()) == 1  # the one of the bus
            assert found["Name"] == f"vnet-{slot}"[:15]
            assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")


def test_worker_collects_its_garbage_and_spares_what_it_was_made_of(directory):
    async def look(runtime):
        assert gc.isenabled()
        # What is neither frozen nor young is looked at again and again.
        assert len(gc.get_objects(generation=2)) < gc.get_freeze_count() / 10
        await pretend_worker.work(runtime)

    with supervised_run(directory, dns=look) as run:
        found = run.wait_until_healthy()
        assert all(worker.restarts == 0 for worker in found.workers)


@pytest.mark.root
def test_limits_of_a_worker(directory):
    with supervised_run(directory) as run:
        pid = pids(run.wait_until_healthy())["dns"]
        limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max core file size +0 +0 ", limits)
    soft, hard = re.search(r"Max open files +(\d+) +(\d+) ", limits).groups()
    assert int(soft) == int(hard) <= 65536
    soft, hard = re.search(r"Max data size +(\d+) +(\d+) ", limits).groups()
    assert int(soft) == int(hard) == ROOM_BYTES


def descriptors_of(pid: int) -> set[str]:
    return set(targets_of(pid).values())


def targets_of(pid: int) -> dict[int, str]:
    """What each descriptor of a process leads to; one that is closed meanwhile is left out."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = str(entry.readlink())
    return found


@pytest.mark.root
def test_worker_holds_only_the_descriptors_it_was_given(directory):
    """Channel, log, standard error, what uvloop opens, and /dev/null for the data plane's."""
    # Something of the supervisor's that no worker may see.
    with (directory / "secret").open("w+") as secret, supervised_run(directory) as run:
        for slot, pid in pids(run.wait_until_healthy()).items():
            open_now = targets_of(pid)
            assert open_now[0] == open_now[1] == os.devnull
            assert open_now[2].startswith("pipe:")
            given = sum(target == os.devnull for target in open_now.values()) - 2
            assert given == (2 if slot in ("tun", "dns") else 0)
            # A pipe has two ends and one name: two of them, of the log and of standard error, are
            # all that both processes hold.
            shared = set(open_now.values()) & descriptors_of(run.pid)
            assert {re.sub(r"\d+", "", target) for target in shared if target[0] != "/"} <= {
                "pipe:[]",
                "anon_inode:[eventpoll]",
                "anon_inode:[eventfd]",
            }
            assert sum(target.startswith("pipe:") for target in shared) == 2, open_now
            files = [target for target in open_now.values() if target.startswith("/")]
            assert set(files) == {os.devnull}
        assert not secret.closed


def test_workers_die_with_a_supervisor_that_is_killed(directory):
    with supervised_run(directory, tun=pretend_worker.ignore_stop) as run:
        children = pids(run.wait_until_healthy())
        os.kill(run.pid, signal.SIGKILL)
        os.waitpid(run.pid, 0)
        deadline = time.monotonic() + 10.0
        while not all(is_gone(pid) for pid in children.values()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        run.start()  # what the dead one left is no obstacle
        run.wait_until_healthy()


def test_second_run_in_the_same_directory_is_a_conflict(directory):
    with supervised_run(directory) as run:
        run.wait_until_healthy()
        first = run.pid
        run.start()
        _, status = os.waitpid(run.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 99
        run.pid = first
        run.wait_until_healthy()


def test_status_is_the_same_as_json_and_decoded(directory):
    with supervised_run(directory) as run:
        found = run.wait_until_healthy()
        assert found.supervisor.pid == run.pid
        assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found

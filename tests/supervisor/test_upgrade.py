"""How a program is checked and executed anew (supervisor.upgrade), with small programs in its place."""

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from run_fakes import NETWORK

from supervisor import control_messages as cm
from supervisor import handover, upgrade
from supervisor.handover import Handover, HandoverError, KeptDevices
from supervisor.upgrade import VARIABLE, Check, Upgrade, UpgradeError

DEADLINE_SECONDS = 30.0
UNDERSTANDS = """
import os, sys
from supervisor import handover, upgrade
assert sys.argv[1:] == ["--check-config"]
print("VNet", handover.unseal(upgrade.take_descriptor(os.environ)).version)
"""


def state(**changed: object) -> Handover:
    values: dict[str, object] = {
        "pid": os.getpid(),
        "version": "1.2.3",
        "config": {},
        "network": NETWORK,
        "keys": {},
        "identities": {},
        "lock": 0,
        "control": 0,
        "devices": KeptDevices(outer=0, inner=0, namespace=0, dns=[]),
        "listeners": [],
        "workers": [],
        "started_at": 0.0,
        "were_ready": True,
        "log_level": "INFO",
    }
    return Handover(**values | changed)  # type: ignore[arg-type]


def state_with(descriptor: int) -> Handover:
    """One whose descriptors are all this one, so that none of the test runner's is touched."""
    devices = KeptDevices(outer=descriptor, inner=descriptor, namespace=descriptor, dns=[])
    return state(lock=descriptor, control=descriptor, devices=devices)


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def outcome(check: Check) -> tuple[bool, str]:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (found := check.poll(time.monotonic())) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found, check.answer


# -- the check --


def test_program_that_understands_the_state_may_go_on():
    assert outcome(Check(python(UNDERSTANDS), state(), time.monotonic())) == (True, "VNet 1.2.3")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit('no')", "no"),
        ("raise SystemExit(3)", "it ended with status 3"),
        ("import os; os.kill(os.getpid(), 9)", "it ended with status -9"),
        ("print('one\\n\\x1b[2Jtwo\\n'); raise SystemExit(1)", " [2Jtwo"),
        ("print('x' * 1_000_000, 'end'); raise SystemExit(1)", "x" * 400),
        ("def (", 'SyntaxError: invalid syntax (File "<string>", line 1)'),
    ],
)
def test_reason_of_a_program_that_cannot_is_its_last_line(program, said):
    assert outcome(Check(python(program), state(), time.monotonic())) == (False, said)


def test_program_that_does_not_answer_is_not_waited_for():
    began = time.monotonic()
    check = Check(python("import time; time.sleep(100)"), state(), began)
    assert check.poll(began + upgrade.CHECK_SECONDS - 1) is None
    assert check.poll(began + upgrade.CHECK_SECONDS + 1) is False
    assert "did not answer within" in check.answer
    assert check._child.returncode == -signal.SIGKILL


def test_program_that_is_not_there_is_an_error():
    with pytest.raises(UpgradeError, match=r"cannot be checked.*/nowhere/python"):
        Check(["/nowhere/python"], state(), 0.0)


def test_check_leaves_nothing_open():
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    outcome(Check(python("pass"), state(), time.monotonic()))
    check = Check(python("import time; time.sleep(100)"), state(), 0.0)
    check.close()
    check.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


# -- the order --


def given(answers: list[bytes], promise) -> None:
    promise._give = answers.append


def due(order: Upgrade, *, is_quiet: bool = True) -> bool:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while order._check is not None and not order.is_due(time.monotonic(), is_quiet=False):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return order.is_due(time.monotonic(), is_quiet=is_quiet)


def test_order_is_answered_when_the_program_is_about_to_be_executed():
    order, answers = Upgrade(), []
    assert not order.is_due(0.0, is_quiet=True)
    given(answers, order.order(python(UNDERSTANDS), state(), time.monotonic()))
    with pytest.raises(UpgradeError, match="under way already"):
        order.order(python("pass"), state(), time.monotonic())
    assert not due(order, is_quiet=False)
    assert order.is_due(time.monotonic(), is_quiet=True)
    assert not answers
    order.begin()
    [answer] = answers
    assert json.loads(answer) == {
        "status": 0,
        "text": "VNet 1.2.3 takes over; what is open goes on",
    }
    assert not order.is_due(time.monotonic(), is_quiet=True)


def test_order_fails_with_the_reason_and_may_be_given_again():
    order, answers = Upgrade(), []
    for _ in range(2):
        given(answers, order.order(python("raise SystemExit('no')"), state(), time.monotonic()))
        assert not due(order)
    assert [msgspec.json.decode(answer, type=cm.Answer).status for answer in answers] == [5, 5]
    assert b"nothing has changed: no" in answers[0]


def test_order_is_given_up_when_it_never_becomes_quiet():
    order, answers = Upgrade(), []
    given(answers, order.order(python("print('VNet 2')"), state(), time.monotonic()))
    assert not due(order, is_quiet=False)
    later = time.monotonic() + upgrade.QUIET_SECONDS + 1
    assert not order.is_due(later, is_quiet=False)
    assert b"try again" in answers[0]
    assert not order.is_due(later, is_quiet=True)


# -- the new program's side --


def test_without_the_variable_nothing_was_handed_over():
    assert upgrade.take_descriptor({"PATH": "/bin"}) is None


@pytest.mark.parametrize("text", ["", "x", "-1", "99999", "9" * 30])
def test_variable_that_names_no_descriptor_is_an_error(text):
    environment = {VARIABLE: text}
    with pytest.raises(HandoverError, match=VARIABLE):
        upgrade.take_descriptor(environment)
    assert not environment


def test_state_of_another_process_is_not_taken():
    with pytest.raises(HandoverError, match="process 1, not"):
        upgrade.adopt(handover.seal(state(pid=1)))


# -- execve --


def in_child(action: Callable[[], None]) -> bytes:
    """What the child, or the program that it becomes, writes to standard output."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(writer, 1)
            action()
        except BaseException:  # noqa: BLE001  # shown, and the parent fails
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return said


def test_descriptor_that_was_not_inherited_is_an_error():
    def adopt() -> None:
        # In a child: the other numbers of the state are closed when programs are executed from now on.
        with pytest.raises(HandoverError, match="descriptor 9999 was not handed over"):
            upgrade.adopt(handover.seal(state(control=9999)))
        os._exit(0)

    in_child(adopt)


REPORT = """
import json, os, signal
from supervisor import upgrade
state = upgrade.adopt(upgrade.take_descriptor(os.environ))
kept = set(state.descriptors())
blocked = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])}
pending = {int(number) for number in signal.sigpending()}
heard = []
for number in upgrade.SIGNALS:
    signal.signal(number, lambda number, _: heard.append(int(number)))
upgrade.unblock_signals()
print(json.dumps({
    "pid": os.getpid(), "same": state.pid, "extra": os.environ["EXTRA"],
    "open": sorted(int(d) for d in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{d}")),
    "kept": sorted(kept), "inheritable": [d for d in kept if os.get_inheritable(d)],
    "read": os.read(state.control, 10).decode(),
    "blocked": sorted(blocked), "pending": sorted(pending), "heard": heard,
}))
"""


def test_program_goes_on_as_the_same_process_with_what_was_named_only():
    def become() -> None:
        left, right = socket.socketpair()
        right.send(b"hello")
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(6)]
        os.dup2(held[5], 0)
        os.set_inheritable(held[4], True)  # as careless libraries do
        devices = KeptDevices(outer=held[0], inner=held[1], namespace=held[2], dns=[])
        with upgrade.signals_blocked():
            os.kill(os.getpid(), signal.SIGTERM)
            upgrade.become(
                python(REPORT),
                state(control=left.fileno(), lock=held[3], devices=devices),
                {"EXTRA": "yes"},
            )

    found = json.loads(in_child(become))
    assert found["pid"] == found["same"]
    assert found["extra"] == "yes"
    assert found["read"] == "hello"
    assert len(found["kept"]) == 5
    assert set(found["open"]) == {0, 1, 2, *found["kept"]}
    assert found["inheritable"] == []
    assert found["blocked"] == sorted(map(int, upgrade.SIGNALS))
    # A signal of the moment between is not lost.
    assert found["pending"] == found["heard"] == [signal.SIGTERM]


def test_program_that_cannot_be_executed_changes_nothing():
    left, right = socket.socketpair()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with left, right, upgrade.signals_blocked():
        with pytest.raises(UpgradeError, match=r"/nowhere/python.*cannot be executed"):
            upgrade.become(["/nowhere/python"], state_with(left.fileno()), {})
        assert not left.get_inheritable()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_command_is_the_one_that_started_this_process():
    assert upgrade.command() == [sys.executable, *sys.orig_argv[1:]]
    assert Path(upgrade.command()[0]).is_absolute()

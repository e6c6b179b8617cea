"""How often workers may have others or themselves restarted, and how many listeners they get."""

import contextlib
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_fakes import NETWORK, make_workers

from ipc.addresses import owner_of_address
from ipc.messages import DataPlaneKind
from ipc.order import ACCUSATION_SECONDS, MAX_ACCUSATIONS
from ipc.window import Window
from supervisor.listeners import ListenerRefusedError, Listeners
from supervisor.patience import MAX_BELIEVED, MAX_WISHES, WISH_SECONDS, Patience
from supervisor.restart_policy import RestartLimits


@given(
    st.lists(st.floats(0, 10), max_size=60),
    st.integers(1, 5),
    st.floats(0.1, 20),
)
def test_no_window_has_more_than_its_limit(pauses, limit, seconds):
    window, now, taken = Window(limit, seconds), 0.0, []
    for pause in pauses:
        now += pause
        recent = [at for at in taken if now - at < seconds]
        assert window.take(now) == (len(recent) < limit)
        if len(recent) < limit:
            taken.append(now)


def test_process_that_accuses_more_often_than_an_honest_one_is_not_borne():
    patience = Patience(5)
    assert all(patience.may_accuse(float(now)) for now in range(MAX_ACCUSATIONS))
    assert not patience.may_accuse(float(MAX_ACCUSATIONS))
    patience.begin()
    assert patience.may_accuse(float(MAX_ACCUSATIONS))


@pytest.mark.parametrize("restart_max", [0, 1, 3, 5, 1000])
def test_slot_is_not_believed_more_often_because_its_processes_change(restart_max):
    """Nor so often that a peer is given up for it."""
    patience = Patience(restart_max)
    believed = 0
    for _ in range(10):
        patience.begin()
        for _ in range(MAX_ACCUSATIONS):
            assert patience.may_accuse(1.0)
            believed += patience.believes(1.0)
    assert believed == max(1, min(MAX_BELIEVED, restart_max))
    assert not patience.for_successor().believes(1.0)
    assert patience.believes(1.0 + ACCUSATION_SECONDS)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (3, 3)])
def test_a_reloaded_limit_holds_for_a_slot_and_its_successor(before, after):
    slot = make_workers("dns")["dns"]
    slot.use_limits(RestartLimits(before, 30.0))
    successor = slot.patience.for_successor()
    while slot.patience.believes(1.0):
        pass
    slot.use_limits(RestartLimits(after, 30.0))
    assert sum(successor.believes(2.0) for _ in range(9)) == max(0, after - before)
    later = 3.0 + ACCUSATION_SECONDS
    assert sum(slot.patience.believes(later) for _ in range(9)) == after


def test_silence_of_an_honest_worker_is_long_enough_for_late_clocks():
    """It says as much as it may, then waits its time; all of it arrives late but the last."""
    patience = Patience(5)
    for number in range(MAX_ACCUSATIONS):
        assert patience.may_accuse(number + 60.0)
    assert patience.may_accuse(ACCUSATION_SECONDS)


def test_wishes_for_a_restart_are_limited_over_processes():
    patience = Patience(5)
    for _ in range(MAX_WISHES):
        patience.begin()
        assert patience.grants_restart(1.0)
    patience.begin()
    assert not patience.grants_restart(2.0)
    assert not patience.for_successor().grants_restart(2.0)
    assert patience.grants_restart(1.0 + WISH_SECONDS)


# -- listeners --


class LoopbackPlane:
    """Listeners of the machine itself, on ports of the kernel's choice."""

    kind = DataPlaneKind.NAMESPACE

    def __init__(self) -> None:
        self.opened = 0

    def open_listener(self, _address: bytes, _port: int) -> socket.socket:
        self.opened += 1
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        return listener


PROXIES = 2
ADDRESSES = [bytes([100, 64, number // 256, number % 256]) for number in range(256, 1256)]
OF = {
    index: [address for address in ADDRESSES if owner_of_address(address, PROXIES) == index]
    for index in range(PROXIES)
}


@pytest.fixture
def listeners():
    made = Listeners(LoopbackPlane(), PROXIES, 5 * (PROXIES + 1) + 2)  # type: ignore[arg-type]
    yield made
    made.close_all()


def fill(listeners: Listeners, index: int) -> int:
    """Opens as many as it gets; returns how many it has."""
    slot = f"proxy-{index}"
    with contextlib.suppress(ListenerRefusedError):
        for address in OF[index]:
            listeners.open(slot, NETWORK, address, 80)
    with pytest.raises(ListenerRefusedError, match=f"{slot} has 5 listeners already"):
        listeners.open(slot, NETWORK, OF[index][-1], 80)
    return len(list(listeners.of(slot)))


def test_proxy_that_wants_all_listeners_gets_its_share(listeners):
    assert fill(listeners, 0) == 5
    assert fill(listeners, 1) == 5


def test_share_is_of_what_is_open_now(listeners):
    fill(listeners, 0)
    # What is open is given again, and counted once.
    listeners.open("proxy-0", NETWORK, OF[0][0], 80)
    for address in OF[0][:2]:
        listeners.close("proxy-0", address, 80)
        listeners.close("proxy-0", address, 80)
    listeners.close("proxy-1", OF[0][2], 80)
    for address in OF[0][10:12]:
        listeners.open("proxy-0", NETWORK, address, 80)
    with pytest.raises(ListenerRefusedError):
        listeners.open("proxy-0", NETWORK, OF[0][12], 80)


def test_listener_that_cannot_be_opened_takes_no_share(listeners, monkeypatch):
    def fail(_address: bytes, _port: int) -> socket.socket:
        raise OSError(98, os.strerror(98))

    with monkeypatch.context() as patch:
        patch.setattr(LoopbackPlane, "open_listener", lambda *_: fail(b"", 0))
        for address in OF[0]:
            with pytest.raises(ListenerRefusedError, match="Address already in use"):
                listeners.open("proxy-0", NETWORK, address, 80)
    assert fill(listeners, 0) == 5

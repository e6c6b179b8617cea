"""What tun does when its supervisor has died (workers.tun.last_packets), in a forked child."""

import asyncio
import os
import signal
import time
import traceback
from collections.abc import Callable

import uvloop

from ipc.orphan import ORPHAN_SIGNAL
from workers.tun import last_packets
from workers.tun.last_packets import (
    HARD_LIMIT_SECONDS,
    LAST_SECONDS,
    STEP_SECONDS,
    move_last_packets,
    noticing_death,
)


def outcome(live: Callable[[], None], number: int) -> tuple[int, float]:
    """Exit status (negative: a signal) of a child that is told by a signal, and how long it took."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(tell, 100)
            live()
            os._exit(0)
        except BaseException:  # noqa: BLE001  # shown, and the parent fails
            traceback.print_exc()
        finally:
            os._exit(1)
    os.read(ready, 1)
    began = time.monotonic()
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    for end in (ready, tell):
        os.close(end)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def ready() -> None:
    os.write(100, b"x")


def test_it_goes_on_for_a_moment_and_ends(monkeypatch):
    # The kernel would be first on a busy machine.
    monkeypatch.setattr(last_packets, "HARD_LIMIT_SECONDS", 20.0)

    async def main() -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        moved = []
        looks = iter([False, False, True])

        def move() -> None:
            moved.append(1)
            loop.call_later(0.01, move)

        with noticing_death(loop, stopping.set):
            ready()
            await stopping.wait()
            move()
            await move_last_packets(lambda: next(looks))
            # The signal comes for each thread of the supervisor.
            os.kill(os.getpid(), ORPHAN_SIGNAL)
            assert len(moved) > 1
            assert list(looks) == [], "it has waited for the proxies"

    status, seconds = outcome(lambda: uvloop.run(main()), ORPHAN_SIGNAL)
    assert status == 0
    assert seconds >= 2 * STEP_SECONDS + LAST_SECONDS


def test_a_stuck_loop_is_ended_by_the_kernel():
    async def main() -> None:
        with noticing_death(asyncio.get_running_loop(), lambda: None):
            ready()
            while True:
                pass

    status, seconds = outcome(lambda: uvloop.run(main()), ORPHAN_SIGNAL)
    assert status == -signal.SIGALRM
    assert seconds >= HARD_LIMIT_SECONDS


def test_before_it_works_it_ends_at_once():
    def live() -> None:
        ready()
        signal.pause()

    assert outcome(live, ORPHAN_SIGNAL)[0] == -ORPHAN_SIGNAL


def test_the_limits_keep_everything_below_a_second():
    assert LAST_SECONDS < HARD_LIMIT_SECONDS < 1

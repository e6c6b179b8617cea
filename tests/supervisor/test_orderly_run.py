"""Commands in an event loop that a signal ends."""

import subprocess
import sys

import pytest

# The signal comes when what `work` waits for is there, and before the loop knows of that.
BETWEEN_TWO_STEPS = """
import asyncio, os, signal
from supervisor.cli.orderly_run import run_in_order

async def work():
    loop, news = asyncio.get_running_loop(), asyncio.Queue()
    at_once, left = loop.call_soon, [int(os.environ["NUMBER"])]

    def late(*arguments, **options):
        if left:
            os.kill(os.getpid(), left.pop())
        return at_once(*arguments, **options)

    def tell():
        loop.call_soon = late
        news.put_nowait("it")

    loop.call_later(0.01, tell)
    try:
        while True:
            await news.get()
    finally:
        print("cleaned up", flush=True)

run_in_order(work())
"""


@pytest.mark.parametrize("number", [1, 15])
def test_a_signal_between_two_steps_of_the_loop_ends_it_in_order(number):
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN_TWO_STEPS],
        env={"NUMBER": str(number)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "cleaned up\n", "")


def test_a_second_signal_ends_what_the_first_does_not_reach():
    program = """
import os
from supervisor.cli.orderly_run import run_in_order

async def work():
    _reading, writing = os.pipe()
    print("blocks", flush=True)
    while True:
        os.write(writing, bytes(4096))

run_in_order(work())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as blocked:
        try:
            assert blocked.stdout.readline() == b"blocks\n"
            # Two of one kind could become one, signal(7).
            blocked.send_signal(1)
            blocked.send_signal(15)
            assert blocked.wait(60) == 128 + 15
        finally:
            blocked.kill()


def test_what_ends_by_itself_has_its_result_and_leaves_no_handler():
    program = (
        "import asyncio, signal; from supervisor.cli.orderly_run import run_in_order;"
        "signal.signal(15, signal.SIG_IGN); print(run_in_order(asyncio.sleep(0, 'it')));"
        "print(signal.getsignal(15) is signal.SIG_IGN, signal.getsignal(1) is signal.SIG_DFL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("it\nTrue True\n", "")

"""A supervisor that would execute itself anew and cannot (supervisor.supervisor, upgrade)."""

import asyncio
import logging
import time

import pretend_worker
import pytest
from pretend_worker import Marker
from supervised_run import supervised_run

from supervisor import control_messages as cm
from supervisor import upgrade
from supervisor.cli.control_client import AskError, order
from supervisor.exits import ExitStatus

ORDER_SECONDS = 30.0
DEADLINE_SECONDS = 10.0


def speak_when_told(marker: Marker) -> pretend_worker.Behaviour:
    """A good worker that logs one line once the marker is not set any more."""

    async def behave(runtime: pretend_worker.AnyRuntime) -> None:
        runtime.ready()
        while marker.is_set:
            await asyncio.sleep(0.01)
        logging.getLogger("pretended").warning("heard again")
        await runtime.stopping.wait()

    return behave


def test_program_that_is_gone_when_it_is_to_be_executed_changes_nothing(directory, monkeypatch):
    monkeypatch.setattr(upgrade, "command", lambda: ["/nowhere/python"])
    monkeypatch.setattr(upgrade, "Check", YesSayer)
    marker = Marker()
    with supervised_run(directory, dns=speak_when_told(marker)) as run:
        before = run.wait_until_healthy()
        order(run.run_dir, cm.Restart(worker="all", drain=True), ORDER_SECONDS)
        wait_for_log(run, "VNet goes on as it is: /nowhere/python cannot be executed")
        marker.is_set = False
        wait_for_log(run, "heard again")
        after = run.wait_until_healthy()
        assert [w.pid for w in after.workers or ()] == [w.pid for w in before.workers or ()]
        # Signals are listened to again: the end of the block is a SIGTERM.


def test_program_that_is_not_there_refuses_the_order(directory, monkeypatch):
    monkeypatch.setattr(upgrade, "command", lambda: ["/nowhere/python"])
    with supervised_run(directory) as run:
        run.wait_until_healthy()
        with pytest.raises(AskError, match="cannot be checked") as caught:
            order(run.run_dir, cm.Restart(worker="all", drain=True), ORDER_SECONDS)
        assert caught.value.status is ExitStatus.CONFLICT
        run.wait_until_healthy()


class YesSayer:
    """A check that is passed at once."""

    answer = "VNet 9"

    def __init__(self, _program: object, _state: object, _now: float) -> None:
        pass

    def poll(self, _now: float) -> bool:
        return True


def wait_for_log(run, text: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while text not in run.log:
        assert time.monotonic() < deadline, run.log
        time.sleep(0.02)

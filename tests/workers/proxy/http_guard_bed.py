"""A guard for app.demo.test, and what came of bytes that were given to it."""

from dataclasses import dataclass, field

from ipc.messages import HttpRules
from workers.proxy.http_guard.guard import Guard, Step
from workers.proxy.http_guard.refusal import Refused
from workers.proxy.http_guard.rules import rules_for

NAME = "app.demo.test"
OTHER_NAME = "alias.corp.test"
RIGHT_SITE = "https://portal.corp.test:8443"


def rules(name: str = NAME, **changes):
    return rules_for(name, HttpRules(**changes))


def generous():
    """Rules with another name and another site."""
    return rules(hosts={NAME: [OTHER_NAME]}, origins={NAME: [RIGHT_SITE]})


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Outcome:
    """What reached the app, and what became of the connection."""

    passed: bytes = b""
    refusal: Refused | None = None
    is_done: bool = False
    deadline_seconds: float | None = None
    steps: list[Step] = field(default_factory=list)

    @property
    def status(self) -> int:
        return self.refusal.status if self.refusal else 0

    def note(self, step: Step) -> None:
        self.steps.append(step._replace(send=bytes(step.send)))
        self.passed += bytes(step.send)
        self.refusal = step.refusal
        self.is_done = step.is_done
        self.deadline_seconds = step.deadline_seconds


def given(*pieces, chosen=None, guard=None, answers=()) -> Outcome:
    """Feeds the pieces until the guard is done or refuses, from one buffer that is used again.

    `answers` are given as soon as the guard wants them, each once.
    """
    guard = guard or Guard(chosen or rules(), Clock())
    left = list(answers)
    outcome = Outcome()
    for piece in pieces:
        if outcome.is_done:
            outcome.passed += piece
            continue
        buffer = bytearray(piece)
        outcome.note(guard.from_program(memoryview(buffer)))
        buffer[:] = b"\xff" * len(buffer)  # as the next read does
        while left and guard.wants_answers and not outcome.refusal:
            outcome.note(guard.from_app(left.pop(0)))
        if outcome.refusal:
            break
    return outcome


def bytewise(sent: bytes):
    return [sent[i : i + 1] for i in range(len(sent))]


def request(*fields: str, line: str = "GET / HTTP/1.1", host: str | None = NAME, body=b"") -> bytes:
    hosts = [] if host is None else [f"Host: {host}"]
    return "".join(f"{part}\r\n" for part in (line, *hosts, *fields, "")).encode("latin-1") + body

"""What became of connections and questions, and which event explains it. Pure.

Times are monotonic seconds, the same in all processes of a machine.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

import msgspec

from ipc.slots import SSH


class Outcome(StrEnum):
    """How a connection went."""

    COMPLETED = "completed"
    RESET = "reset"
    ENDED_EARLY = "ended early"  # without an error, though more was to come
    REFUSED = "refused"
    HUNG = "hung"  # nothing for so long that every program would have given up


class Answer(StrEnum):
    """How a question went, after the asker's own repetition."""

    RIGHT = "right"
    WRONG = "wrong"  # another address than before
    NO_ANSWER = "no answer"
    FAILED = "failed"  # SERVFAIL and its like
    NO_SUCH_NAME = "no such name"


class Names(StrEnum):
    """Which names are asked for."""

    KNOWN = "known"  # apps that were connected to
    FRESH = "fresh"  # apps nobody has asked for
    FOREIGN = "foreign"


class Cause(StrEnum):
    """What explains a cut, a refusal or a failed question."""

    KILLED_PROXY = "killed proxy"
    STOPPED_PROXY = "stopped proxy"
    KILLED_SSH = "killed ssh"
    STOPPED_SSH = "stopped ssh"
    KILLED_OTHER = "killed tun or dns"
    LOGOUT = "logout"
    CLUSTER_DROPPED = "cluster dropped"
    DISK_FULL = "disk full"
    FLOODED = "flooded"
    STOPPED_OTHER = "stopped tun or dns"
    OTHER = "other"


class Connection(msgspec.Struct, tag="connection", kw_only=True):
    """One connection; `owner` is the worker that carries it: a proxy, or `ssh`.

    A gap is a time without any bytes, of a transfer that went on afterwards.
    """

    way: str
    app: str
    owner: str
    began: float
    ended: float
    outcome: Outcome
    bytes: int = 0
    wrong: int = 0
    gaps: list[tuple[float, float]] = []
    detail: str = ""


class Question(msgspec.Struct, tag="question", kw_only=True):
    """One name that was asked for; `way` is udp or tcp."""

    way: str
    names: Names
    name: str
    began: float
    ended: float
    answer: Answer
    tries: int
    detail: str = ""


class Lag(msgspec.Struct, tag="lag", kw_only=True):
    """The load itself did not run for a while: what it saw then is not VNet's doing alone."""

    began: float
    ended: float


Record: TypeAlias = Connection | Question | Lag


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """The time in which an event may explain something; `worker` limits it to what that one carries."""

    cause: Cause
    began: float
    ended: float
    worker: str = ""
    cuts: bool = False
    refuses: bool = False
    hides: frozenset[Names] = frozenset()

    def holds(self, began: float, ended: float) -> bool:
        """Whether this time and that of the window touch."""
        return self.began <= ended and began <= self.ended


_APP_NAMES: Final = frozenset({Names.KNOWN, Names.FRESH})
# Which questions fail, whether connections are cut and whether they are refused while the event lasts.
_MEANING: Final[dict[str, tuple[Cause, frozenset[Names], bool, bool]]] = {
    "kill": (Cause.KILLED_PROXY, frozenset(), True, False),
    "stop": (Cause.STOPPED_PROXY, frozenset(), True, False),
    "logout": (Cause.LOGOUT, _APP_NAMES, True, True),
    "proxy_down": (Cause.CLUSTER_DROPPED, _APP_NAMES, True, True),
    "auth_down": (Cause.CLUSTER_DROPPED, _APP_NAMES, False, True),
    "close_apps": (Cause.CLUSTER_DROPPED, frozenset(), True, True),
    "disk_full": (Cause.DISK_FULL, frozenset({Names.FRESH}), False, False),
    # So many SYNs wait that no more are taken.
    "flood_syn": (Cause.FLOODED, frozenset(), False, True),
    # So many questions come that some find no room, here or at the server above VNet.
    "flood_dns": (Cause.FLOODED, frozenset(Names), False, False),
}


_OF_SSH: Final = {Cause.KILLED_PROXY: Cause.KILLED_SSH, Cause.STOPPED_PROXY: Cause.STOPPED_SSH}


def carries(worker: str) -> bool:
    """Whether connections end when this worker does."""
    return worker.startswith("proxy-") or worker == SSH


def window_of(kind: str, target: str, began: float, ended: float) -> Window | None:
    """The window of an event of this kind, None when it explains nothing."""
    if target and not carries(target):
        if kind != "stop":
            return None
        # It hangs for longer than a resolver waits.
        return Window(cause=Cause.STOPPED_OTHER, began=began, ended=ended, hides=frozenset(Names))
    if kind not in _MEANING:
        return None
    cause, hides, cuts, refuses = _MEANING[kind]
    if target == SSH:
        cause = _OF_SSH.get(cause, cause)
    return Window(
        cause=cause,
        began=began,
        ended=ended,
        worker=target,
        cuts=cuts,
        refuses=refuses,
        hides=hides,
    )


def why_cut(connection: Connection, windows: Iterable[Window]) -> Cause:
    """What explains a connection that did not complete: the latest event that can."""
    for window in _latest_first(windows):
        if window.worker not in ("", connection.owner):
            continue
        if connection.outcome in (Outcome.RESET, Outcome.ENDED_EARLY):
            if window.cuts and window.holds(connection.ended, connection.ended):
                return window.cause
        # Refused late, because it was held: the event may be over.
        elif (
            connection.outcome is Outcome.REFUSED
            and window.refuses
            and window.holds(connection.began, connection.ended)
        ):
            return window.cause
    return Cause.OTHER


def _latest_first(windows: Iterable[Window]) -> list[Window]:
    return sorted(windows, key=lambda window: -window.began)


def why_unanswered(question: Question, windows: Iterable[Window]) -> Cause:
    """What explains a question without its answer."""
    if question.answer is not Answer.WRONG:
        for window in _latest_first(windows):
            if question.names in window.hides and window.holds(question.began, question.ended):
                return window.cause
    return Cause.OTHER


class Accounts(msgspec.Struct, kw_only=True):
    """What a run's records come to."""

    connections: dict[str, int]
    # outcome -> cause -> number
    cut: dict[str, dict[str, int]]
    bytes: int
    wrong_bytes: int
    questions: int
    questions_repeated: int
    # cause -> number, after the asker's repetition
    unanswered: dict[str, int]
    wrong_answers: int
    # The longest gap of a transfer that went on: while tun was stopped, and otherwise.
    longest_stall: float
    longest_stall_while_stopped: float
    stalls: list[dict[str, object]]
    lag: float
    unexplained: list[dict[str, object]]

    @property
    def cut_by_other(self) -> int:
        """How many connections nothing explains."""
        return sum(causes.get(Cause.OTHER, 0) for causes in self.cut.values())


_MOST_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class _Gap:
    """A time in which a transfer stood still."""

    began: float
    ended: float
    connection: Connection

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def touches(self, times: Iterable[tuple[float, float]]) -> bool:
        return any(began <= self.ended and self.began <= ended for began, ended in times)

    def as_json(self, origin: float) -> dict[str, object]:
        return {
            "seconds": round(self.seconds, 2),
            "began": round(self.began - origin, 2),
            "way": self.connection.way,
            "owner": self.connection.owner,
        }


def settle(
    records: Sequence[Record],
    windows: Sequence[Window],
    stopped: Sequence[tuple[float, float]],
    origin: float = 0.0,
) -> Accounts:
    """The accounts of a run.

    `stopped` are the times in which tun was stopped; `origin` is what shown times count from.
    """
    connections = [record for record in records if isinstance(record, Connection)]
    questions = [record for record in records if isinstance(record, Question)]
    cut: dict[str, Counter[str]] = {}
    unanswered: Counter[str] = Counter()
    unexplained: list[dict[str, object]] = []

    def explain(record: Connection | Question, cause: Cause) -> None:
        if cause is Cause.OTHER:
            shown = msgspec.to_builtins(record)
            shown["began"] = round(record.began - origin, 2)
            shown["ended"] = round(record.ended - origin, 2)
            shown.pop("gaps", None)
            unexplained.append(shown)

    for connection in connections:
        if connection.outcome is not Outcome.COMPLETED:
            cause = why_cut(connection, windows)
            cut.setdefault(connection.outcome, Counter())[cause] += 1
            explain(connection, cause)
    for question in questions:
        if question.answer is not Answer.RIGHT:
            cause = why_unanswered(question, windows)
            unanswered[cause] += 1
            explain(question, cause)
    gaps = [_Gap(begin, end, one) for one in connections for begin, end in one.gaps]
    gaps.sort(key=lambda gap: gap.began - gap.ended)
    while_stopped = [gap for gap in gaps if gap.touches(stopped)]
    others = [gap for gap in gaps if not gap.touches(stopped)]
    return Accounts(
        connections=dict(Counter(record.way for record in connections))
        | {
            "opened": len(connections),
            "completed": sum(record.outcome is Outcome.COMPLETED for record in connections),
        },
        cut={outcome: dict(causes) for outcome, causes in cut.items()},
        bytes=sum(record.bytes for record in connections),
        wrong_bytes=sum(record.wrong for record in connections),
        questions=len(questions),
        questions_repeated=sum(question.tries > 1 for question in questions),
        unanswered=dict(unanswered),
        wrong_answers=sum(question.answer is Answer.WRONG for question in questions),
        longest_stall=others[0].seconds if others else 0.0,
        longest_stall_while_stopped=while_stopped[0].seconds if while_stopped else 0.0,
        stalls=[gap.as_json(origin) for gap in (*others[:5], *while_stopped[:2])],
        lag=max((r.ended - r.began for r in records if isinstance(r, Lag)), default=0.0),
        unexplained=unexplained[:_MOST_SHOWN],
    )

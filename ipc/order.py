"""When what may be said in the conversation of supervisor and worker, as data. Pure.

Who may say a message at all stands in `ipc.permits`; here is in which order. Each end keeps the
stage of the other one's words: the supervisor a `Stage` of each worker process, the worker a `Duty`
of its own. A message without a row ends the conversation like a forbidden one.
"""

from enum import StrEnum
from typing import Final, TypeAlias

from ipc import messages as m
from ipc.errors import ForbiddenMessageError


class Stage(StrEnum):
    """How far a worker process is, as the supervisor has heard."""

    FORKED = "forked"  # has said nothing
    CONFINED = "confined"  # has given up its rights and sets itself up
    READY = "ready"
    DRAINING = "draining"  # was told to take nothing new, and has not yet said that it does so
    HANDED_OVER = "handed over"


class Duty(StrEnum):
    """What a worker was told to do."""

    WAITING = "waiting"  # without a configuration
    STANDBY = "standby"  # set up, but another still does the work
    WORKING = "working"
    DRAINING = "draining"


# How often a worker accuses its peers on the bus (PeerMisbehaved). One that does so more often is
# taken for a liar (`supervisor.patience`).
MAX_ACCUSATIONS: Final = 20
ACCUSATION_SECONDS: Final = 3600.0

MessageType: TypeAlias = type[m.Message]

# A worker of an earlier version may go on under a newer supervisor, and ends when it is told what it does not
# know. So the conversation has a number, which rises with each message that comes to the others for workers
# that were there before: `SINCE` has the first number of each such message.
CONVERSATION: Final = 2
SINCE: Final[dict[MessageType, int]] = {m.SecurityChanged: 1, m.Sync: 2}

_S, _D = Stage, Duty
# What changes no stage, by the stages in which it may be said.
_ANY_TIME: Final[tuple[MessageType, ...]] = (
    m.Heartbeat,
    m.Synced,
    m.NeedsRestart,
    m.ClustersReported,
    m.PeerMisbehaved,
)
_AT_WORK: Final[tuple[MessageType, ...]] = (*_ANY_TIME, m.OpenListener, m.CloseListener)

# (stage, what a worker says) -> stage.
SAID: Final[dict[tuple[Stage, MessageType], Stage]] = {
    (_S.FORKED, m.Confined): _S.CONFINED,
    (_S.CONFINED, m.Ready): _S.READY,
    **{(_S.CONFINED, kind): _S.CONFINED for kind in _ANY_TIME},
    **{(_S.READY, kind): _S.READY for kind in _AT_WORK},
    # What was on its way when it was told.
    **{(_S.DRAINING, kind): _S.DRAINING for kind in _AT_WORK},
    (_S.DRAINING, m.HandedOver): _S.HANDED_OVER,
    # No listener any more: those of the slot are its successor's.
    **{(_S.HANDED_OVER, kind): _S.HANDED_OVER for kind in _ANY_TIME},
}

_CONFIGURATIONS: Final[tuple[MessageType, ...]] = (
    m.ConfigureTun,
    m.ConfigureDns,
    m.ConfigureProxy,
    m.ConfigureMetrics,
)
_NEWS: Final[tuple[MessageType, ...]] = (
    m.NetworkChanged,
    m.RedirectsChanged,
    m.UpstreamChanged,
    m.SecurityChanged,
    m.NamesChanged,
    m.ListenerOpened,
    m.ListenerRefused,
    m.MetricsSnapshot,
    m.SetLogLevel,
    m.Sync,
    m.Stop,
)

# (duty, what a worker is told) -> duty. A configuration for a standby leads to STANDBY instead.
TOLD: Final[dict[tuple[Duty, MessageType], Duty]] = {
    **{(_D.WAITING, kind): _D.WORKING for kind in _CONFIGURATIONS},
    **{(duty, kind): duty for duty in (_D.STANDBY, _D.WORKING, _D.DRAINING) for kind in _NEWS},
    (_D.STANDBY, m.TakeOver): _D.WORKING,
    (_D.WORKING, m.Drain): _D.DRAINING,
}


def after_saying(stage: Stage, message: m.Message) -> Stage:
    """The stage of a worker that has said this.

    Raises:
        ForbiddenMessageError: it may not say this now.
    """
    following = SAID.get((stage, type(message)))
    if following is None:
        raise ForbiddenMessageError(f"{type(message).__name__} came while it was {stage}")
    return following


def after_being_told(duty: Duty, message: m.Message) -> Duty:
    """The duty of a worker that was told this.

    Raises:
        ForbiddenMessageError: it may not be told this now.
    """
    following = TOLD.get((duty, type(message)))
    if following is None:
        raise ForbiddenMessageError(f"{type(message).__name__} came while this worker was {duty}")
    match message:
        case m.ConfigureTun() | m.ConfigureDns() | m.ConfigureProxy() | m.ConfigureMetrics():
            return Duty.STANDBY if message.common.is_standby else following
        case _:
            return following

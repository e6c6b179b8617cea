"""Answers to the dns worker, and how long it may keep them. Pure."""

from dataclasses import dataclass

from ipc.messages import NameOutcome

# How long dns may answer by itself. A login, a new or a removed app is seen after this time, so it
# is short; every second of it saves a question per name to a proxy.
VALID_SECONDS = 5.0
# While a cluster cannot be asked its return is looked for more often.
UNCERTAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent as NameResolved. `ipv4` is packed, and set exactly for ADDRESS."""

    outcome: NameOutcome
    ipv4: bytes | None
    valid_seconds: float


def given(ipv4: bytes, *, is_certain: bool = True) -> Answer:
    """The name has this address."""
    return Answer(NameOutcome.ADDRESS, ipv4, _seconds(is_certain=is_certain))


def forwarded(*, is_certain: bool = True) -> Answer:
    """The name is not VNet's."""
    return Answer(NameOutcome.NOT_OURS, None, _seconds(is_certain=is_certain))


def no_such_name() -> Answer:
    """The name would be VNet's, and nothing has it."""
    return Answer(NameOutcome.NO_SUCH_NAME, None, VALID_SECONDS)


def missing(*, range_is_full: bool) -> Answer:
    """The name may be VNet's, but there is no address for it; asked again each time."""
    return Answer(NameOutcome.RANGE_FULL if range_is_full else NameOutcome.FAILED, None, 0.0)


def _seconds(*, is_certain: bool) -> float:
    return VALID_SECONDS if is_certain else UNCERTAIN_SECONDS

"""The order of the conversation between supervisor and worker, against the stages written out."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from message_samples import COMMON, KINDS, SAMPLES

from ipc import messages as m
from ipc import order
from ipc.errors import ForbiddenMessageError
from ipc.order import Duty, Stage
from ipc.permits import PERMITS, Role

WORDS = [sample for sample in SAMPLES if type(sample) in {kind for _, kind in order.SAID}]
ORDERS = [sample for sample in SAMPLES if type(sample) in {kind for _, kind in order.TOLD}]
CONFIGURE = next(sample for sample in SAMPLES if isinstance(sample, m.ConfigureDns))
CONFINED, READY, HANDED_OVER = (
    next(sample for sample in SAMPLES if type(sample) is kind)
    for kind in (m.Confined, m.Ready, m.HandedOver)
)


def test_every_message_of_the_channel_has_its_time():
    workers = (Role.TUN, Role.DNS, Role.PROXY, Role.METRICS)
    said = frozenset().union(*(PERMITS[worker, Role.SUPERVISOR] for worker in workers))
    told = frozenset().union(*(PERMITS[Role.SUPERVISOR, worker] for worker in workers))
    assert {kind for _, kind in order.SAID} == said
    assert {kind for _, kind in order.TOLD} == told


def test_every_message_that_old_workers_do_not_know_has_its_number():
    """One that is left out would end all workers, and their connections, at the next upgrade in place."""
    first = {
        m.ConfigureTun, m.ConfigureDns, m.ConfigureProxy, m.NetworkChanged, m.RedirectsChanged,
        m.UpstreamChanged, m.NamesChanged, m.ListenerOpened, m.ListenerRefused, m.SetLogLevel, m.Drain,
        m.TakeOver, m.Stop,
    }  # fmt: skip
    told = {kind for _, kind in order.TOLD}
    # The processes of metrics have known theirs from the beginning.
    of_metrics = {m.ConfigureMetrics, m.MetricsSnapshot}
    assert set(order.SINCE) == told - first - of_metrics
    assert all(1 <= number <= order.CONVERSATION for number in order.SINCE.values())


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_nothing_but_its_confinement_comes_first(message):
    if isinstance(message, m.Confined):
        assert order.after_saying(Stage.FORKED, message) is Stage.CONFINED
    else:
        with pytest.raises(ForbiddenMessageError, match="while it was forked"):
            order.after_saying(Stage.FORKED, message)


@pytest.mark.parametrize("stage", Stage)
def test_what_is_said_once_is_said_in_one_stage(stage):
    for message, when in ((CONFINED, _S.FORKED), (READY, _S.CONFINED), (HANDED_OVER, _S.DRAINING)):
        if stage is not when:
            with pytest.raises(ForbiddenMessageError, match=type(message).__name__):
                order.after_saying(stage, message)


_S = Stage


@given(st.lists(st.sampled_from(WORDS)))
def test_whatever_it_says_a_worker_is_confined_and_ready_once_and_never_goes_back(words):
    stage, accepted = Stage.FORKED, []
    for word in words:
        try:
            following = order.after_saying(stage, word)
        except ForbiddenMessageError:
            continue
        assert list(Stage).index(following) >= list(Stage).index(stage)
        stage = following
        accepted.append(type(word))
    assert accepted.count(m.Confined) <= 1
    assert accepted.count(m.Ready) <= 1
    # Nobody has told it to.
    assert m.HandedOver not in accepted
    assert accepted[:1] in ([], [m.Confined])


def test_listeners_are_for_a_ready_worker_that_has_not_handed_over():
    for message in SAMPLES:
        if isinstance(message, m.OpenListener | m.CloseListener):
            for stage in (Stage.READY, Stage.DRAINING):
                assert order.after_saying(stage, message) is stage
            for stage in (Stage.FORKED, Stage.CONFINED, Stage.HANDED_OVER):
                with pytest.raises(ForbiddenMessageError):
                    order.after_saying(stage, message)


def test_drained_worker_hands_over_once():
    stage = order.after_saying(Stage.DRAINING, HANDED_OVER)
    assert stage is Stage.HANDED_OVER
    assert order.after_saying(stage, m.Heartbeat(counters={})) is stage
    with pytest.raises(ForbiddenMessageError, match="HandedOver came while it was handed over"):
        order.after_saying(stage, HANDED_OVER)


@pytest.mark.parametrize(("is_standby", "duty"), [(False, Duty.WORKING), (True, Duty.STANDBY)])
def test_configuration_comes_first_and_once(is_standby, duty):
    common = msgspec.structs.replace(COMMON, is_standby=is_standby)
    configure = msgspec.structs.replace(CONFIGURE, common=common)
    for message in ORDERS:
        if type(message).__name__.startswith("Configure"):
            continue
        with pytest.raises(ForbiddenMessageError):
            order.after_being_told(Duty.WAITING, message)
    assert order.after_being_told(Duty.WAITING, configure) is duty
    for later in (Duty.STANDBY, Duty.WORKING, Duty.DRAINING):
        with pytest.raises(ForbiddenMessageError, match="ConfigureDns"):
            order.after_being_told(later, configure)


def test_standby_takes_over_once_and_drains_once():
    assert order.after_being_told(Duty.STANDBY, m.TakeOver()) is Duty.WORKING
    drain = m.Drain(deadline_seconds=1)
    assert order.after_being_told(Duty.WORKING, drain) is Duty.DRAINING
    for duty in (Duty.WAITING, Duty.WORKING, Duty.DRAINING):
        with pytest.raises(ForbiddenMessageError):
            order.after_being_told(duty, m.TakeOver())
    for duty in (Duty.WAITING, Duty.STANDBY, Duty.DRAINING):
        with pytest.raises(ForbiddenMessageError):
            order.after_being_told(duty, drain)


def test_worker_may_be_stopped_at_any_time():
    for duty in (Duty.STANDBY, Duty.WORKING, Duty.DRAINING):
        assert order.after_being_told(duty, m.Stop(grace_seconds=1)) is duty


def test_bus_messages_have_no_place_on_the_channel():
    channel = {kind for _, kind in (*order.SAID, *order.TOLD)}
    for kind in set(KINDS) - channel:
        assert any(kind in kinds and Role.SUPERVISOR not in pair for pair, kinds in PERMITS.items())

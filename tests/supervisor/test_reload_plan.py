"""What a changed key of the configuration needs."""

import msgspec
import pytest

from ipc.permits import Role
from supervisor import reload_plan
from supervisor.config import Config, parse
from supervisor.reload_plan import EFFECTS, Effect


def keys():
    for field in msgspec.structs.fields(Config):
        if issubclass(field.type, msgspec.Struct):
            yield from ((field.name, part.name) for part in msgspec.structs.fields(field.type))
        else:
            yield "", field.name


def test_every_key_has_an_effect():
    assert set(EFFECTS) == set(keys())


def test_nothing_changed_means_nothing_to_do():
    planned = reload_plan.plan(Config(), Config())
    assert (planned.replaced, planned.changed, planned.waiting) == (frozenset(), [], [])


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ('dns.upstream = ["192.0.2.1"]', set()),
        ("supervisor.hang_seconds = 9", set()),
        ("dns.ttl_seconds = 3", {Role.DNS}),
        ('teleport.ca_file = "/ca.pem"', {Role.PROXY}),
        ("supervisor.heartbeat_seconds = 2", {Role.TUN, Role.DNS, Role.PROXY, Role.METRICS}),
        ('metrics.listen = "127.0.0.1:9464"', set()),
    ],
)
def test_a_key_that_can_change_is_in_force_and_says_who_is_replaced(text, roles):
    new = parse(text)
    planned = reload_plan.plan(Config(), new)
    assert planned.config == new
    assert planned.replaced == roles
    assert len(planned.changed) == 1
    assert planned.waiting == []


def test_a_key_that_needs_a_restart_keeps_its_value_and_is_named_each_time():
    new = parse('user = "bob"\nnetwork.mtu = 1500\ndns.ttl_seconds = 3')
    planned = reload_plan.plan(Config(), new)
    assert planned.config == parse("dns.ttl_seconds = 3")
    assert planned.changed == ["dns.ttl_seconds"]
    assert planned.waiting == ["user", "network.mtu"]
    again = reload_plan.plan(planned.config, new)
    assert again.changed == []
    assert again.replaced == frozenset()
    assert again.waiting == ["user", "network.mtu"]


def test_effects_are_sentences_for_users():
    assert all(str(effect) for effect in Effect)

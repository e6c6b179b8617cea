"""What workers and the system are told when the configuration or the machine changes."""

import errno
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from run_fakes import NETWORK, settings

from ipc import messages as m
from ipc.permits import Role
from supervisor.config import Config, DnsConfig, SecurityConfig
from supervisor.host import Host

FORWARDED = "10.5.0.0/24"


@dataclass
class FakePlane:
    """A data plane that routes what is not in `failing`."""

    has_ipv6: bool = True
    kind: m.DataPlaneKind = m.DataPlaneKind.NAMESPACE
    failing: set[str] = field(default_factory=set)

    def set_forwarded(self, networks: list[str]) -> dict[str, OSError]:
        return {n: OSError(errno.ENOBUFS, "No room") for n in networks if n in self.failing}

    def keep(self) -> Any:
        return SimpleNamespace(network=NETWORK)


class Bed:
    def __init__(self, state_dir) -> None:
        self.state_dir = state_dir
        self.plane = FakePlane()
        self.told: list[tuple[m.Message, set[Role]]] = []
        self.resolver: list[object] = []
        self.stored: list[m.Network] = []
        self.is_served = True

    def settings(self, *, forwarded=(), upstream=("192.0.2.1",)):
        config = Config(
            dns=DnsConfig(upstream=list(upstream)),
            security=SecurityConfig(allow_forwarded_from=list(forwarded)),
        )
        return settings(config, state_dir=self.state_dir)

    def host(self, **wanted) -> Host:
        resolver = SimpleNamespace(
            upstream=lambda: None, backend_name="none", want=self.resolver.append
        )
        return Host(
            self.settings(**wanted),
            self.plane,  # type: ignore[arg-type]
            NETWORK,
            os_settings=resolver,  # type: ignore[arg-type]
            link_store=SimpleNamespace(keep_plan=self.stored.append),  # type: ignore[arg-type]
            tell=lambda message, roles: self.told.append((message, set(roles))),
            is_served=lambda: self.is_served,
        )

    def of(self, kind: type[m.Message]) -> list[tuple[Any, set[Role]]]:
        return [(message, roles) for message, roles in self.told if type(message) is kind]


@pytest.fixture
def bed(tmp_path):
    return Bed(tmp_path)


def test_reload_has_told_all_of_it_when_it_returns(bed):
    host = bed.host()
    host.use_settings(bed.settings(forwarded=[FORWARDED], upstream=["192.0.2.9"]), 0.0)
    [(upstream, dns)] = bed.of(m.UpstreamChanged)
    assert [server.address for server in upstream.upstream] == [b"\xc0\0\2\x09"]
    assert dns == {Role.DNS}
    [(changed, roles)] = bed.of(m.NetworkChanged)
    assert changed.network.forwarded_from == [FORWARDED]
    assert roles == {Role.TUN, Role.DNS, Role.PROXY}
    assert host.network == changed.network
    [(security, _)] = bed.of(m.SecurityChanged)
    assert security.access == host.access


def test_reload_without_a_change_tells_of_accounts_alone(bed):
    host = bed.host(forwarded=[FORWARDED])
    host.use_settings(bed.settings(forwarded=[FORWARDED]), 0.0)
    assert [type(message) for message, _ in bed.told] == [m.SecurityChanged]


def test_reload_tries_again_what_could_not_be_routed(bed):
    bed.plane.failing = {FORWARDED}
    host = bed.host(forwarded=[FORWARDED])
    assert host.network.forwarded_from == []
    assert "it cannot be routed" in host.forwarded.warnings[0]
    bed.plane.failing = set()
    host.use_settings(bed.settings(forwarded=[FORWARDED]), 0.0)
    assert host.network.forwarded_from == [FORWARDED]
    assert host.forwarded.warnings == []
    [(changed, _)] = bed.of(m.NetworkChanged)
    assert changed.network == host.network


def test_link_is_kept_with_the_addresses_that_it_has(bed):
    host = bed.host()
    host.use_settings(bed.settings(forwarded=[FORWARDED]), 0.0)
    [kept] = bed.stored
    assert kept.ipv6_prefix == NETWORK.ipv6_prefix
    assert kept.ranges == host.network.ranges


def test_without_dns_the_system_does_not_know_of_vnet(bed):
    host = bed.host()
    host.clusters.zones = ["demo.test"]
    host.want_resolver()
    bed.is_served = False
    host.want_resolver()
    assert [wish.zones for wish in bed.resolver] == [("demo.test",), ()]


def test_host_without_ipv6_has_a_network_without_it(bed):
    bed.plane.has_ipv6 = False
    assert bed.host().network.ipv6_prefix is None

"""What lies between VNet and a proxy: forward proxies, authorities nobody knows, addresses."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare_clusters import cluster_in
from cluster_ways import (
    MUCH,
    SSH_PORT,
    WAYS,
    WEB_PORT,
    app,
    assert_is_web_port,
    clusters,
    exchange,
    exchange_works,
    leaf_app,
    never_asked,
    resolves,
    states,
)
from far_bed import (
    DNS_SERVER,
    FORWARD_PORT,
    FORWARD_PROXY,
    far_bed,
    firewall,
    forward_proxy,
    listens,
    vnet_in,
)
from private_bed import AT_ONCE_SECONDS, Bed, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]

HOSTS = {
    "teleport.routed.test": ["192.0.2.10"],
    "teleport.upgrade.test": ["192.0.2.11"],
    "teleport.separate.test": ["192.0.2.12"],
    "teleport.both.test": ["192.0.2.13"],
    "teleport.six.test": ["2001:db8::14"],
    # The first one of these is dead.
    "teleport.eyes.test": ["2001:db8:dead::15", "192.0.2.15"],
}
EVERY_WAY = {"routed": "", **WAYS}
ODD_ADDRESSES = {"six": "", "eyes": ""}
MAY_CONNECT = (f"ConnectPort {WEB_PORT}", f"ConnectPort {SSH_PORT}")


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """A network with a cluster for each way, and in another home those with odd addresses."""
    with contextlib.ExitStack() as closing:
        bed = closing.enter_context(far_bed(HOSTS))
        for home, ways in ((home_of(bed), EVERY_WAY), (odd_home_of(bed), ODD_ADDRESSES)):
            places = {f"{way}.test": HOSTS[f"teleport.{way}.test"][-1] for way in ways}
            closing.enter_context(cluster_in(bed, clusters(ways), home, places))
        yield bed


def home_of(bed: Bed) -> Path:
    return bed.directory / "tsh"


def odd_home_of(bed: Bed) -> Path:
    return bed.directory / "odd-tsh"


def address_of(bed: Bed, name: str) -> str:
    return bed.resolve(name, server=DNS_SERVER)[0]


def assert_works(bed: Bed, way: str) -> None:
    """An app, a leaf's app, and a name that is relayed to the web port."""
    assert exchange(bed, address_of(bed, app(way)), MUCH[: 1 << 20]) == MUCH[: 1 << 20]
    assert exchange(bed, address_of(bed, leaf_app(way))) == b"hello"
    assert_is_web_port(bed, address_of(bed, never_asked(way)), way)


def requests(log: Path) -> list[str]:
    """Where tinyproxy was asked to connect to."""
    return re.findall(r"CONNECT (\S+) HTTP/1.1", log.read_text())


def test_behind_a_firewall_everything_goes_through_the_forward_proxy(bed):
    with (
        firewall(bed),
        forward_proxy(bed, *MAY_CONNECT) as log,
        vnet_in(bed, home_of(bed), https_proxy=FORWARD_PROXY),
    ):
        bed.wait_for_health("healthy")
        for way in EVERY_WAY:
            assert not listens(bed, HOSTS[f"teleport.{way}.test"][0], WEB_PORT)
            assert_works(bed, way)
        # By name: behind such firewalls there often is no DNS for them.
        assert set(requests(log)) == {
            *(f"teleport.{way}.test:{WEB_PORT}" for way in EVERY_WAY),
            *(f"teleport.{way}.test:{SSH_PORT}" for way in ("separate", "both")),
        }


def test_hosts_of_no_proxy_are_dialled_directly(bed):
    no_proxy = "teleport.routed.test, .separate.test"
    with (
        forward_proxy(bed, *MAY_CONNECT) as log,
        vnet_in(bed, home_of(bed), https_proxy=FORWARD_PROXY, no_proxy=no_proxy),
    ):
        bed.wait_for_health("healthy")
        for way in EVERY_WAY:
            assert_works(bed, way)
        assert {request.split(".")[1] for request in requests(log)} == {"upgrade", "both"}


def test_a_forward_proxy_that_wants_a_password_is_given_it(bed):
    url = f"http://someone:pass%2Dword@127.0.0.1:{FORWARD_PORT}"
    with (
        forward_proxy(bed, *MAY_CONNECT, "BasicAuth someone pass-word") as log,
        vnet_in(bed, home_of(bed), https_proxy=url) as vnet_log,
    ):
        bed.wait_for_health("healthy")
        for way in EVERY_WAY:
            assert_works(bed, way)
        assert requests(log)
        assert "word" not in vnet_log.read_text()


def test_a_wrong_password_is_told_without_showing_it(bed):
    url = f"http://someone:a-mistake@127.0.0.1:{FORWARD_PORT}"
    roots = {f"{way}.test" for way in EVERY_WAY}
    with (
        forward_proxy(bed, *MAY_CONNECT, "BasicAuth someone pass-word"),
        vnet_in(bed, home_of(bed), https_proxy=url) as vnet_log,
    ):
        bed.wait_for_health("degraded")
        wait_until(lambda: states(bed) == dict.fromkeys(roots, "unreachable"), "all tell")
        for reason in bed.status()["reasons"]:
            assert "user name and password" in reason
            assert "a-mistake" not in reason
        assert "a-mistake" not in vnet_log.read_text()


@pytest.mark.parametrize(
    ("lines", "why"),
    [(["ConnectPort 443"], "the forward proxy answered 403"), (None, "Connection refused")],
    ids=["refuses", "is-down"],
)
def test_a_forward_proxy_that_fails_is_named_and_works_again_at_once(bed, lines, why):
    with contextlib.ExitStack() as vnet:
        with forward_proxy(bed, *MAY_CONNECT):
            log = vnet.enter_context(vnet_in(bed, home_of(bed), https_proxy=FORWARD_PROXY))
            bed.wait_for_health("healthy")
            addresses = {way: address_of(bed, app(way)) for way in EVERY_WAY}
            for address in addresses.values():
                assert exchange(bed, address) == b"hello"
        with forward_proxy(bed, *lines) if lines else contextlib.nullcontext():
            where = f"through the forward proxy {FORWARD_PROXY}: {why}"
            for way, address in addresses.items():
                assert bed.seconds_until_refused(address, 7) < AT_ONCE_SECONDS
                line = f"refused (cluster_unreachable): teleport.{way}.test:{WEB_PORT} {where}"
                wait_until(lambda line=line: line in log.read_text(), "a log line")
                assert not resolves(bed, never_asked(way), DNS_SERVER)
            bed.wait_for_health("degraded")
            roots = {f"{way}.test" for way in EVERY_WAY}
            wait_until(lambda: set(states(bed, roots).values()) == {"unreachable"}, "all tell")
            for reason in bed.status()["reasons"]:
                assert where in reason
        with forward_proxy(bed, *MAY_CONNECT):
            for way in EVERY_WAY:
                assert exchange_works(bed, addresses[way])
                assert resolves(bed, never_asked(way), DNS_SERVER)
            bed.wait_for_health("healthy")


def test_a_web_certificate_of_nobody_known_is_refused_with_a_reason(bed):
    # The system's authorities alone.
    with vnet_in(bed, home_of(bed), trust='ca_file = ""') as log:
        bed.wait_for_health("degraded")
        # Without a load balancer the auth services show a certificate that the login knows.
        known = {"routed.test": "ok", "separate.test": "ok", "both.test": "ok"}
        wait_until(lambda: states(bed, known) == known, "most clusters are known")
        for way in ("routed", "separate", "both"):
            assert bed.seconds_until_refused(address_of(bed, app(way)), 7) < AT_ONCE_SECONDS
            refused = rf"refused \(cluster_unreachable\): teleport.{way}.test:{WEB_PORT}: .*"
            pattern = re.compile(f"{refused}certificate not trusted")
            wait_until(lambda pattern=pattern: pattern.search(log.read_text()), "a log line")
        wait_until(lambda: states(bed)["upgrade.test"] == "unreachable", "this one is not")
        [reason] = bed.status()["reasons"]
        assert "teleport.upgrade.test" in reason
        assert "not trusted" in reason
        assert "ca_file" in reason


def test_insecure_trusts_everybody_and_the_log_warns(bed):
    with vnet_in(bed, home_of(bed), trust="insecure = true") as log:
        bed.wait_for_health("healthy")
        for way in EVERY_WAY:
            assert_works(bed, way)
        assert re.search(r"WARNING supervisor\[\d+\]: teleport.insecure is set", log.read_text())


def test_proxies_with_ipv6_alone_and_with_a_first_address_that_is_dead_are_reached(bed):
    for way in ODD_ADDRESSES:
        host = f"teleport.{way}.test"
        tried = [line.split()[0] for line in bed.output("getent", "ahosts", host).splitlines()]
        assert list(dict.fromkeys(tried)) == HOSTS[host]
    with vnet_in(bed, odd_home_of(bed)):
        bed.wait_for_health("healthy")
        for way in ODD_ADDRESSES:
            assert_works(bed, way)

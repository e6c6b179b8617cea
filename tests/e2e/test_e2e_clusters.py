"""Several clusters at once: profiles and leaves, zones and ranges that overlap, web apps, undecided names."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import dnslib
import pytest
from bare_clusters import UPSTREAM_ADDRESS, cluster_in, copy_login, remove_login, upstream_dns
from demo_bed import bare_bed, demo_bed, supervisor_in
from private_bed import AT_ONCE_SECONDS, Bed, read_exactly, wait_until

from supervisor.cli.control_client import AskError
from supervisor.exits import ExitStatus

pytestmark = [pytest.mark.root, pytest.mark.e2e]

# Each app of "ports" says the port in its URI, so that one sees which app it is.
CLUSTERS = """
[[clusters]]
name = "alpha.test"
proxy_addr = "teleport.alpha.test:3080"
ipv4_cidr_range = "10.96.0.0/16"
custom_dns_zones = ["corp.test", "deep.sub.corp.test"]

[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"

[[clusters.apps]]
name = "Capital"
uri = "tcp://ports.backend.internal:1001"
public_addr = "Mixed-Case.Corp.test"

[[clusters.apps]]
name = "ports"
uri = "tcp://ports.backend.internal"
tcp_ports = [{ port = 8000, end_port = 8010 }, { port = 9999 }]

[[clusters.apps]]
name = "shallow"
uri = "tcp://ports.backend.internal:1002"
public_addr = "shallow.corp.test"

[[clusters.apps]]
name = "below-beta"
uri = "tcp://ports.backend.internal:1003"
public_addr = "alpha.sub.corp.test"

[[clusters.apps]]
name = "deep"
uri = "tcp://ports.backend.internal:1004"
public_addr = "alpha.deep.sub.corp.test"

[[clusters.apps]]
name = "twice"
uri = "tcp://ports.backend.internal:1005"
public_addr = "twice.sub.corp.test"

[[clusters.apps]]
name = "leading"
uri = "tcp://ports.backend.internal:1006"
public_addr = "leading.sub.corp.test"

[[clusters.apps]]
name = "browser"
uri = "http://127.0.0.1:8080"

[[clusters.apps]]
name = "board"
uri = "https://127.0.0.1:8443"
public_addr = "board.alpha.test"

[[clusters]]
name = "leaf-one.test"
leaf_of = "alpha.test"
proxy_addr = "proxy.leaf-one.test:443"
ipv4_cidr_range = "10.88.0.0/26"
custom_dns_zones = ["lab.test"]
generated_apps = 30

[[clusters.apps]]
name = "page"
uri = "tcp://hello.backend.internal:80"

[[clusters.apps]]
name = "zoned"
uri = "tcp://hello.backend.internal:80"
public_addr = "page.lab.test"

[[clusters.apps]]
name = "dashboard"
uri = "http://127.0.0.1:8081"

[[clusters]]
name = "leaf-two.test"
leaf_of = "alpha.test"
ipv4_cidr_range = "10.88.0.0/27"
custom_dns_zones = ["yard.test"]
generated_apps = 30

[[clusters]]
name = "beta.example"
proxy_addr = "teleport.outer.test:443"
custom_dns_zones = ["outer.test", "sub.corp.test", "alpha.test"]

[[clusters.apps]]
name = "page"
uri = "tcp://hello.backend.internal:80"

[[clusters.apps]]
name = "in-zone"
uri = "tcp://ports.backend.internal:2001"
public_addr = "beta.sub.corp.test"

[[clusters.apps]]
name = "below-alpha"
uri = "tcp://ports.backend.internal:2002"
public_addr = "beta.deep.sub.corp.test"

[[clusters.apps]]
name = "twice"
uri = "tcp://ports.backend.internal:2003"
public_addr = "twice.sub.corp.test"

[[clusters.apps]]
name = "impostor"
uri = "tcp://ports.backend.internal:2004"
public_addr = "teleport.alpha.test"

[[clusters.apps]]
name = "own-impostor"
uri = "tcp://ports.backend.internal:2005"
public_addr = "teleport.outer.test"

[[clusters]]
name = "leaf-three.test"
leaf_of = "beta.example"
ipv4_cidr_range = "10.96.128.0/17"
custom_dns_zones = ["field.test"]

[[clusters.apps]]
name = "page"
uri = "tcp://hello.backend.internal:80"
public_addr = "page.field.test"
"""
ALPHA, BETA = "teleport.alpha.test", "teleport.outer.test"
UPSTREAM = "127.0.0.54"
OWN_RANGE, SERVER = "100.64.0.0/10", "100.64.0.2"
RANGES = {
    "alpha.test": "10.96.0.0/16",
    "leaf-one.test": "10.88.0.0/26",
    "leaf-two.test": "10.88.0.0/27",
    "leaf-three.test": "10.96.128.0/17",
    "beta.example": OWN_RANGE,
}


@pytest.fixture(scope="module")
def module_bed() -> Iterator[Bed]:
    with demo_bed(CLUSTERS) as bed:
        yield bed


@pytest.fixture
def bed(module_bed) -> Bed:
    """The demo with all clusters known, and its apps as in the cluster file."""

    def knows_all() -> bool:
        status = module_bed.status()
        network = status["network"]
        # Of a leaf that does not answer the state is told before the health.
        is_well = {cluster["state"] for cluster in status["clusters"]} == {"ok"}
        is_routed = {*RANGES.values()} == {*network["ipv4_cidr_ranges"]}
        has_zones = {"lab.test", "yard.test", "field.test"} <= {*network["dns_zones"]}
        return status["health"] == "healthy" and is_well and is_routed and has_zones

    wait_until(knows_all, "all clusters are known")
    return module_bed


def home_of(bed: Bed) -> Path:
    return bed.path(bed.environment["TELEPORT_HOME"])


def curl(bed: Bed, url: str, *options: str) -> str:
    return bed.output("curl", "-sS", "--max-time", "20", *options, url)


def told_port(bed: Bed, name: str, port: int = 80) -> int:
    """The number that an app of "ports" says."""
    with bed.connect(name, port) as end, end.makefile() as lines:
        return int(lines.readline())


def is_within(address: str, text: str) -> bool:
    return ip_address(address) in ip_network(text)


def answer_and_upstreams(bed: Bed, name: str, kind: str = "A") -> tuple[str, str]:
    """The answers of VNet and of the upstream server, comparable."""
    answers = [bed.ask(name, kind, server) for server in ("", UPSTREAM)]
    for answer in answers:
        answer.header.id = 0
    return str(answers[0]), str(answers[1])


def refused_because(bed: Bed, name: str, port: int, reason: str) -> None:
    """The port is refused at once, and the log says why."""
    assert bed.seconds_until_refused(name, port) < AT_ONCE_SECONDS

    def is_told() -> bool:
        lines = [line for line in bed.log().splitlines() if f"to {name} at " in line]
        return any(f":{port} refused" in line and reason in line for line in lines)

    wait_until(is_told, f"the log says of {name} {port}: {reason}")


# -- leaves and profiles --


@pytest.mark.parametrize("name", ["page.proxy.leaf-one.test", "page.lab.test", "page.field.test"])
@pytest.mark.parametrize("family", ["-4", "-6"])
def test_an_app_of_a_leaf_is_reached_at_its_own_address(bed, name, family):
    page = curl(bed, f"http://{name}/some/path", family)
    assert f"You asked for {name}, /some/path" in page


def test_apps_of_two_profiles_are_reached_side_by_side(bed):
    with bed.connect(f"echo.{ALPHA}", 7) as end:
        end.sendall(b"hello")
        assert read_exactly(end, 5) == b"hello"
        assert "Hello from VNet" in curl(bed, f"http://page.{BETA}/")
        end.sendall(b"again")
        assert read_exactly(end, 5) == b"again"


def test_an_address_lies_in_the_range_of_the_cluster_that_has_the_app(bed):
    for name, cluster in (
        (f"echo.{ALPHA}", "alpha.test"),
        ("alpha.sub.corp.test", "alpha.test"),
        ("page.lab.test", "leaf-one.test"),
        ("app-00003.yard.test", "leaf-two.test"),
        ("page.field.test", "leaf-three.test"),
        (f"page.{BETA}", "beta.example"),
        ("beta.deep.sub.corp.test", "beta.example"),
        ("host.leaf-one.test", "leaf-one.test"),
        ("host.leaf-three.test.beta.example", "leaf-three.test"),
    ):
        [address] = bed.resolve(name)
        assert is_within(address, RANGES[cluster]), name


def test_ranges_that_overlap_never_give_one_address_to_two_names(bed):
    names = [f"app-0000{n}.{zone}" for n in range(10) for zone in ("lab.test", "yard.test")]
    given = {name: bed.resolve(name)[0] for name in names}
    assert len(set(given.values())) == len(names)
    for name, address in given.items():
        leaf = "leaf-one.test" if name.endswith("lab.test") else "leaf-two.test"
        assert is_within(address, RANGES[leaf]), name
        pointer = bed.resolve(str(dnslib.DNSLabel(ip_address(address).reverse_pointer)), "PTR")
        assert pointer == [f"{name}."]


def test_status_shows_ranges_zones_and_clusters(bed):
    status = json.loads(bed.output("vnet", "status", "--json"))
    found = {c["name"]: (c["profile"], c["leaf_of"], c["state"]) for c in status["clusters"]}
    assert found == {
        "alpha.test": (ALPHA, None, "ok"),
        "leaf-one.test": (ALPHA, "alpha.test", "ok"),
        "leaf-two.test": (ALPHA, "alpha.test", "ok"),
        "beta.example": (BETA, None, "ok"),
        "leaf-three.test": (BETA, "beta.example", "ok"),
    }
    network = status["network"]
    assert {*network["ipv4_cidr_ranges"]} == {*RANGES.values()}
    assert {
        *found,
        *(ALPHA, BETA, "proxy.leaf-one.test"),
        *("corp.test", "deep.sub.corp.test", "sub.corp.test", "outer.test"),
        *("lab.test", "yard.test", "field.test"),
    } == {*network["dns_zones"]}


# -- zones --


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("shallow.corp.test", 1002),
        ("alpha.sub.corp.test", 1003),  # in a zone that only its own zone's sub-zone is
        ("alpha.deep.sub.corp.test", 1004),
        ("beta.sub.corp.test", 2001),
        ("beta.deep.sub.corp.test", 2002),
        ("twice.sub.corp.test", 1005),  # the first profile's
    ],
)
def test_zones_of_several_clusters_may_overlap(bed, name, number):
    assert told_port(bed, name) == number


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (ALPHA, "A"),
        (ALPHA, "AAAA"),
        (BETA, "A"),
        ("TELEPORT.Outer.Test", "A"),
        ("proxy.leaf-one.test", "A"),
    ],
)
def test_names_of_proxies_are_answered_by_the_upstream_server(bed, name, kind):
    """Also where another cluster's zone covers them, and an app has such a name."""
    ours, upstreams = answer_and_upstreams(bed, name, kind)
    assert ours == upstreams


def test_the_case_and_the_final_dot_of_a_name_do_not_matter(bed):
    # Clusters compare bytes: by its own spelling an app is found at first, then by every other.
    [address] = bed.resolve("Mixed-Case.Corp.test")
    for spelling in ("mixed-case.corp.test", "MIXED-CASE.CORP.TEST", "mixed-case.corp.test."):
        assert bed.resolve(spelling) == [address]
        assert address in bed.output("getent", "ahostsv4", spelling)
    assert told_port(bed, "mixed-case.corp.test") == 1001


@pytest.mark.parametrize(
    "name",
    [
        r'we"ird.corp.test',
        r"back\\slash.corp.test",
        r"dot\.in-label.corp.test",
        r"null\000byte.corp.test",
        r"umlaut\195\164.corp.test",
        r'x" || name == "echo.corp.test',
    ],
)
def test_a_name_with_odd_bytes_is_no_app_and_disturbs_nobody(bed, name):
    found = bed.output("dig", "+tries=1", "+time=10", name, "A")
    assert "status: NXDOMAIN" in found
    assert told_port(bed, "shallow.corp.test") == 1002
    assert bed.health() == "healthy"


# -- web apps --


@pytest.mark.parametrize(
    ("name", "port", "app"),
    [
        (f"browser.{ALPHA}", 3080, "browser"),
        ("board.alpha.test", 3080, "board"),
        (f"dashboard.{ALPHA}", 3080, "dashboard"),  # the leaf's, below the root's proxy
    ],
)
def test_a_web_app_is_left_to_the_upstream_server_and_a_browser_reaches_it(bed, name, port, app):
    ours, upstreams = answer_and_upstreams(bed, name)
    assert ours == upstreams
    assert bed.resolve(name) == ["127.0.1.1"]
    page = curl(bed, f"https://{name}:{port}/", "--cacert", str(home_in(bed) / "web-ca.pem"))
    assert f"<h1>web app {app}</h1>" in page


def home_in(bed: Bed) -> Path:
    return Path(bed.environment["TELEPORT_HOME"])


# -- undecided names --


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("some-host.alpha.test", "alpha.test"),
        ("a.b.alpha.test", "alpha.test"),
        ("some-host.leaf-one.test", "alpha.test"),
        ("some-host.leaf-one.test.alpha.test", "alpha.test"),
        ("some-host.beta.example", "beta.example"),
        ("some-host.leaf-three.test.beta.example", "beta.example"),
    ],
)
def test_the_web_port_of_any_name_below_a_cluster_leads_to_the_proxys_web_pages(bed, name, cluster):
    for spelling in (f"{name}.", name.upper(), name):
        [address] = bed.resolve(spelling)
        assert is_virtual(bed, address)
    web = 443 if cluster == "beta.example" else 3080
    page = json.loads(curl(bed, f"https://{name}:{web}/webapi/ping", "-k"))
    assert page["cluster_name"] == cluster
    refused_because(bed, name, 22, "(node_unreachable): SSH host ")
    for port in (80, 3080 if web == 443 else 443):
        refused_because(bed, name, port, "no app and no database has this name")


def is_virtual(bed: Bed, address: str) -> bool:
    return any(is_within(address, text) for text in RANGES.values())


def has_virtual_address(bed: Bed, name: str) -> bool:
    answer = bed.ask(name)
    return answer.header.rcode == 0 and any(is_virtual(bed, str(r.rdata)) for r in answer.rr)


# -- apps that come, change and go --

APP = """
[[apps]]
cluster = "{cluster}"
name = "{name}"
public_addr = "{address}"
uri = "{uri}"
tcp_ports = [{ports}]
"""


def an_app(address: str, uri: str, *, ports: str = "", cluster: str = "alpha.test") -> str:
    """One table of an apps file."""
    name = address.replace(".", "-")
    return APP.format(cluster=cluster, name=name, address=address, uri=uri, ports=ports)


def single(address: str, number: int, *, cluster: str = "alpha.test") -> str:
    """An app that any port leads to, and that says this number."""
    return an_app(address, f"tcp://ports.backend.internal:{number}", cluster=cluster)


@pytest.fixture
def set_apps(bed) -> Iterator[Callable[[str], None]]:
    """Replaces the apps of the clusters that a text names, until the test has ended.

    Returns when the clusters have taken them over.
    """
    path = home_of(bed) / "apps"
    number = itertools.count()

    def change(text: str) -> None:
        # The proxy shows a web app the moment the cluster has it.
        mark = f"mark-{next(number)}.alpha.test"
        new = path.with_name(".apps.new")
        new.write_text(text + an_app(mark, "http://127.0.0.1:8080"))
        new.rename(path)
        wait_until(lambda: f"web app {mark.replace('.', '-')}<" in web_page(bed, mark), "new apps")

    yield change
    path.unlink(missing_ok=True)
    wait_until(lambda: "web app board<" in web_page(bed, "board.alpha.test"), "the former apps")


def web_page(bed: Bed, host: str) -> str:
    """What the first proxy's web port shows for a host."""
    return curl(bed, "https://127.0.1.1:3080/", "-k", "--header", f"Host: {host}")


def log_in_again(bed: Bed) -> None:
    """The login expires and is renewed; with a new one, clusters are asked again for names."""
    with bed.faults("expire_login"):
        bed.wait_for_health("degraded")
        wait_until(lambda: states(bed) == {"login_expired"}, "the login has expired")
    bed.wait_for_health("healthy")


# Without a new login a cluster is asked again for an app after 60 s.
NOTICED_SECONDS = 15.0


def states(bed: Bed) -> set[str]:
    return {cluster["state"] for cluster in bed.status()["clusters"]}


def says(bed: Bed, name: str, number: int, port: int = 80) -> bool:
    try:
        return told_port(bed, name, port) == number
    except ConnectionRefusedError:
        return False


@pytest.mark.parametrize(
    ("name", "cluster"),
    [("added.alpha.test", "alpha.test"), ("added.leaf-one.test.alpha.test", "leaf-one.test")],
)
def test_an_app_that_is_added_is_reached_at_the_address_its_name_had(bed, set_apps, name, cluster):
    [address] = bed.resolve(name)
    refused_because(bed, name, 80, "no app and no database has this name")
    set_apps(single(name, 3001, cluster=cluster))
    wait_until(lambda: says(bed, address, 3001), "the new app is reached")
    assert bed.resolve(name) == [address]


def test_an_app_is_reached_though_a_browser_was_at_its_name_a_moment_before(bed, set_apps):
    name = "visited.alpha.test"
    web = f"https://{name}:3080/webapi/ping"
    # Taken before: the visit may be over long after it was decided where the port leads.
    visited = time.monotonic()
    assert json.loads(curl(bed, web, "-k"))["cluster_name"] == "alpha.test"
    set_apps(single(name, 3002))
    wait_until(lambda: says(bed, name, 3002), "the new app is reached")
    # The web port goes on leading to the web pages for 15 s, as a page in use needs it.
    page = bed.run("curl", "-sk", "--max-time", "20", web).stdout
    if time.monotonic() < visited + 14:
        assert json.loads(page)["cluster_name"] == "alpha.test"


def test_an_app_that_is_removed_is_refused_and_with_the_next_login_unknown(bed, set_apps):
    name = "removed.corp.test"
    set_apps(single(name, 3003))
    [address] = bed.resolve(name)
    set_apps("")
    refused_because(bed, name, 80, "(unknown_app)")
    assert bed.health() == "healthy"
    log_in_again(bed)

    def is_known_to_be_gone() -> bool:
        assert bed.seconds_until_refused(address, 80) < AT_ONCE_SECONDS
        return any(
            f"to {name} at " in line and "the name stands for no app any more" in line
            for line in bed.log().splitlines()
        )

    # The proxies notice a login one after the other.
    wait_until(is_known_to_be_gone, "the log says so", NOTICED_SECONDS)
    wait_until(lambda: bed.ask(name).header.rcode == dnslib.RCODE.NXDOMAIN, "the name is gone")
    bed.wait_for_health("healthy")


def test_other_ports_of_an_app_are_noticed_with_the_next_login(bed, set_apps):
    name, uri = "changed.corp.test", "tcp://ports.backend.internal"
    set_apps(an_app(name, uri, ports="{ port = 8000 }"))
    assert told_port(bed, name, 8000) == 8000
    refused_because(bed, name, 9000, "only 8000")
    set_apps(an_app(name, uri, ports="{ port = 9000 }"))
    log_in_again(bed)
    # The proxies notice a login one after the other.
    wait_until(lambda: says(bed, name, 9000, 9000), "the new port is known", NOTICED_SECONDS)
    refused_because(bed, name, 8000, "only 9000")


@pytest.mark.parametrize("port", [8000, 8005, 8010, 9999])
def test_each_port_of_a_multi_port_app_leads_to_its_own(bed, port):
    assert told_port(bed, f"ports.{ALPHA}", port) == port


@pytest.mark.parametrize("port", [1, 22, 3080, 7999, 8011, 9998, 65535])
def test_a_port_that_a_multi_port_app_does_not_have_is_refused_and_the_log_names_those(bed, port):
    refused_because(bed, f"ports.{ALPHA}", port, f"no port {port}, only 8000-8010, 9999")


# -- a cluster that does not answer --

# It claims the other clusters' zones, and comes before them.
HUNG = """
[[clusters]]
name = "hung.test"
proxy_addr = "localhost:0"
custom_dns_zones = ["lab.test", "yard.test", "corp.test"]

[[clusters.apps]]
name = "own"
uri = "tcp://ports.backend.internal:4001"
public_addr = "own.hung.test"
"""


NUMBERS = itertools.count()


@pytest.fixture
def hung_home(bed) -> Iterator[Path]:
    """The home of a further cluster, which the demo's VNet does not know yet."""
    directory = Path(bed.environment["TELEPORT_HOME"]).with_name(f"hung-{next(NUMBERS)}")
    with cluster_in(bed, HUNG, directory) as home:
        yield home
        if (home_of(bed) / "localhost.yaml").exists():
            remove_login(home_of(bed), "localhost")
            wait_until(lambda: len(bed.status()["clusters"]) == len(RANGES), "it is gone")


def make_it_hang(home: Path) -> None:
    """From now on the cluster of this home accepts calls and answers none."""
    # The login of another user comes after the other faults, and shows that those are on.
    (home / "faults").write_text("hang\nother_user shown\n")
    wait_until(lambda: "shown" in (home / "localhost.yaml").read_text(), "the fault is on")


def state_of(bed: Bed, cluster: str) -> str:
    return next((c["state"] for c in bed.status()["clusters"] if c["name"] == cluster), "none")


def assert_others_answer_at_once(bed: Bed, first: int) -> None:
    """Names that nobody has asked for, `first` of their numbers, and connections to them."""
    for number in (first, first + 1):
        for name in (f"app-000{number}.lab.test", f"app-000{number}.yard.test"):
            began = time.monotonic()
            [address] = bed.resolve(name)
            with bed.connect(address, 7) as end:
                end.sendall(b"!")
                assert read_exactly(end, 1) == b"!"
            assert time.monotonic() - began < AT_ONCE_SECONDS, name
    began = time.monotonic()
    assert is_virtual(bed, bed.resolve(f"host-{first}.leaf-one.test")[0])
    assert time.monotonic() - began < AT_ONCE_SECONDS


def test_a_cluster_that_stops_answering_does_not_slow_the_others(bed, hung_home):
    copy_login(hung_home, home_of(bed), "localhost")
    wait_until(lambda: state_of(bed, "hung.test") == "ok", "the cluster is known")
    # That state is one proxy's, and it counts as well until it is asked.
    wait_until(lambda: has_virtual_address(bed, "own.hung.test"), "its names are known")
    make_it_hang(hung_home)
    assert_others_answer_at_once(bed, 10)
    # Of its own names the last answer counts.
    assert is_virtual(bed, bed.resolve("own.hung.test")[0])


def test_a_cluster_that_never_answered_does_not_slow_the_others(bed, hung_home):
    make_it_hang(hung_home)
    copy_login(hung_home, home_of(bed), "localhost")
    wait_until(lambda: state_of(bed, "hung.test") != "none", "the login is known")
    assert_others_answer_at_once(bed, 20)
    wait_until(lambda: state_of(bed, "hung.test") == "unreachable", "it is given up")
    assert any("hung.test" in reason for reason in bed.status()["reasons"])
    (hung_home / "faults").unlink()
    wait_until(lambda: has_virtual_address(bed, "own.hung.test"), "it is used")
    bed.wait_for_health("healthy")


# -- what a cluster should not set --

NAMESERVER, PROXY_ADDRESS = "10.60.0.53", "10.50.0.1"
BAD = """
[[clusters]]
name = "bad.test"
proxy_addr = "teleport.bad.test:443"
ipv4_cidr_range = "10.50.0.0/16"
custom_dns_zones = ["single", "fine.test"]

[[clusters.apps]]
name = "page"
uri = "tcp://ports.backend.internal:5001"
public_addr = "page.fine.test"

[[clusters]]
name = "server.test"
leaf_of = "bad.test"
ipv4_cidr_range = "10.60.0.0/16"

[[clusters.apps]]
name = "page"
uri = "tcp://ports.backend.internal:5002"

[[clusters]]
name = "small.test"
leaf_of = "bad.test"
ipv4_cidr_range = "10.70.0.0/28"

[[clusters.apps]]
name = "page"
uri = "tcp://ports.backend.internal:5003"

[[clusters]]
name = "good.test"
leaf_of = "bad.test"
ipv4_cidr_range = "10.80.0.0/24"

[[clusters.apps]]
name = "page"
uri = "tcp://ports.backend.internal:5004"
"""
CONFIG = """
[dns]
upstream = ["{nameserver}"]
os_integration = "none"
[teleport]
ca_file = "{home}/web-ca.pem"
"""


def reasons(bed: Bed) -> list[str]:
    try:
        return list(bed.status()["reasons"])
    except AskError:
        return []


def ranges(bed: Bed) -> list[str]:
    return list(bed.status()["network"]["ipv4_cidr_ranges"])


def test_impossible_zones_and_ranges_are_left_out_and_reported_and_the_rest_works():
    with bare_bed() as bed, contextlib.ExitStack() as closing:
        for address in (NAMESERVER, PROXY_ADDRESS):
            bed.output("ip", "address", "add", f"{address}/32", "dev", "lo")
        hosts = bed.directory / "hosts"
        hosts.write_text(f"127.0.0.1 localhost\n{PROXY_ADDRESS} teleport.bad.test\n")
        bed.output("mount", "--bind", str(hosts), "/etc/hosts")
        closing.enter_context(upstream_dns(bed, NAMESERVER))
        home = Path(bed.environment["TELEPORT_HOME"])
        closing.enter_context(cluster_in(bed, BAD, home, {"bad.test": PROXY_ADDRESS}))
        config = CONFIG.format(home=home, nameserver=NAMESERVER)
        closing.enter_context(supervisor_in(bed, config=config))
        problems = (
            ("bad.test", "'single'", "cannot be used"),
            ("bad.test", "'10.50.0.0/16'", f"it contains the Teleport proxy {PROXY_ADDRESS}"),
            ("server.test", "'10.60.0.0/16'", f"it contains the nameserver {NAMESERVER}"),
            ("small.test", "'10.70.0.0/28'", "cannot be used"),
        )
        granted = {OWN_RANGE, "10.80.0.0/24"}

        def have_all_answered() -> bool:
            text = " ".join(reasons(bed))
            is_told = all(what in text for _, what, _ in problems)
            return is_told and granted == {*ranges(bed)}

        wait_until(have_all_answered, "every problem is reported, and what is good is used")
        told = reasons(bed)
        assert len(told) == len(problems)
        for cluster, what, why in problems:
            [reason] = [text for text in told if what in text]
            for part in (cluster, why, "correct vnet_config"):
                assert part in reason
        shown = bed.run("vnet", "status")
        assert shown.returncode == ExitStatus.DEGRADED
        assert all(reason in shown.stdout.decode() for reason in told)
        assert granted == {*ranges(bed)}
        zones = bed.status()["network"]["dns_zones"]
        assert "single" not in zones
        assert "fine.test" in zones
        for name, number, text in (
            ("page.fine.test", 5001, OWN_RANGE),
            ("page.server.test", 5002, OWN_RANGE),
            ("page.small.test", 5003, OWN_RANGE),
            ("page.good.test", 5004, "10.80.0.0/24"),
        ):
            [address] = bed.resolve(name, server=SERVER)
            assert is_within(address, text), name
            assert told_port(bed, address) == number
        for name in ("page.single", "example.org"):
            assert bed.resolve(name, server=SERVER) == [UPSTREAM_ADDRESS]

import contextlib
import tomllib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import config
from supervisor.config import Config, parse, read, split_server
from supervisor.exits import ExitStatus, MisconfiguredError

WHOLE = """
user = "alice"
teleport_home = "~/.tsh"

[network]
interface = "vnet0"
mtu = 65535
ipv4_cidr_range = "auto"
ipv6 = "auto"

[dns]
upstream = []
ttl_seconds = 10
os_integration = "auto"

[proxy]
workers = 2
max_connections = 10000

[teleport]
ca_file = ""
insecure = false
mfa_seconds = 110

[supervisor]
restart_max = 5
restart_window_seconds = 30
heartbeat_seconds = 1
hang_seconds = 5
drain_seconds = 3600

[security]
allow_users = []
allow_groups = []
allow_forwarded_from = []
http_check = true
http_hosts = {}
http_origins = {}

[metrics]
listen = ""
"""


def problems_of(text: str) -> list[str]:
    with pytest.raises(MisconfiguredError) as caught:
        parse(text)
    assert caught.value.status is ExitStatus.USAGE
    return caught.value.problems


def test_every_key_of_the_contract_is_known_with_its_default():
    found = parse(WHOLE)
    assert found == msgspec.structs.replace(Config(), user="alice", teleport_home="~/.tsh")
    assert msgspec.to_builtins(found) == tomllib.loads(WHOLE)


def test_nothing_is_required():
    assert parse("") == Config()


def test_integers_do_for_seconds():
    assert parse("supervisor.hang_seconds = 7").supervisor.hang_seconds == 7


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("usr = 'alice'", "usr", "unknown key"),
        ("[netwrk]", "netwrk", "unknown key"),
        ("[network]\nmut = 1500", "network.mut", "unknown key"),
        ("network = 3", "network", "expected a table, got 3"),
        ("user = 3", "user", "expected str, got int, got 3"),
        ("network.mtu = '1500'", "network.mtu", "expected int"),
        ("network.mtu = true", "network.mtu", "expected int"),
        ("network.mtu = 1279", "network.mtu", "must be 1280 to 65535, got 1279"),
        ("network.mtu = 65536", "network.mtu", "must be 1280 to 65535"),
        ("network.mtu = -1", "network.mtu", "must be 1280 to 65535"),
        ("network.interface = ''", "network.interface", "must be 1 to 15"),
        ("network.interface = 'sixteen-letters-'", "network.interface", "must be 1 to 15"),
        ("network.interface = '../vnet'", "network.interface", "must be 1 to 15"),
        ("network.interface = 'a b'", "network.interface", "must be 1 to 15"),
        ("network.interface = '-x'", "network.interface", "must be 1 to 15"),
        ("network.interface = '''v\n'''", "network.interface", "must be 1 to 15"),
        ("network.ipv6 = 'maybe'", "network.ipv6", "invalid enum value"),
        ("network.ipv4_cidr_range = ''", "network.ipv4_cidr_range", "must be 'auto'"),
        ("network.ipv4_cidr_range = '100.64.0.1/10'", "network.ipv4_cidr_range", "host bits"),
        ("network.ipv4_cidr_range = '100.64.0.0/28'", "network.ipv4_cidr_range", "/27 or larger"),
        ("network.ipv4_cidr_range = '0.0.0.0/0'", "network.ipv4_cidr_range", "/27 or larger"),
        ("network.ipv4_cidr_range = '127.0.0.0/8'", "network.ipv4_cidr_range", "/27 or larger"),
        ("network.ipv4_cidr_range = '169.254.0.0/15'", "network.ipv4_cidr_range", "/27 or"),
        ("network.ipv4_cidr_range = '224.0.0.0/16'", "network.ipv4_cidr_range", "/27 or larger"),
        ("network.ipv4_cidr_range = '250.0.0.0/16'", "network.ipv4_cidr_range", "/27 or larger"),
        ("network.ipv4_cidr_range = '0.1.0.0/16'", "network.ipv4_cidr_range", "/27 or larger"),
        ("network.ipv4_cidr_range = 'fd00::/64'", "network.ipv4_cidr_range", "must be 'auto'"),
        ("dns.upstream = '192.0.2.1'", "dns.upstream", "expected array"),
        ("dns.upstream = [1]", "dns.upstream", "expected str"),
        ("dns.upstream = ['192.0.2.1', 'ns.test']", "dns.upstream[1]", "must be an address"),
        ("dns.upstream = ['192.0.2.1:0']", "dns.upstream[0]", "must be an address"),
        ("dns.upstream = ['192.0.2.1:65536']", "dns.upstream[0]", "must be an address"),
        ("dns.upstream = ['0.0.0.0']", "dns.upstream[0]", "must be an address"),
        ("dns.upstream = ['ff02::1']", "dns.upstream[0]", "must be an address"),
        ("dns.upstream = ['']", "dns.upstream[0]", "must be an address"),
        ("dns.ttl_seconds = -1", "dns.ttl_seconds", "must be 0 to 86400"),
        ("dns.ttl_seconds = 1.5", "dns.ttl_seconds", "expected int"),
        ("dns.os_integration = 'magic'", "dns.os_integration", "invalid enum value"),
        ("proxy.workers = 0", "proxy.workers", "must be 1 to 64"),
        ("proxy.workers = 65", "proxy.workers", "must be 1 to 64"),
        ("proxy.max_connections = 0", "proxy.max_connections", "must be 1 to 1000000"),
        ("teleport.ca_file = 'ca.pem'", "teleport.ca_file", "must be an absolute path"),
        ("teleport.mfa_seconds = 4.9", "teleport.mfa_seconds", "must be 5 to 110"),
        ("teleport.mfa_seconds = 111", "teleport.mfa_seconds", "must be 5 to 110"),
        ("teleport.insecure = 1", "teleport.insecure", "expected bool"),
        ("teleport_home = 'tsh'", "teleport_home", "must be an absolute path"),
        ("supervisor.restart_max = -1", "supervisor.restart_max", "must be 0 to 1000"),
        ("supervisor.restart_window_seconds = 0", "supervisor.restart_window_seconds", "1 to"),
        ("supervisor.heartbeat_seconds = 0", "supervisor.heartbeat_seconds", "0.1 to 60"),
        ("supervisor.restart_window_seconds = nan", "supervisor.restart_window_seconds", "1 to"),
        ("supervisor.hang_seconds = inf", "supervisor.hang_seconds", "must be 1 to 3600"),
        ("supervisor.hang_seconds = 1", "supervisor.hang_seconds", "more than supervisor.heart"),
        ("security.allow_users = [1]", "security.allow_users", "expected str"),
        ("security.allow_forwarded_from = ['x']", "security.allow_forwarded_from[0]", "network"),
        (
            "security.allow_forwarded_from = ['0.0.0.0/0']",
            "security.allow_forwarded_from[0]",
            "all addresses",
        ),
        (
            "security.allow_forwarded_from = ['::/0']",
            "security.allow_forwarded_from[0]",
            "all addresses",
        ),
        (
            "security.allow_forwarded_from = ['127.0.0.0/8']",
            "security.allow_forwarded_from[0]",
            "loopback",
        ),
        (
            "security.allow_forwarded_from = ['::1/128']",
            "security.allow_forwarded_from[0]",
            "loopback",
        ),
        (
            "security.allow_forwarded_from = ['169.254.1.0/24']",
            "security.allow_forwarded_from[0]",
            "link-local",
        ),
        (
            "security.allow_forwarded_from = ['fe80::/64']",
            "security.allow_forwarded_from[0]",
            "link-local",
        ),
        (
            "security.allow_forwarded_from = ['224.0.0.0/24']",
            "security.allow_forwarded_from[0]",
            "multicast",
        ),
        (
            "security.allow_forwarded_from = ['ff02::/16']",
            "security.allow_forwarded_from[0]",
            "multicast",
        ),
        (
            "security.allow_forwarded_from = ['128.0.0.0/1']",
            "security.allow_forwarded_from[0]",
            "169.254.0.0/16 are link-local",
        ),
        (
            "security.allow_forwarded_from = ['::ffff:172.30.0.0/112']",
            "security.allow_forwarded_from[0]",
            "IPv4 addresses",
        ),
        (
            "security.allow_forwarded_from = ['172.30.0.1/24']",
            "security.allow_forwarded_from[0]",
            "host bits",
        ),
        (
            "security.allow_forwarded_from = ['100.0.0.0/8']",
            "security.allow_forwarded_from[0]",
            "contains 100.64.0.0/10",
        ),
        (
            'network.ipv4_cidr_range = "10.9.0.0/16"\nsecurity.allow_forwarded_from = ["10.9.1.0/24"]',
            "security.allow_forwarded_from[0]",
            "10.9.0.1 alone may be listed",
        ),
        (
            f"security.allow_forwarded_from = {[f'10.9.{number}.0/24' for number in range(101)]}",
            "security.allow_forwarded_from",
            "at most 100 networks, got 101",
        ),
        ("security.http_check = 'no'", "security.http_check", "expected bool"),
        ("security.http_hosts = {a = 1}", "security.http_hosts", "expected array"),
        ("security.http_hosts = {'App.test' = []}", "security.http_hosts", "in lower case"),
        ("security.http_hosts = {'app.test.' = []}", "security.http_hosts", "full DNS name"),
        ("security.http_hosts = {'*' = []}", "security.http_hosts", "full DNS name"),
        ("security.http_hosts = {a = ['b:80']}", "security.http_hosts.'a'[0]", "a host as"),
        ("security.http_hosts = {a = ['b', 'B']}", "security.http_hosts.'a'[1]", "a host as"),
        ("security.http_hosts = {a = ['10.0.0']}", "security.http_hosts.'a'[0]", "a host as"),
        ("security.http_hosts = {a = ['::1']}", "security.http_hosts.'a'[0]", "a host as"),
        ("security.http_hosts = {a = ['[::01]']}", "security.http_hosts.'a'[0]", "a host as"),
        ("security.http_hosts = {a = ['[10.0.0.1]']}", "security.http_hosts.'a'[0]", "a host as"),
        ("security.http_hosts = {a = ['*.b']}", "security.http_hosts.'a'[0]", "a host as"),
        ("security.http_origins = {'10.0.0.1' = []}", "security.http_origins", "full DNS name"),
        ("security.http_origins = {a = ['b.test']}", "security.http_origins.'a'[0]", "https://"),
        ("security.http_origins = {a = ['null']}", "security.http_origins.'a'[0]", "or '*'"),
        ("security.http_origins = {a = ['https://b/']}", "security.http_origins.'a'[0]", "https:"),
        ("security.http_origins = {a = ['https://B']}", "security.http_origins.'a'[0]", "https:"),
        (
            "security.http_origins = {a = ['https://b:443']}",
            "security.http_origins.'a'[0]",
            "an origin as browsers send it",
        ),
        (
            "security.http_origins = {a = ['https://b:65536']}",
            "security.http_origins.'a'[0]",
            "an origin as browsers send it",
        ),
        ("metrics.listen = '9090'", "metrics.listen", "must be host:port"),
        ("metrics.listen = ':9464'", "metrics.listen", "an address or localhost"),
        ("metrics.listen = '127.0.0.1:0'", "metrics.listen", "must be host:port"),
        ("metrics.listen = 'box.example.test:9464'", "metrics.listen", "an address or localhost"),
        ("metrics.listen = '::1:9464'", "metrics.listen", "must be host:port"),
        ("metrics.listen = '[127.0.0.1]:9464'", "metrics.listen", "must be host:port"),
        ("metrics.listen = '[fe80::1%eth0]:9464'", "metrics.listen", "must be host:port"),
        ("metrics.listen = 'localhost:99999'", "metrics.listen", "must be host:port"),
        ("metrics.listen = 'localhost:²'", "metrics.listen", "must be host:port"),
    ],
)
def test_problem_names_its_key_and_says_what_is_right(text, key, hint):
    [problem] = problems_of(text)
    assert problem.startswith(f"{key}: ")
    assert hint in problem


@pytest.mark.parametrize(
    ("own", "listed"),
    [
        ("auto", ["172.30.0.0/24", "fd12::/64", "10.0.0.0/8", "192.168.1.7", "100.64.0.1"]),
        ("10.9.0.0/16", ["10.9.0.1/32", "10.8.0.0/16", "100.0.0.0/8"]),
        ("auto", [f"10.9.{number}.0/24" for number in range(100)]),
    ],
)
def test_networks_of_containers_are_taken(own, listed):
    text = f'network.ipv4_cidr_range = "{own}"\nsecurity.allow_forwarded_from = {listed}'
    assert parse(text).security.allow_forwarded_from == listed


@pytest.mark.parametrize("own", ["x", "172.30.0.7/32"])
def test_wrong_range_is_no_fault_of_the_networks_beside_it(own):
    [problem] = problems_of(
        f'network.ipv4_cidr_range = "{own}"\nsecurity.allow_forwarded_from = ["172.30.0.0/24"]'
    )
    assert problem.startswith("network.ipv4_cidr_range")


def test_hosts_and_origins_that_requests_can_have_are_taken():
    hosts = {"app.demo.test": ["localhost", "a-b.c_d.test", "10.0.0.1", "[::1]", "*"], "1.x": []}
    origins = ["*", "https://x.test", "http://x.test:8080", "http://[::1]:1", "app+x://y"]
    found = parse(
        f"security.http_hosts = {_inline(hosts)}\n"
        f"security.http_origins = {_inline({'app.demo.test': origins})}"
    )
    assert found.security.http_hosts == hosts
    assert found.security.http_origins == {"app.demo.test": origins}


def _inline(table: dict[str, list[str]]) -> str:
    return "{" + ", ".join(f"'{key}' = {values}" for key, values in table.items()) + "}"


def test_rules_that_fit_into_no_message_are_refused():
    label = "a" * 63
    names = {f"n{number}.{label}.{label}.{label}": ["*"] for number in range(320)}
    [problem] = problems_of(f"security.http_hosts = {_inline(names)}")
    assert problem.startswith("security.http_hosts: must have at most 65536 bytes together with")
    fewer = dict(list(names.items())[:300])
    parse(f"security.http_hosts = {_inline(fewer)}")


def test_all_problems_are_told_in_one_go():
    found = problems_of(
        """
        colour = "red"
        [network]
        mtu = 1
        interface = 3
        [dns]
        upstream = ["x", "192.0.2.1", "y"]
        shape = "round"
        [proxy]
        workers = 100
        """
    )
    assert [problem.split(":")[0] for problem in found] == [
        "colour",
        "network.interface",
        "dns.shape",
        "network.mtu",
        "dns.upstream[0]",
        "dns.upstream[2]",
        "proxy.workers",
    ]


@pytest.mark.parametrize("text", ["user = ", "a = " + "[" * 100_000, "[a\n", "a = 1\na = 2", "\0"])
def test_what_is_no_toml_is_said_to_be_none(text):
    [problem] = problems_of(text)
    assert problem.startswith("not valid TOML: ")


@given(st.text(max_size=60))
def test_only_its_own_error_is_raised(text):
    with contextlib.suppress(MisconfiguredError):
        parse(text)


@given(
    st.sampled_from(sorted(tomllib.loads(WHOLE)["network"])),
    st.one_of(
        st.integers(), st.text(max_size=20), st.floats(), st.lists(st.integers(), max_size=2)
    ),
)
def test_odd_values_raise_only_the_own_error(key, value):
    raw = {"network": {key: value}}
    problems: list[str] = []
    found = config._convert(raw, Config, "", problems)
    list(config._impossible_values(found))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("192.0.2.1", ("192.0.2.1", 53, "")),
        ("192.0.2.1:5353", ("192.0.2.1", 5353, "")),
        ("2001:db8::1", ("2001:db8::1", 53, "")),
        ("[2001:db8::1]", ("2001:db8::1", 53, "")),
        ("[2001:db8::1]:5353", ("2001:db8::1", 5353, "")),
        ("fe80::1%eth0", ("fe80::1", 53, "eth0")),
        ("[fe80::1%eth0]:53", ("fe80::1", 53, "eth0")),
    ],
)
def test_server_is_split_into_address_port_and_interface(text, wanted):
    assert split_server(text) == wanted


def test_default_file_need_not_exist_but_a_named_one_must(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "vnet.toml")
    assert read(None) == Config()
    with pytest.raises(MisconfiguredError, match=r"other\.toml does not exist"):
        read(tmp_path / "other.toml")
    (tmp_path / "vnet.toml").write_text("network.mtu = 1500")
    assert read(None).network.mtu == 1500


def test_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(MisconfiguredError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'user = "\xe4"')
    with pytest.raises(MisconfiguredError, match="cannot be read"):
        read(tmp_path / "latin.toml")

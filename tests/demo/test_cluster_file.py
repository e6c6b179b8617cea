import contextlib
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.cluster.config import ClusterFile, PortRange, default_clusters, parse_cluster_file
from demo.cluster.errors import ClusterFileError

PAGE = Path(__file__).parents[2] / "docs" / "demo.md"
WHOLE = """
[[clusters]]
name = "root.example.test"
leaf_of = ""
proxy_addr = "teleport.root.example.test:3080"
ipv4_cidr_range = "100.64.0.0/10"
custom_dns_zones = ["corp.example.test"]
user = "bob@example.test"
logins = ["bob", "root"]
roles = ["access", "dev"]
cert_ttl_seconds = 60
tls_routing = false
ssh_proxy_port = 3023
conn_upgrade_required = false
ping_interval_seconds = 5

[[clusters.apps]]
name = "pg"
uri = "tcp://127.0.0.1:5432"
public_addr = "pg.root.example.test"
session_mfa = true
allowed_roles = ["dev"]

[[clusters.apps]]
name = "many"
uri = "tcp://127.0.0.1"
tcp_ports = [{ port = 5432 }, { port = 6000, end_port = 6010 }]

[[clusters.nodes]]
hostname = "node1"
addr = "127.0.0.1:2222"
session_mfa = false

[[clusters.databases]]
name = "orders"
protocol = "postgres"
uri = "127.0.0.1:5432"
session_mfa = true
allowed_roles = ["dba"]

[[clusters]]
name = "leaf.example.test"
leaf_of = "root.example.test"
"""
ROOT = '[[clusters]]\nname = "r.test"\nproxy_addr = "p.r.test:443"\n'
APP = ROOT + '[[clusters.apps]]\nname = "a"\n'
DATABASE = "[[clusters.databases]]\nname = 'd'\nprotocol = 'postgres'\n"
UUID = "00000000-0000-4000-8000-000000000001"
TCP_APP = APP + 'uri = "tcp://h:1"\n'


def test_every_documented_key_is_understood():
    root, leaf = parse_cluster_file(WHOLE).clusters
    assert (root.name, root.proxy_host, root.proxy_port) == (
        "root.example.test",
        "teleport.root.example.test",
        3080,
    )
    assert root.cert_ttl_seconds == 60
    assert root.ping_interval_seconds == 5
    assert root.ssh_proxy_addr == "teleport.root.example.test:3023"
    assert root.apps[0].backend(0) == ("127.0.0.1", 5432)
    assert root.databases[0].backend == ("127.0.0.1", 5432)
    assert root.databases[0].allowed_roles == ("dba",)
    assert leaf.leaf_of == root.name


def test_the_example_of_the_documentation_is_understood_and_has_every_key():
    _, _, rest = PAGE.read_text().partition("```toml\n")
    text = rest.partition("```")[0]
    (cluster,) = parse_cluster_file(text).clusters
    written = tomllib.loads(text)["clusters"][0]
    parts = (cluster, cluster.apps[0], cluster.nodes[0], cluster.databases[0])
    tables = (written, *(written[name][0] for name in ("apps", "nodes", "databases")))
    for part, table in zip(parts, tables, strict=True):
        assert table.keys() == {key.encode_name for key in msgspec.structs.fields(part)}


def test_public_addr_defaults_to_name_and_proxy_host():
    root, _ = parse_cluster_file(WHOLE).clusters
    assert root.apps[1].public_addr == "many.teleport.root.example.test"


def test_multi_port_app_leads_to_the_target_port():
    many = parse_cluster_file(WHOLE).clusters[0].apps[1]
    assert many.backend(6003) == ("127.0.0.1", 6003)
    assert [many.allows_port(p) for p in (5432, 6000, 6010, 6011, 5433, 0)] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "clusters"),
        ("clusters = 1", "$.clusters"),
        ("clusters = []", "$.clusters"),
        ("nonsense", "Expected '=' after a key"),
        (ROOT + "surprise = 1\n", "surprise"),
        ("[[clusters]]\nproxy_addr = 'p.test:1'\n", "name"),
        ("[[clusters]]\nname = 'r.test'\n", "clusters[0].proxy_addr"),
        (ROOT.replace("p.r.test:443", "p.r.test"), "clusters[0].proxy_addr"),
        (ROOT.replace("p.r.test:443", "p.r.test:70000"), "clusters[0].proxy_addr"),
        (ROOT.replace("r.test", "a/b", 1), "clusters[0].name"),
        (ROOT + "cert_ttl_seconds = '1h'\n", "cert_ttl_seconds"),
        (ROOT + "cert_ttl_seconds = 0\n", "cert_ttl_seconds"),
        (ROOT + "tls_routing = 1\n", "tls_routing"),
        (ROOT + "roles = []\n", "roles"),
        (ROOT + "user = '../x'\n", "clusters[0].user"),
        (ROOT + "ping_interval_seconds = -1\n", "ping_interval_seconds"),
        (ROOT + "ipv4_cidr_range = '10.0.0.1/8'\n", "ipv4_cidr_range"),
        (ROOT + "custom_dns_zones = ['a..b']\n", "custom_dns_zones"),
        (ROOT + "leaf_of = 'other.test'\n", "clusters[0].leaf_of"),
        (ROOT + ROOT, "clusters: two have the same name"),
        (ROOT + ROOT.replace('name = "r', 'name = "s'), "proxy_addr"),
        (APP, "uri"),
        (APP + "uri = 'ftp://h:1'\n", "clusters[0].apps[0].uri"),
        (APP + "uri = 'tcp://h'\n", "clusters[0].apps[0].uri"),
        (APP + "uri = 'tcp://h:x'\n", "clusters[0].apps[0].uri"),
        (APP + "uri = 'tcp://[h'\n", "clusters[0].apps[0].uri"),
        (TCP_APP + "tcp_ports = [{ port = 1 }]\n", "clusters[0].apps[0].uri"),
        (TCP_APP + "tcp_ports = [{ port = 0 }]\n", "tcp_ports[0].port"),
        (TCP_APP + "tcp_ports = [{ port = 9, end_port = 8 }]\n", "tcp_ports[0].end_port"),
        (TCP_APP + "port = 3\n", "port"),
        (TCP_APP + "public_addr = '-'\n", "clusters[0].apps[0].public_addr"),
        (TCP_APP + "[[clusters.apps]]\nname = 'A'\nuri = 'tcp://h:1'\n", "clusters[0].apps"),
        (ROOT + "[[clusters.nodes]]\nhostname = 'n'\naddr = 'n'\n", "clusters[0].nodes[0].addr"),
        (ROOT + "[[clusters.nodes]]\nhostname = '../n'\n", "clusters[0].nodes[0].hostname"),
        (ROOT + "[[clusters.nodes]]\nhostname = 'n'\nuuid = 'n'\n", "clusters[0].nodes[0].uuid"),
        (
            ROOT
            + "nodes = [{ hostname = 'n', uuid = '%s' }, { hostname = 'm', uuid = '%s' }]\n"
            % ((UUID,) * 2),
            "clusters[0].nodes",
        ),
        (ROOT + "session_recording = 'off'\n", "session_recording"),
        (ROOT + "[[clusters.databases]]\nname = 'd'\nuri = 'h:1'\n", "protocol"),
        (ROOT + DATABASE + "uri = 'h'\n", "clusters[0].databases[0].uri"),
        (ROOT + DATABASE + "uri = 'h:0'\n", "clusters[0].databases[0].uri"),
        (ROOT + DATABASE + "uri = 'h:1'\nsession_mfa = 1\n", "session_mfa"),
        (ROOT + 2 * (DATABASE + "uri = 'h:1'\n"), "clusters[0].databases: two have the same"),
        (ROOT + "ssh_proxy_port = 70000\n", "ssh_proxy_port"),
        (ROOT + "ssh_proxy_port = 3023\n", "clusters[0].ssh_proxy_port"),
        (ROOT + "tls_routing = false\nssh_proxy_port = 443\n", "clusters[0].ssh_proxy_port"),
    ],
)
def test_error_names_the_key(text, key):
    with pytest.raises(ClusterFileError) as error:
        parse_cluster_file(text)
    assert key in str(error.value)


@given(st.text(max_size=300) | st.text("[]{}=.\"' \n0123clusters.appsuri", max_size=300))
def test_any_text_raises_only_its_own_error(text):
    with contextlib.suppress(ClusterFileError):
        assert isinstance(parse_cluster_file(text), ClusterFile)


def test_default_clusters_are_those_of_the_demo():
    root, leaf = default_clusters().clusters
    addresses = [app.public_addr for app in (*root.apps, *leaf.apps)]
    assert addresses == [
        "hello.demo.test",
        "echo.demo.test",
        "ports.demo.test",
        "hello.leaf.demo.test",
    ]
    assert root.proxy_host == "teleport.demo.test"
    assert root.apps[2].tcp_ports == (PortRange(port=8000, end_port=8010),)

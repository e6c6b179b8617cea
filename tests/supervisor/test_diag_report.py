"""The report of `vnet diag`: its layout, its text, and what must never be in it."""

import ast
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.diag import markdown
from supervisor.diag.findings import NOTES, FindingId, finding
from supervisor.diag.model import (
    AttemptStatus,
    CheckAttempt,
    CheckReport,
    CheckStatus,
    CommandAttempt,
    Detail,
    DnsRecord,
    DnsReport,
    DnsServerReachability,
    DnsZone,
    NetworkStack,
    NetworkStackAttempt,
    RecordStatus,
    Report,
    RouteConflict,
    RouteConflictReport,
    SshConfigurationReport,
    checked,
)
from supervisor.diag.redact import HIDDEN, cleaned, plain, redact

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs" / "schema" / "diag.json"
GUIDE = ROOT / "docs" / "diagnostics.md"
LOCAL = "2026-01-31 13:00:00 +0100"


def attempt(name: str, report: CheckReport, *commands: CommandAttempt) -> CheckAttempt:
    return CheckAttempt(
        id=name, status=AttemptStatus.OK, error="", check_report=report, commands=list(commands)
    )


def failed(name: str, error: str) -> CheckAttempt:
    empty = CheckReport(status=CheckStatus.UNSPECIFIED, findings=[], details=[])
    return CheckAttempt(id=name, status=AttemptStatus.ERROR, error=error, check_report=empty)


def report_of(*checks: CheckAttempt, network: NetworkStack | None = None) -> Report:
    stack = NetworkStackAttempt(status=AttemptStatus.OK, network_stack=network)
    if network is None:
        stack = NetworkStackAttempt(status=AttemptStatus.ERROR, error="VNet is not running")
    return Report(
        created_at="2026-01-31T12:00:00Z",
        version="1.2.3",
        network_stack_attempt=stack,
        checks=list(checks),
    )


PROBLEM = finding(FindingId.ROUTE_CONFLICT, "It is in the way.", "Move it.")
NOTE = finding(FindingId.IPV6_OFF, "It is off.", "Leave it.")
NETWORK = NetworkStack(
    interface_name="vnet0",
    ipv4_cidr_ranges=["100.64.0.0/10", "10.5.0.0/16"],
    ipv6_prefix="",
    dns_zones=["a.test", "b.test"],
)


# -- layout --


def test_schema_is_that_of_the_reports():
    raw = msgspec.json.encode(msgspec.json.schema(Report))
    assert SCHEMA.read_text() == msgspec.json.format(raw, indent=2).decode() + "\n"


def test_json_has_the_layout_that_is_promised():
    conflict = RouteConflict(
        dest="100.80.0.0/16", vnet_dest="100.64.0.0/10", interface_name="v", interface_app="v"
    )
    command = CommandAttempt(status=AttemptStatus.OK, error="", command="ip route", output="x")
    report = report_of(
        attempt("routes", checked([PROBLEM], routes=RouteConflictReport(route_conflicts=[conflict])), command),
        network=NETWORK,
    )  # fmt: skip
    assert json.loads(msgspec.json.encode(report)) == {
        "schema": 1,
        "createdAt": "2026-01-31T12:00:00Z",
        "version": "1.2.3",
        "networkStackAttempt": {
            "status": "OK",
            "error": "",
            "networkStack": {
                "interfaceName": "vnet0",
                "ipv4CidrRanges": ["100.64.0.0/10", "10.5.0.0/16"],
                "ipv6Prefix": "",
                "dnsZones": ["a.test", "b.test"],
            },
        },
        "checks": [
            {
                "id": "routes",
                "status": "OK",
                "error": "",
                "checkReport": {
                    "status": "ISSUES_FOUND",
                    "findings": [
                        {
                            "id": "route-conflict",
                            "severity": "problem",
                            "text": "It is in the way.",
                            "advice": "Move it.",
                        }
                    ],
                    "details": [],
                    "routeConflictReport": {
                        "routeConflicts": [
                            {
                                "dest": "100.80.0.0/16",
                                "vnetDest": "100.64.0.0/10",
                                "interfaceName": "v",
                                "interfaceApp": "v",
                            }
                        ]
                    },
                    "sshConfigurationReport": None,
                    "dnsReport": None,
                },
                "commands": [{"status": "OK", "error": "", "command": "ip route", "output": "x"}],
            }
        ],
    }


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        ((attempt("ipv6", checked([])),), False),
        ((attempt("ipv6", checked([NOTE])),), False),
        ((attempt("ipv6", checked([NOTE])), attempt("routes", checked([PROBLEM]))), True),
        ((failed("dns", "it took too long"),), True),
    ],
    ids=["nothing", "a note", "a problem", "not looked at"],
)
def test_problems_and_what_could_not_be_looked_at_are_issues(checks, expected):
    assert report_of(*checks).has_issues is expected


def test_each_finding_is_explained_and_can_be_found():
    headings = re.findall(r"^### (.+)$", GUIDE.read_text(), re.MULTILINE)
    assert headings == [found.value for found in FindingId]
    folder = ROOT / "supervisor" / "diag"
    used = {
        node.attr
        for path in (*folder.glob("*_check.py"), folder / "surroundings.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "FindingId"
    }
    assert used == {found.name for found in FindingId}
    assert set(FindingId) >= NOTES


# -- text --


def test_text_begins_with_what_matters_and_ends_with_a_line_feed():
    text = markdown.render(
        report_of(
            attempt("routes", checked([PROBLEM])),
            attempt("ipv6", checked([NOTE])),
            failed("dns", "it took too long"),
            network=NETWORK,
        ),
        LOCAL,
    )
    lines = text.splitlines()
    assert lines[0].startswith("# VNet diagnostic report")
    assert lines[1:7] == [
        "",
        "Created at: 2026-01-31 13:00:00 +0100 (2026-01-31T12:00:00Z)",
        "Network interface: vnet0",
        "IPv4 CIDR ranges: 100.64.0.0/10, 10.5.0.0/16",
        "IPv6 prefix: none, IPv6 is off",
        "DNS zones: a.test, b.test",
    ]
    assert lines[8] == "⚠️ Problems found: 1"
    assert lines[9] == "- It is in the way. Move it."
    assert lines[10] == "⚠️ Could not be checked: DNS"
    assert "⚠️ Failed to inspect DNS: it took too long" in lines
    assert lines.count("---") == 3
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_without_a_network_the_reason_is_said():
    text = markdown.render(report_of(), LOCAL)
    assert "The network of VNet could not be determined: VNet is not running" in text
    assert "No problem was found." in text


def test_conflicts_are_a_table():
    rows = [
        RouteConflict(dest=dest, vnet_dest="100.64.0.0/10", interface_name=name, interface_app=name)
        for dest, name in (("100.80.0.0/16", "vpn0"), ("", ""))
    ]
    text = markdown.render(
        report_of(attempt("routes", checked([PROBLEM], routes=RouteConflictReport(route_conflicts=rows)))),
        LOCAL,
    )  # fmt: skip
    assert (
        "| VNet destination | Conflicting destination | Interface | Set up by |\n"
        "| --- | --- | --- | --- |\n"
        "| 100.64.0.0/10 | 100.80.0.0/16 | vpn0 | vpn0 |\n"
        "| 100.64.0.0/10 | a policy rule | none | unknown |\n"
    ) in text


def server(address: str, *kinds: str) -> DnsServerReachability:
    return DnsServerReachability(
        address=address,
        reachable=bool(kinds),
        responded_a="A" in kinds,
        responded_aaaa="AAAA" in kinds,
        error="" if kinds else "late",
    )


def test_dns_shows_servers_and_only_zones_with_problems():
    well = DnsRecord(status=RecordStatus.OK)
    bad = DnsRecord(status=RecordStatus.HIJACKED, observed_ip="192.0.2.9")
    zones = [
        DnsZone(zone="good.test", a_record=well, aaaa_record=None),
        DnsZone(zone="bad.test", a_record=bad, aaaa_record=None),
        DnsZone(zone="half.test", a_record=None, aaaa_record=None),
    ]
    dns = DnsReport(
        ipv4_server=server("100.64.0.2", "A"), ipv6_server=server("fd00::2"), zones=zones
    )
    text = markdown.render(report_of(attempt("dns", checked([], dns=dns))), LOCAL)
    assert "- ✅ VNet's DNS server is reachable on 100.64.0.2 (responds to A only)" in text
    assert "- ⚠️ VNet's DNS server is unreachable on fd00::2: late" in text
    assert "1 of 3 zones do not reach VNet" in text
    assert "| Zone | A |\n| --- | --- |\n| bad.test | hijacked (192.0.2.9) |\n" in text
    assert "good.test" not in text
    assert "None of VNet's DNS addresses" not in text


def test_dns_that_is_dead_gives_a_hint_and_no_zones():
    dns = DnsReport(ipv4_server=server("100.64.0.2"), ipv6_server=None, zones=[])
    text = markdown.render(report_of(attempt("dns", checked([], dns=dns))), LOCAL)
    assert "None of VNet's DNS addresses answers" in text
    assert "| Zone" not in text


def test_ssh_shows_both_files():
    ssh = SshConfigurationReport(
        user_openssh_config_path="/home/a/.ssh/config",
        vnet_ssh_config_path="/home/a/.tsh/vnet_ssh_config",
        user_openssh_config_includes_vnet_ssh_config=False,
        user_openssh_config_exists=False,
        user_openssh_config_contents="",
    )
    text = markdown.render(report_of(attempt("ssh", checked([], ssh=ssh))), LOCAL)
    assert "/home/a/.ssh/config does not exist" in text
    there = msgspec.structs.replace(
        ssh, user_openssh_config_exists=True, user_openssh_config_contents="Host x"
    )
    text = markdown.render(report_of(attempt("ssh", checked([], ssh=there))), LOCAL)
    assert "```\nHost x\n```" in text


def test_commands_and_cells_cannot_break_out():
    tricky = CommandAttempt(
        status=AttemptStatus.ERROR, error="exit status 1", command="ip x", output="a\n```\n# b"
    )
    text = markdown.render(
        report_of(attempt("ipv6", checked([], [Detail(name="n", value="a|b\nc")]), tricky)), LOCAL
    )
    assert "| n | a\\|b c |" in text
    assert "````\n$ ip x\na\n```\n# b\nerror: exit status 1\n````" in text


def test_name_of_the_file_sorts_by_time():
    created = datetime(2024, 11, 23, 13, 27, 48, tzinfo=UTC)
    assert markdown.file_name(created, "txt") == "vnet_diag_report_2024-11-23_13-27-48.txt"


# -- secrets --

CANARY = "canary7Xq"
KEY = f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"x {KEY} y", f"x {HIDDEN} y"),
        (f"-----BEGIN OPENSSH PRIVATE KEY-----\n{CANARY}", HIDDEN),
        (f"http://user:{CANARY}@fw.test:3128/x", f"http://{HIDDEN}@fw.test:3128/x"),
        (f"http://user:p@{CANARY}@fw.test", f"http://{HIDDEN}@fw.test"),
        (f"https://{CANARY}@fw.test", f"https://{HIDDEN}@fw.test"),
        (f"otpauth://totp/x?secret={CANARY}", HIDDEN),
        (f"Cookie: session={CANARY}; b=c", f"Cookie: {HIDDEN}"),
        (f"Proxy-Authorization: Basic {CANARY}", f"Proxy-Authorization: {HIDDEN}"),
        (f"sent Bearer abcdefg.{CANARY}", f"sent Bearer {HIDDEN}"),
        (f"psk_password={CANARY} via eth0", f"psk_password={HIDDEN} via eth0"),
        (f'"client_secret": "{CANARY}"', f'"client_secret": {HIDDEN}'),
        (f"TOTP: {CANARY}", f"TOTP: {HIDDEN}"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text, left):
    assert redact(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "default via 192.0.2.1 dev eth0 proto dhcp metric 100",
        "fe80::/64 dev eth0 proto kernel metric 256 pref medium",
        "The cluster does not answer: https://proxy.test:443/ping: timed out",
        "user@host is no URL",
        "CA cert does not include basic constraints",
        "Run: vnet login teleport.example.com",
    ],
)
def test_what_is_none_stays(text):
    assert redact(text) == text


@pytest.mark.parametrize("piece", ["a", "a.-", "://", "-----BEGIN ", "x=", "@", "token"])
def test_long_texts_do_not_take_long(piece):
    began = time.monotonic()
    redact(piece * 30_000)
    assert time.monotonic() - began < 5


def test_everything_in_a_tree_is_cleaned():
    tree = {"a": [f"token={CANARY}", {"b": "x\x1b[2Jy\n\t"}], "n": 1, "f": None}
    assert cleaned(tree) == {"a": [f"token={HIDDEN}", {"b": "x�[2Jy\n\t"}], "n": 1, "f": None}


@given(st.text())
def test_cleaning_twice_is_cleaning_once_for_the_terminal(text):
    assert plain(plain(text)) == plain(text)
    assert "\x1b" not in plain(text)

"""`vnet diag` in whole systems: what is well is said to be well, and each problem is made for real."""

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bare_clusters import UPSTREAM_ADDRESS, upstream_dns
from private_bed import Bed, as_nobody, wait_until
from test_e2e_resolver import etc_of, state_of, vnet_in, wait_until_healthy, with_cluster
from test_e2e_routes import link

from supervisor.cli.control_client import ask
from supervisor.control_messages import Diag
from supervisor.diag.model import Report

pytestmark = [
    pytest.mark.root,
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft"),
]

# The contract of the command, with something for a busy machine.
LONGEST_SECONDS = 25.0
CANARY = "canary-5e2d"
# Answers to what was asked recursively, as programs do; the supervisor's own probes do not, and go on.
TO_PROGRAMS = "udp sport 53 @th,80,16 & 0x0100 == 0x0100 drop"


class Found:
    """A finished `vnet diag --json`."""

    def __init__(self, bed: Bed, *options: str, env: Mapping[str, str] | None = None) -> None:
        began = time.monotonic()
        done = bed.run("vnet", "diag", "--json", *options, env=env)
        assert time.monotonic() - began < LONGEST_SECONDS
        assert done.returncode in (0, 1), done.stderr.decode()
        assert done.stderr == b""
        self.status = done.returncode
        self.text = done.stdout.decode()
        # Strict: what the schema does not know would be lost in the way back.
        report = msgspec.json.decode(done.stdout, type=Report)
        assert msgspec.json.encode(report) + b"\n" == done.stdout
        self.report = json.loads(done.stdout)
        self.checks: dict[str, Any] = {check["id"]: check for check in self.report["checks"]}
        self.findings = [f for c in self.checks.values() for f in c["checkReport"]["findings"]]

    @property
    def problems(self) -> dict[str, str]:
        return {f["id"]: f["text"] for f in self.findings if f["severity"] == "problem"}

    @property
    def notes(self) -> dict[str, str]:
        return {f["id"]: f["text"] for f in self.findings if f["severity"] == "note"}

    def of(self, check: str, report: str) -> Any:
        return self.checks[check]["checkReport"][report]


@contextlib.contextmanager
def firewall(bed: Bed, *rules: str) -> Iterator[None]:
    """Drops what these rules match of what comes in, without a word."""
    chain = "\n".join(["type filter hook input priority 0;", *rules])
    text = f"table inet diag {{\nchain silent {{\n{chain}\n}}\n}}\n"
    bed.output("nft", "-f", "-", stdin=text.encode())
    try:
        yield
    finally:
        bed.output("nft", "delete", "table", "inet", "diag")


@contextlib.contextmanager
def nameserver(bed: Bed, address: str) -> Iterator[None]:
    """Programs of the bed ask this server."""
    path = bed.path("/etc/resolv.conf")
    before = path.read_text()
    path.write_text(f"nameserver {address}\n")
    try:
        yield
    finally:
        path.write_text(before)


@contextlib.contextmanager
def own_home(bed: Bed) -> Iterator[Path]:
    """The home directory of the VNet user is an empty one of the bed's own."""
    home = bed.directory / "home"
    home.mkdir()
    user = pwd.getpwuid(os.getuid())
    lines = Path("/etc/passwd").read_text().splitlines()
    changed = [
        f"{user.pw_name}:x:{user.pw_uid}:{user.pw_gid}::{home}:/bin/sh"
        if line.startswith(f"{user.pw_name}:")
        else line
        for line in lines
    ]
    passwd = bed.directory / "passwd"
    passwd.write_text("\n".join(changed) + "\n")
    bed.output("mount", "--bind", str(passwd), "/etc/passwd")
    try:
        yield home
    finally:
        bed.output("umount", "/etc/passwd")
        shutil.rmtree(home)


def test_a_vnet_that_works_has_no_issues_and_the_report_shows_what_was_looked_at(bed):
    found = Found(bed)
    assert (found.status, found.problems) == (0, {})
    assert all(check["status"] == "OK" for check in found.checks.values())
    network = found.report["networkStackAttempt"]["networkStack"]
    status = bed.status()["network"]
    assert network == {
        "interfaceName": "vnet0",
        "ipv4CidrRanges": status["ipv4_cidr_ranges"],
        "ipv6Prefix": status["ipv6_prefix"],
        "dnsZones": status["dns_zones"],
    }
    dns = found.of("dns", "dnsReport")
    for family, number in (("ipv4Server", 0), ("ipv6Server", 1)):
        assert dns[family] == {
            "address": status["dns_addresses"][number],
            "reachable": True,
            "respondedA": True,
            "respondedAaaa": True,
            "error": "",
        }
    well = {"status": "OK", "observedIp": "", "error": ""}
    assert dns["zones"] == [
        {"zone": zone, "aRecord": well, "aaaaRecord": well} for zone in status["dns_zones"]
    ]
    commands = {c["command"]: c["output"] for c in found.checks["routes"]["commands"]}
    assert "100.64.0.0/10 dev vnet0" in commands["ip route show"]
    assert status["ipv6_prefix"] in commands["ip -6 route show"]
    [proxy] = found.of("proxies", "details")
    assert "answers, Teleport 18" in proxy["value"]


def test_text_is_for_people_and_is_saved_under_a_name_for_the_owner_alone(bed):
    done = bed.run("vnet", "diag")
    assert done.returncode == 0
    text = done.stdout.decode()
    assert text.startswith("# VNet diagnostic report")
    assert "No problem was found." in text
    assert "$ ip route show\n100.64.0.0/10 dev vnet0" in text
    folder = bed.directory / "reports"
    folder.mkdir()
    saved = bed.run("vnet", "diag", "--output", str(folder))
    [path] = folder.iterdir()
    assert (saved.returncode, saved.stdout) == (0, b"")
    assert str(path) in saved.stderr.decode()
    assert re.fullmatch(r"vnet_diag_report_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.txt", path.name)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().startswith("# VNet diagnostic report")


def test_every_interface_with_an_overlapping_route_is_named(bed):
    with link(bed, "vpn0", "10.200.0.2/32"), link(bed, "docker7", "100.99.7.1/24"):
        bed.output("ip", "route", "add", "100.80.0.0/16", "dev", "vpn0")
        found = Found(bed)
    assert found.status == 1
    texts = [f["text"] for f in found.findings if f["id"] == "route-conflict"]
    assert len(texts) == 2
    rows = found.of("routes", "routeConflictReport")["routeConflicts"]
    assert {(r["interfaceName"], r["dest"]) for r in rows} >= {
        ("vpn0", "100.80.0.0/16"),
        ("docker7", "100.99.7.0/24"),
    }
    assert {r["vnetDest"] for r in rows} == {"100.64.0.0/10"}
    assert not Found(bed).of("routes", "routeConflictReport")["routeConflicts"]


def test_blocked_dns_server_is_found_and_the_zones_are_not_blamed(bed):
    with firewall(bed, f"iifname vnet0 {TO_PROGRAMS}"):
        found = Found(bed)
    assert found.status == 1
    # The names of proxies go through VNet too, and it may notice.
    assert found.problems.keys() - {"vnet-degraded"} == {
        "dns-server-unreachable",
        "proxy-not-found",
    }
    dns = found.of("dns", "dnsReport")
    assert not dns["ipv4Server"]["reachable"]
    assert "no answer" in dns["ipv4Server"]["error"]
    assert not dns["ipv6Server"]["reachable"]
    assert dns["zones"] == []


def test_ipv6_black_hole_is_told_from_a_dead_server(bed):
    prefix = bed.status()["network"]["ipv6_prefix"]
    with firewall(bed, f"ip6 saddr {prefix}/64 {TO_PROGRAMS}"):
        found = Found(bed)
    assert found.problems.keys() == {"dns-server-unreachable", "ipv6-black-hole"}
    # Names still reach VNet, over IPv4.
    zones = found.of("dns", "dnsReport")["zones"]
    assert {z["aaaaRecord"]["status"] for z in zones} == {"OK"}


def test_ipv6_prefix_that_leads_nowhere_is_found(bed):
    prefix = f"{bed.status()['network']['ipv6_prefix']}/64"
    bed.output("ip", "-6", "route", "add", "blackhole", prefix, "metric", "1")
    try:
        found = Found(bed)
    finally:
        bed.output("ip", "-6", "route", "delete", "blackhole", prefix, "metric", "1")
    assert "nowhere" in found.problems["ipv6-not-routed"]


def test_hijacked_zone_is_told_with_the_address_that_was_given(bed):
    with upstream_dns(bed, "127.0.0.99"), nameserver(bed, "127.0.0.99"):
        found = Found(bed)
    assert UPSTREAM_ADDRESS in found.problems["dns-zone-hijacked"]
    for zone in found.of("dns", "dnsReport")["zones"]:
        assert zone["aRecord"]["status"] == "HIJACKED"
        assert zone["aRecord"]["observedIp"] == UPSTREAM_ADDRESS


def test_zone_that_nobody_sends_to_vnet_is_not_registered(bed):
    with nameserver(bed, "127.0.0.54"):
        found = Found(bed)
    assert found.problems.keys() == {"dns-zone-not-registered"}
    for zone in found.of("dns", "dnsReport")["zones"]:
        assert zone["aRecord"]["status"] == zone["aaaaRecord"]["status"] == "NOT_REGISTERED"
    # The process that answers instead is named.
    assert "vnet (process" in found.notes["port-53-held"]


def test_resolver_that_is_silent_costs_no_more_than_the_time_it_is_given(bed):
    with nameserver(bed, "127.0.0.77"), firewall(bed, "ip daddr 127.0.0.77 drop"):
        found = Found(bed)
    # VNet may have noticed that it finds no proxies either.
    assert found.problems.keys() - {"vnet-degraded"} == {"dns-timeout", "proxy-not-found"}


def test_expired_login_is_told_with_what_to_do(bed):
    with bed.faults("expire_login"):
        wait_until(
            lambda: bed.status()["clusters"][0]["state"] == "login_expired", "VNet has noticed"
        )
        found = Found(bed)
    assert found.problems.keys() == {"login-expired"}
    [finding] = [f for f in found.findings if f["id"] == "login-expired"]
    assert "vnet login teleport.e2e.test" in finding["advice"]
    bed.wait_for_health("healthy")


def test_missing_include_is_a_note_until_it_is_there(bed):
    with own_home(bed) as home:
        (home / ".ssh").mkdir()
        config = home / ".ssh" / "config"
        config.write_text(f"Host old\n  ProxyCommand nc --password {CANARY} %h\n")
        found = Found(bed)
        assert (found.status, "ssh-include-missing" in found.notes) == (0, True)
        ssh = found.of("ssh", "sshConfigurationReport")
        assert ssh["userOpensshConfigPath"] == str(config)
        assert ssh["userOpensshConfigExists"]
        assert not ssh["userOpensshConfigIncludesVnetSshConfig"]
        assert CANARY not in found.text
        include = f'Include "{bed.environment["TELEPORT_HOME"]}/vnet_ssh_config"\n'
        config.write_text(include + config.read_text())
        found = Found(bed)
        assert "ssh-include-missing" not in found.notes
        assert found.of("ssh", "sshConfigurationReport")["userOpensshConfigIncludesVnetSshConfig"]


def test_no_secret_is_in_a_report(bed):
    secrets = {CANARY}
    for path in bed.path(bed.environment["TELEPORT_HOME"]).rglob("*"):
        text = path.read_text(errors="replace") if path.is_file() else ""
        if "PRIVATE KEY" in text:
            secrets |= set(re.findall(r"[A-Za-z0-9+/]{24,}", text.replace("\\n", "\n")))
        if path.name == "totp-secret":
            secrets.add(text.strip())
    assert len(secrets) > 4
    proxy = f"http://{CANARY}:{CANARY}@127.0.0.1:9"
    env = {"HTTPS_PROXY": proxy, "NO_PROXY": "", "AWS_SECRET_ACCESS_KEY": CANARY}
    found = Found(bed, env=env)
    assert "http://127.0.0.1:9" in found.problems["cluster-unreachable"]
    text = bed.run("vnet", "diag", env=env).stdout.decode()
    for secret in secrets:
        assert secret not in found.text
        assert secret not in text


def test_what_a_killed_vnet_has_left_is_found_and_nothing_is_changed_by_looking():
    with with_cluster() as bed:
        home = bed.environment["TELEPORT_HOME"]
        config = str(bed.directory / "vnet.toml")
        options = ("--state-dir", str(state_of(bed)), "--config", config)
        with vnet_in(bed) as pid:
            wait_until_healthy(bed)
            found = Found(bed)
            assert (found.status, found.problems) == (0, {})
            details = {d["name"]: d["value"] for d in found.of("resolver", "details")}
            assert details["In use"] == "resolv.conf"
            assert "systemd-resolved" in details["Because"] or "bus" in details["Because"]
            refusal = json.loads(as_nobody(lambda: ask(bed.directory / "run", Diag())))
            assert refusal.keys() == {"status", "text"}
            assert refusal["status"] == 4
            # Somebody else's VNet, as far as this run directory tells, still has the file.
            found = Found(bed, "--run-dir", "/nonexistent", *options)
            assert found.problems.keys() == {"vnet-not-running"}
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: bed.health() == "none", "VNet is dead")
        before = etc_of(bed)
        found = Found(bed, *options)
        assert found.status == 1
        assert found.problems.keys() == {"vnet-not-running", "leftover-changes"}
        assert "/etc/resolv.conf" in found.problems["leftover-changes"]
        assert etc_of(bed) == before
        assert {c for c, check in found.checks.items() if check["status"] == "ERROR"} == {
            "routes",
            "dns",
            "ipv6",
        }
        # Without the journal only the mark is left to tell.
        found = Found(bed, "--state-dir", "/nonexistent")
        assert "/etc/resolv.conf" in found.problems["leftover-file"]
        bed.output("vnet", "repair", "--state-dir", str(state_of(bed)))
        found = Found(bed, *options)
        assert found.problems.keys() == {"vnet-not-running"}
        assert home in str(found.of("logins", "details"))

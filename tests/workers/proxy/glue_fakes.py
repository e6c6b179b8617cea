"""Stand-ins for what Admission and Naming join: clusters, book, bus and supervisor."""

import asyncio
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from ipc import messages as m
from workers.proxy.book import APP, Book, BookError, BookTarget, Entry
from workers.proxy.dial_plan import DialPlan, SshTarget
from workers.proxy.teleport.apps import App
from workers.proxy.teleport.databases import Database
from workers.proxy.teleport.errors import UnknownAppError
from workers.proxy.teleport.targets import (
    AppTarget,
    ClusterTarget,
    DatabaseTarget,
    NotOurs,
    Owner,
    Resolution,
    Target,
)

PLAN = DialPlan(host="proxy.example.test", port=443, tls=None)
SSH_PLAN = DialPlan(
    host="proxy.example.test", port=443, tls=None, ssh=SshTarget("node:0", "example.test")
)
WEB_PLAN = DialPlan(host="proxy.example.test", port=3080, tls=None)
NETWORK = m.Network(
    interface="vnet0",
    mtu=65535,
    ranges=["100.64.0.0/10", "10.1.0.0/16"],
    tun_ipv4=b"\x64\x40\0\1",
    dns_ipv4=b"\x64\x40\0\2",
    ipv6_prefix=None,
    tun_ipv6=None,
    dns_ipv6=None,
)


PROFILE = "teleport.example.test"
WEB_PORT = 3080
OWNER = Owner(PROFILE, "alice", "example.test")


class FakeTeleport:
    """Answers with what the test put into its members; `fresh` has what was made a moment ago."""

    def __init__(self) -> None:
        self.targets: dict[str, Resolution | Exception] = {}
        self.fresh: dict[str, Resolution | Exception] = {}
        self.plan_result: DialPlan | Exception | asyncio.Event = PLAN
        self.owners: dict[str, Owner] = {PROFILE: OWNER}
        self.spellings: list[str] = []
        self.planned: list[tuple[Target, int]] = []
        self.ssh_plan_result: DialPlan | Exception = SSH_PLAN
        self.logins: list[tuple[Target, str]] = []
        self.doubted: list[str] = []

    async def resolve(self, name: str, spelling: str = "", *, fresh: bool = False) -> Resolution:
        self.spellings.append(spelling)
        found = self.targets.get(name, NotOurs())
        if fresh:
            found = self.fresh.get(name, found)
        if isinstance(found, Exception):
            raise found
        return found

    async def plan(self, target: Target, port: int) -> DialPlan:
        self.planned.append((target, port))
        if isinstance(self.plan_result, Exception):
            raise self.plan_result
        if isinstance(self.plan_result, asyncio.Event):
            await self.plan_result.wait()
        return PLAN

    async def ssh_plan(self, target: ClusterTarget) -> DialPlan:
        self.planned.append((target, 22))
        if isinstance(self.ssh_plan_result, Exception):
            raise self.ssh_plan_result
        return self.ssh_plan_result

    async def ssh_credentials(self, target: ClusterTarget, login: str) -> str:
        self.logins.append((target, login))
        return f"credentials of {login}"

    def web_plan(self, profile: str) -> DialPlan:
        if profile not in self.owners:
            raise UnknownAppError(f"there is no profile {profile} any more")
        return WEB_PLAN

    def web_port(self, profile: str) -> int | None:
        return WEB_PORT if profile in self.owners else None

    def doubt(self, profile: str) -> None:
        self.doubted.append(profile)

    def owner(self, profile: str) -> Owner | None:
        return self.owners.get(profile)


class BrokenBook:
    """A book on a disk that is gone."""

    def __init__(self, error: BookError) -> None:
        self._error = error

    def _fail(self, *_: object) -> Entry:
        raise self._error

    by_name = by_address = assign = _fail


def place(ipv4_range: str | None = None, leaf: str = "") -> dict[str, Any]:
    """What all targets have."""
    return {
        "profile": PROFILE,
        "root_cluster": "example.test",
        "leaf": leaf,
        "ipv4_range": None if ipv4_range is None else IPv4Network(ipv4_range),
    }


def app_target(name: str = "pg", ipv4_range: str | None = None) -> AppTarget:
    app = App(name=name, public_addr=f"{name}.example.test", uri="tcp://127.0.0.1:1", ports=None)
    return AppTarget(app=app, **place(ipv4_range))


def database_target(name: str = "orders", ipv4_range: str | None = None) -> DatabaseTarget:
    return DatabaseTarget(database=Database(name, "postgres"), **place(ipv4_range))


def cluster_target(host: str = "node", ipv4_range: str | None = None) -> ClusterTarget:
    return ClusterTarget(host=host, **place(ipv4_range))


def fill(
    book: Book, name: str, network: str = "100.64.0.0/10", *, kind: str = APP, spelling: str = ""
) -> IPv4Address:
    target = BookTarget(
        profile=PROFILE, leaf="", cluster="c", resource="a", kind=kind, spelling=spelling
    )
    return book.assign(name, IPv4Network(network), target).address


@dataclass
class Sent:
    """What was sent to the supervisor or to tun."""

    messages: list[m.Message] = field(default_factory=list)

    def __call__(self, message: m.Message) -> None:
        self.messages.append(message)

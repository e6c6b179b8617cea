"""Stand-ins for what Admission and Naming join: clusters, book, bus and supervisor."""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from ipc import messages as m
from workers.proxy.book import Book, BookError, BookTarget, Entry
from workers.proxy.teleport.apps import App
from workers.proxy.teleport.client import AppTarget, NotOurs

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


class FakeTeleport:
    """Answers with what the test put into `targets` and `dial_result`."""

    def __init__(self) -> None:
        self.targets: dict[str, AppTarget | Exception] = {}
        self.dial_result: object = None
        self.spellings: list[str] = []

    async def resolve(self, name: str, spelling: str = "") -> AppTarget | NotOurs:
        self.spellings.append(spelling)
        found = self.targets.get(name, NotOurs())
        if isinstance(found, Exception):
            raise found
        return found

    async def dial_parameters(self, _target: AppTarget, _port: int) -> object:
        if isinstance(self.dial_result, Exception):
            raise self.dial_result
        return self.dial_result


class BrokenBook:
    """A book on a disk that is gone."""

    def __init__(self, error: BookError) -> None:
        self._error = error

    def _fail(self, *_: object) -> Entry:
        raise self._error

    by_name = by_address = assign = _fail


def app_target(name: str = "pg", ipv4_range: str | None = None) -> AppTarget:
    return AppTarget(
        profile="teleport.example.test",
        root_cluster="example.test",
        leaf="",
        app=App(name=name, public_addr=f"{name}.example.test", uri="tcp://127.0.0.1:1", ports=None),
        ipv4_range=None if ipv4_range is None else IPv4Network(ipv4_range),
    )


def fill(book: Book, name: str, network: str = "100.64.0.0/10") -> IPv4Address:
    target = BookTarget(profile="p", leaf="", cluster="c", app="a")
    return book.assign(name, IPv4Network(network), target).address


@dataclass
class Sent:
    """What was sent to the supervisor or to tun."""

    messages: list[m.Message] = field(default_factory=list)

    def __call__(self, message: m.Message) -> None:
        self.messages.append(message)

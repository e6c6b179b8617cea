"""What the service manager keeps of the link (supervisor.link_store), with a socket in its place."""

import array
import dataclasses
import os
import socket

import msgspec
import pytest
from run_fakes import NETWORK

from ipc.messages import DataPlaneKind
from supervisor import sealed
from supervisor.dataplane import KeptLink
from supervisor.link_store import DNS, INNER, NAMES, NAMESPACE, OUTER, PLAN, LinkStore
from supervisor.notify import Notifier

ROUTED = msgspec.structs.replace(NETWORK, ranges=[*NETWORK.ranges, "10.1.0.0/16"])


class Manager:
    """Keeps descriptors as systemd does."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.kept: list[tuple[str, int]] = []

    def hear(self) -> None:
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(4096, 4096, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            found = array.array("i")
            for _, _, rights in ancillary:
                found.frombytes(rights)
            lines = data.decode().splitlines()
            name = next(line.removeprefix("FDNAME=") for line in lines if "FDNAME=" in line)
            if "FDSTORE=1" in lines:
                assert "FDPOLL=0" in lines
                self.kept[:0] = [(name, descriptor) for descriptor in found]
            else:
                assert "FDSTOREREMOVE=1" in lines
                self.close(name)

    def close(self, *names: str) -> None:
        for name, descriptor in self.kept:
            if name in names:
                os.close(descriptor)
        self.kept = [kept for kept in self.kept if kept[0] not in names]

    def give_back(self) -> dict[str, list[int]]:
        """Copies, as a program that it starts gets them."""
        found: dict[str, list[int]] = {}
        for name, descriptor in self.kept:
            found.setdefault(name, []).append(os.dup(descriptor))
        return found


@pytest.fixture
def manager(tmp_path):
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.close(*(name for name, _ in made.kept))
    made.socket.close()


@pytest.fixture
def notifier(manager):
    made = Notifier({"NOTIFY_SOCKET": manager.socket.getsockname()})
    yield made
    made.close()


@pytest.fixture
def link():
    ends = [os.open(os.devnull, os.O_RDONLY) for _ in range(7)]
    made = KeptLink(ROUTED, ends[0], ends[1], ends[2], tuple(ends[3:]))
    yield made
    made.close()


def same(first: int, second: int) -> bool:
    return os.path.samestat(os.fstat(first), os.fstat(second))


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_link_comes_back_with_its_ranges(notifier, manager, link):
    LinkStore(notifier).keep(link)
    manager.hear()
    assert {name for name, _ in manager.kept} == set(NAMES)
    assert len(manager.kept) == 8
    stored = manager.give_back()
    plan_descriptor = stored[PLAN][0]
    found = LinkStore(notifier, stored).take(NETWORK)
    assert found is not None
    assert found.network == ROUTED
    for mine, theirs in zip(found.descriptors, link.descriptors, strict=True):
        assert same(mine, theirs)
    assert not is_open(plan_descriptor)
    manager.hear()
    assert len(manager.kept) == 8  # for the next time
    found.close()


def test_new_ranges_take_the_place_of_the_old(notifier, manager, link):
    store = LinkStore(notifier)
    store.keep(link)
    store.keep_plan(NETWORK)
    manager.hear()
    assert [name for name, _ in manager.kept].count(PLAN) == 1
    found = LinkStore(notifier, manager.give_back()).take(NETWORK)
    assert found is not None
    assert found.network.ranges == NETWORK.ranges
    found.close()


def test_another_link_takes_the_place_of_the_old(notifier, manager, link):
    store = LinkStore(notifier)
    for _ in range(2):
        store.keep(link)
        manager.hear()
        assert len(manager.kept) == 8
    successor = LinkStore(notifier, manager.give_back())
    taken = successor.take(NETWORK)
    assert taken is not None
    taken.close()
    # It was beyond mending.
    successor.keep(link)
    manager.hear()
    assert len(manager.kept) == 8


def test_other_mtu_is_no_reason_to_take_the_link_down(notifier, manager, link):
    LinkStore(notifier).keep(link)
    manager.hear()
    plan = msgspec.structs.replace(NETWORK, mtu=1400)
    found = LinkStore(notifier, manager.give_back()).take(plan)
    assert found is not None
    assert found.network.mtu == 1400
    found.close()


@pytest.mark.parametrize(
    "changed",
    [
        {"interface": "vnet9"},
        {"ranges": ["10.0.0.0/8"]},
        {"ipv6_prefix": None, "tun_ipv6": None, "dns_ipv6": None},
    ],
)
def test_link_of_another_configuration_is_thrown_away(notifier, manager, link, changed, caplog):
    LinkStore(notifier).keep(link)
    manager.hear()
    stored = manager.give_back()
    plan = msgspec.structs.replace(NETWORK, **changed)
    assert LinkStore(notifier, stored).take(plan) is None
    assert "made anew: the configuration of the network has changed" in caplog.text
    assert not any(is_open(descriptor) for found in stored.values() for descriptor in found)
    manager.hear()
    assert not manager.kept


@pytest.mark.parametrize("lacking", [OUTER, INNER, NAMESPACE, PLAN])
def test_half_a_link_is_thrown_away(notifier, manager, link, lacking, caplog):
    LinkStore(notifier).keep(link)
    manager.hear()
    manager.close(lacking)
    assert LinkStore(notifier, manager.give_back()).take(NETWORK) is None
    assert "not complete" in caplog.text
    manager.hear()
    assert not manager.kept


@pytest.mark.parametrize("wish", [None, DataPlaneKind.REWRITING])
def test_link_without_an_inner_namespace_comes_back(notifier, manager, link, wish):
    smaller = dataclasses.replace(link, inner=None, namespace=None)
    LinkStore(notifier).keep(smaller)
    manager.hear()
    assert {name for name, _ in manager.kept} == {OUTER, DNS, PLAN}
    found = LinkStore(notifier, manager.give_back()).take(NETWORK, wish)
    assert found is not None
    assert found.kind is DataPlaneKind.REWRITING
    assert len(found.descriptors) == len(smaller.descriptors) == 5
    found.close()


@pytest.mark.parametrize("wish", list(DataPlaneKind))
def test_link_of_the_other_kind_is_thrown_away(notifier, manager, link, wish, caplog):
    is_wanted = wish is DataPlaneKind.NAMESPACE
    stored = dataclasses.replace(link, inner=None, namespace=None) if is_wanted else link
    LinkStore(notifier).keep(stored)
    manager.hear()
    given = manager.give_back()
    assert LinkStore(notifier, given).take(NETWORK, wish) is None
    assert f"treated otherwise ({stored.kind})" in caplog.text
    assert not any(is_open(descriptor) for found in given.values() for descriptor in found)
    manager.hear()
    assert not manager.kept


def test_plan_that_cannot_be_read_is_no_plan(notifier, manager, link, caplog):
    for data in (b"", b"nonsense", bytes(100_000)):
        LinkStore(notifier).keep(link)
        manager.hear()
        notifier.remove(PLAN)
        descriptor = sealed.seal("x", data)
        notifier.store(PLAN, [descriptor])
        os.close(descriptor)
        manager.hear()
        assert LinkStore(notifier, manager.give_back()).take(NETWORK) is None
        assert "cannot be read" in caplog.text
        caplog.clear()
        manager.hear()
        assert not manager.kept


def test_what_is_not_vnets_is_dropped(notifier, manager, link, caplog):
    LinkStore(notifier).keep(link)
    notifier.store("something-else", [link.outer])
    manager.hear()
    stored = manager.give_back()
    foreign = stored["something-else"][0]
    found = LinkStore(notifier, stored).take(NETWORK)
    assert found is not None
    assert not is_open(foreign)
    assert "'something-else', which is not VNet's" in caplog.text
    manager.hear()
    assert {name for name, _ in manager.kept} == set(NAMES)
    found.close()


def test_dns_sockets_are_not_counted_here(notifier, manager, link):
    """Which of them are needed is for the data plane to say."""
    LinkStore(notifier).keep(link)
    manager.hear()
    manager.close(DNS)
    found = LinkStore(notifier, manager.give_back()).take(NETWORK)
    assert found is not None
    assert found.dns == ()
    found.close()


def test_without_a_service_manager_nothing_is_kept(link):
    store = LinkStore(Notifier({}))
    assert not store.is_used
    store.keep(link)
    store.keep_plan(NETWORK)
    store.clear()
    assert store.take(NETWORK) is None

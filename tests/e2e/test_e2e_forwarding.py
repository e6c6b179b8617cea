"""Containers: packets that the host forwards to VNet, with their own address or masqueraded."""

import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from container_bed import BRIDGE, NETWORKS, Container, container_in, list_networks, masquerading
from demo_bed import demo_bed
from private_bed import AT_ONCE_SECONDS, Bed, read_all, read_exactly, wait_until
from shared_cluster import CLUSTER, CONFIG
from two_users import own_address

from supervisor.namespace import inside

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ECHO = "echo.teleport.e2e.test"
STRANGER = 12345
# More than one segment, and more than a veth's queue takes in one go.
DATA = os.urandom(4 << 20)
KINDS = {"ipv4": ("A", 0), "ipv6": ("AAAA", 1)}
# Where packets are rewritten their source is not kept.
where_sources_are_kept = pytest.mark.parametrize("any_plane", ["namespace"], indirect=True)
LIBC = ctypes.CDLL(None)
NOWHERE = bytes(16)  # AF_UNSPEC: connected no more, connect(2)
both_families = pytest.mark.parametrize("family", ["ipv4", "ipv6"])


@pytest.fixture(scope="module", params=["namespace", "rewriting"])
def any_plane(request) -> Iterator[tuple[Bed, Container]]:
    with (
        demo_bed(CLUSTER, CONFIG, env={"VNET_DATA_PLANE": request.param}) as bed,
        container_in(bed) as container,
    ):
        bed.wait_for_health("healthy")
        yield bed, container


@pytest.fixture
def both(any_plane) -> Iterator[tuple[Bed, Container]]:
    bed, container = any_plane
    list_networks(bed, [])
    yield bed, container
    bed.wait_for_health("healthy")


@pytest.fixture
def bed(both) -> Bed:
    return both[0]


@pytest.fixture
def container(both) -> Container:
    return both[1]


def server(bed: Bed, family: str) -> str:
    """VNet's DNS address of this family."""
    return str(bed.status()["network"]["dns_addresses"][KINDS[family][1]])


def own_addresses(bed: Bed) -> list[str]:
    """VNet's own addresses, of the interface."""
    rows = bed.output("ip", "-o", "address", "show", "dev", "vnet0").splitlines()
    return [row.split()[3] for row in rows]


def address_of(bed: Bed, family: str) -> str:
    return bed.resolve(ECHO, KINDS[family][0], server(bed, "ipv4"))[0]


def echo(end: socket.socket, data: bytes = b"hello") -> None:
    end.sendall(data)
    assert read_exactly(end, len(data)) == data


def carry(end: socket.socket, data: bytes) -> None:
    """Sends all and half-closes; all of it comes back."""

    def send() -> None:
        end.sendall(data)
        end.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    assert read_all(end) == data
    sender.join()


def require_service(bed: Bed, container: Container, family: str) -> None:
    """Names and connections work in the container."""
    kind, dns = KINDS[family][0], server(bed, family)
    address = container.resolve(ECHO, kind, dns)
    assert address == container.resolve(ECHO, kind, dns, over_tcp=True) == address_of(bed, family)
    with container.connect(address, 7) as end:
        carry(end, DATA)


def require_refused(container: Container, bed: Bed, family: str) -> None:
    address, dns = address_of(bed, family), server(bed, family)
    for place in ((address, 7), (dns, 53)):
        with pytest.raises(ConnectionRefusedError):
            container.connect(*place, timeout=AT_ONCE_SECONDS).close()
    with pytest.raises(ConnectionRefusedError):
        container.ask(ECHO, "A", dns)


@where_sources_are_kept
@both_families
def test_listed_networks_have_names_and_connections(bed, container, family):
    list_networks(bed, NETWORKS)
    require_service(bed, container, family)
    assert bed.status()["warnings"] == []


@both_families
def test_other_networks_are_refused_at_once_and_the_host_works_on(bed, container, family):
    list_networks(bed, ["172.31.0.0/24", "fd13::/64"])
    require_refused(container, bed, family)
    with bed.connect(address_of(bed, family), 7) as end:
        echo(end)


@where_sources_are_kept
@both_families
def test_changed_list_is_in_force_at_once_also_for_open_connections(bed, container, family):
    list_networks(bed, NETWORKS)
    with (
        container.connect(address_of(bed, family), 7) as end,
        bed.connect(address_of(bed, family), 7) as own,
    ):
        echo(end)
        list_networks(bed, [])
        echo(own)
        with pytest.raises(ConnectionResetError):
            echo(end)
    require_refused(container, bed, family)
    list_networks(bed, NETWORKS)
    require_service(bed, container, family)


@both_families
def test_what_is_masqueraded_works_if_vnets_own_address_is_listed(bed, container, family):
    with masquerading(bed):
        list_networks(bed, own_addresses(bed))
        require_service(bed, container, family)
        assert bed.status()["warnings"] == []


@both_families
def test_what_is_masqueraded_is_refused_if_vnets_own_address_is_not_listed(bed, container, family):
    with masquerading(bed):
        list_networks(bed, NETWORKS)
        with pytest.raises(ConnectionRefusedError):
            container.connect(address_of(bed, family), 7, timeout=AT_ONCE_SECONDS).close()
        dns = server(bed, family)
        for over_tcp in (False, True):
            assert container.ask(ECHO, "A", dns, over_tcp=over_tcp).header.rcode == 5
        wait_until(lambda: "security.allow_forwarded_from does not list" in bed.log(), "it is told")


def local(bed: Bed, uid: int, source: str, kind: socket.SocketKind) -> socket.socket:
    """A socket of a local user with this source address."""
    with inside(bed._namespace):
        os.seteuid(uid)
        try:
            end = socket.socket(socket.AF_INET, kind)
        finally:
            os.seteuid(0)
    end.settimeout(20)
    if source:
        end.bind((source, 0))
    return end


@where_sources_are_kept
@pytest.mark.parametrize("listed", [[], NETWORKS, ["own"]], ids=["nothing", "networks", "own"])
def test_local_users_are_themselves_whatever_address_they_choose(bed, container, listed):
    list_networks(bed, own_addresses(bed) if listed == ["own"] else listed)
    address, dns = address_of(bed, "ipv4"), server(bed, "ipv4")
    for source in (BRIDGE, ""):
        with (
            local(bed, STRANGER, source, socket.SOCK_STREAM) as end,
            pytest.raises(ConnectionRefusedError),
        ):
            end.connect((address, 7))
        if source and listed is not NETWORKS:
            continue  # nothing comes in from there
        with local(bed, 0, source, socket.SOCK_STREAM) as end:
            end.connect((address, 7))
            echo(end)
        for uid, rcode in ((STRANGER, 5), (0, 0)):
            with local(bed, uid, source, socket.SOCK_DGRAM) as end:
                end.connect((dns, 53))
                end.send(QUESTION)
                assert end.recv(4096)[3] & 15 == rcode


@where_sources_are_kept
def test_local_users_count_as_masqueraded_where_those_may_connect(bed, container):
    """Nothing tells them from a container then; docs/security.md says so."""
    list_networks(bed, own_addresses(bed))
    address, dns = address_of(bed, "ipv4"), server(bed, "ipv4")
    place = (own_address(bed, dns), 20_053)

    def is_told() -> bool:
        with local(bed, STRANGER, "", socket.SOCK_DGRAM) as end:
            end.bind(place)
            end.sendto(QUESTION, (dns, 53))
            # The answer is for nobody while this is connected to somewhere else.
            for _ in range(200):
                end.connect(place)
                LIBC.connect(end.fileno(), NOWHERE, len(NOWHERE))
            end.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                return end.recv(4096)[3] & 15 == 0
        return False

    wait_until(is_told, "a question without a socket is answered")
    with masquerading(bed), local(bed, STRANGER, BRIDGE, socket.SOCK_STREAM) as end:
        end.connect((address, 7))
        echo(end)


QUESTION = b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + b"\4echo\x08teleport\3e2e\4test\0" + b"\0\1\0\1"


def test_network_that_cannot_be_in_force_is_named(bed, container):
    list_networks(bed, ["100.70.0.0/16", *NETWORKS])
    warnings = bed.status()["warnings"]
    assert "100.70.0.0/16" in warnings[0]
    assert "overlaps the virtual range 100.64.0.0/10" in warnings[0]
    if bed.status()["network"]["data_plane"] == "rewriting":
        assert len(warnings) == 3
        assert "masquerade what goes to vnet0, and list 100.64.0.1/32" in warnings[1]
        require_refused(container, bed, "ipv4")
    else:
        require_service(bed, container, "ipv4")
    assert bed.status()["health"] == "healthy"


@where_sources_are_kept
def test_networks_stay_in_force_while_everything_is_replaced(bed, container):
    list_networks(bed, NETWORKS)
    with container.connect(address_of(bed, "ipv4"), 7, timeout=60) as end:
        echo(end)
        bed.output("vnet", "restart", "all", "--drain", timeout=120)
        echo(end)
        require_service(bed, container, "ipv6")
        echo(end)

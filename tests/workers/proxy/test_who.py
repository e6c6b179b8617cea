"""Who is let in, by what the kernel says of the socket that waits."""

import errno
import os
import socket
import sys

import msgspec
import pytest
from glue_fakes import NETWORK

from ipc.messages import Access, DialRequest
from ipc.socket_owner import ANY_STATE, SYN_SENT, UNKNOWN, Owner, SocketDiag
from workers.proxy.who import Doorbell, Stranger, make_doorbell

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
ALICE, MALLORY, OUTSIDE = 1000, 1001, 65534
ACCESS = Access(uids=[0, ALICE], user="alice", resolvers=[990], interface=4)
FORWARDING = msgspec.structs.replace(NETWORK, forwarded_from=["172.30.0.0/24", "fd30::/64"])


class FakeKernel:
    def __init__(self, found: Owner | Exception | None) -> None:
        self.found = found
        self.interface = 0
        self.is_closed = False
        self.asked: list[object] = []

    def tcp_owner(self, *ends: object, states: int) -> Owner | None:
        self.asked.append((ends, states))
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def close(self) -> None:
        self.is_closed = True


def request(source: str = "100.64.0.1") -> DialRequest:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    destination = "fd00::3" if ":" in source else "100.64.3.4"
    return DialRequest(
        flow_id=1,
        source=socket.inet_pton(family, source),
        source_port=40_000,
        destination=socket.inet_pton(family, destination),
        destination_port=80,
    )


def stranger(
    found: Owner | Exception | None, source: str = "100.64.0.1", **access: object
) -> Stranger | None:
    bell = Doorbell(FORWARDING, msgspec.structs.replace(ACCESS, **access), FakeKernel(found))
    return bell.stranger(request(source))


def owned(uid: int) -> Owner:
    return Owner(uid, 7, 2)


def test_the_kernel_is_asked_about_the_program_that_waits():
    kernel = FakeKernel(owned(ALICE))
    bell = Doorbell(NETWORK, ACCESS, kernel)
    wanted = request()
    assert bell.stranger(wanted) is None
    ends = (wanted.source, 40_000, wanted.destination, 80)
    assert kernel.asked == [(ends, SYN_SENT)]
    assert kernel.interface == ACCESS.interface


@pytest.mark.parametrize("uid", [0, ALICE])
def test_those_who_may_connect_do(uid):
    assert stranger(owned(uid)) is None


@pytest.mark.parametrize("uid", [MALLORY, 990, OUTSIDE, UNKNOWN])
def test_others_do_not_and_resolvers_only_ask_for_names(uid):
    found = stranger(owned(uid))
    assert found is not None
    assert found.who == ("" if uid == UNKNOWN else f"uid {uid}")
    assert ("only alice, root and those in" in found.why) == (uid != UNKNOWN)


def test_the_sentence_names_root_once():
    found = stranger(owned(MALLORY), user="root")
    assert found is not None
    assert found.why == "only root and those in security.allow_users may connect"


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "closed"), BlockingIOError(errno.EAGAIN, "")]
)
def test_a_kernel_that_does_not_say_lets_nobody_in(error):
    assert stranger(error) is not None
    assert stranger(error, "172.30.0.5") is not None


@LINUX
def test_ends_that_cannot_be_let_nobody_in():
    with SocketDiag.open() as kernel:
        bell = Doorbell(NETWORK, ACCESS, SocketDiag(kernel))
        assert bell.stranger(msgspec.structs.replace(request(), source=bytes(16))) is not None


def test_without_a_kernel_or_where_it_cannot_tell_nobody_comes_in():
    assert Doorbell(FORWARDING, ACCESS, None).stranger(request("172.30.0.5")) is not None
    kernel = FakeKernel(owned(ALICE))
    access = msgspec.structs.replace(ACCESS, can_tell=False)
    found = Doorbell(NETWORK, access, kernel).stranger(request())
    assert found is not None
    assert "vnet status" in found.why
    assert kernel.asked == []


def test_where_users_are_not_checked_everybody_comes_in():
    assert stranger(owned(MALLORY), is_checked=False) is None
    assert stranger(None, is_checked=False) is None


@pytest.mark.parametrize("source", ["172.30.0.5", "fd30::5"])
def test_forwarded_networks_come_in_unless_the_address_is_a_local_users(source):
    assert stranger(None, source) is None
    assert stranger(owned(MALLORY), source) is not None
    assert stranger(owned(ALICE), source) is None
    assert stranger(Owner(UNKNOWN, 0, 6), source) is not None


@pytest.mark.parametrize("source", ["100.64.0.1", "172.30.1.5", "fd30:0:0:1::5"])
def test_without_a_socket_nobody_else_comes_in(source):
    found = stranger(None, source)
    assert found is not None
    assert "security.allow_forwarded_from" in found.why


@pytest.mark.parametrize(
    ("found", "is_refused"),
    [
        (owned(ALICE), False),
        (owned(MALLORY), True),
        (Owner(UNKNOWN, 0, 6), False),
        (None, False),
        (OSError(errno.EBADF, "closed"), True),
    ],
)
def test_who_takes_an_accepted_connection_must_be_one_who_may(found, is_refused):
    for source in ("100.64.0.1", "172.30.0.5"):
        kernel = FakeKernel(found)
        bell = Doorbell(FORWARDING, ACCESS, kernel)
        assert (bell.taker(request(source)) is not None) == is_refused
        assert [states for _, states in kernel.asked] == [ANY_STATE]


def test_changes_hold_from_the_next_attempt_on():
    kernel = FakeKernel(owned(MALLORY))
    bell = Doorbell(NETWORK, ACCESS, kernel)
    assert bell.stranger(request()) is not None
    bell.use_access(msgspec.structs.replace(ACCESS, uids=[0, ALICE, MALLORY], interface=9))
    assert bell.stranger(request()) is None
    assert kernel.interface == 9
    bell.use_access(ACCESS)
    assert bell.stranger(request()) is not None
    kernel.found = None
    bell.use_network(FORWARDING)
    assert bell.stranger(request("172.30.0.5")) is None
    bell.use_network(NETWORK)
    assert bell.stranger(request("172.30.0.5")) is not None
    bell.close()
    assert kernel.is_closed


@LINUX
def test_a_real_attempt_is_this_users_and_nobodys_once_the_kernel_cannot_be_asked():
    bell = make_doorbell(
        NETWORK, Access(uids=[os.geteuid()], user="alice"), [SocketDiag.open().detach()]
    )
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        place = full.getsockname()
        waiting = [socket.socket() for _ in range(8)]
        try:
            for end in waiting:
                end.setblocking(False)
                end.connect_ex(place)
            # The last one waits: nobody accepts.
            own = waiting[-1].getsockname()
            loopback = socket.inet_aton("127.0.0.1")
            wanted = DialRequest(
                flow_id=1,
                source=loopback,
                source_port=own[1],
                destination=loopback,
                destination_port=place[1],
            )
            assert bell.stranger(wanted) is None
            connected = msgspec.structs.replace(wanted, source_port=waiting[0].getsockname()[1])
            assert bell.stranger(connected) is not None
            bell.close()
            found = bell.stranger(wanted)
            assert found is not None
            assert "Bad file descriptor" in found.why
        finally:
            for end in waiting:
                end.close()

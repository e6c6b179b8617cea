"""What dns is told about a name: clusters first, then the address book."""

import asyncio
from ipaddress import IPv4Address, IPv4Network

import msgspec
import pytest
from glue_fakes import NETWORK, BrokenBook, FakeTeleport, app_target, fill

from ipc.messages import NameOutcome, Refusal
from workers.proxy.book import Book, BookUnavailableError, RangeFullError
from workers.proxy.naming import Naming, UnknownAddressError
from workers.proxy.naming_outcome import UNCERTAIN_SECONDS, VALID_SECONDS, Answer
from workers.proxy.teleport.client import NotOurs
from workers.proxy.teleport.errors import (
    LoginExpiredError,
    NotLoggedInError,
    TeleportError,
    UnknownAppError,
    UnreachableError,
    ZonesUnknownError,
)

NAME = "pg.example.test"
FAILED = Answer(NameOutcome.FAILED, None, 0.0)


@pytest.fixture
def book(tmp_path):
    made = Book(tmp_path / "book.sqlite", reserved=[IPv4Address("100.64.0.1")])
    made.open()
    yield made
    made.close()


@pytest.fixture
def teleport():
    return FakeTeleport()


@pytest.fixture
def naming(teleport, book):
    return Naming(teleport, book, NETWORK)


def resolve(naming: Naming, name: str = NAME) -> Answer:
    return asyncio.run(naming.resolve(name))


def with_range(text: str):
    return msgspec.structs.replace(NETWORK, ranges=[*NETWORK.ranges, text])


def test_app_gets_an_address_and_keeps_it(naming, teleport):
    teleport.targets[NAME] = app_target()
    first = resolve(naming)
    assert first.outcome is NameOutcome.ADDRESS
    assert IPv4Address(first.ipv4) in IPv4Network(NETWORK.ranges[0])
    assert first.valid_seconds == VALID_SECONDS
    assert resolve(naming) == first
    assert naming.name_of(first.ipv4) == NAME


def test_spelling_is_passed_on_and_makes_no_other_name(naming, teleport):
    teleport.targets[NAME] = app_target()
    answer = resolve(naming, "PG.Example.test")
    assert teleport.spellings == ["PG.Example.test"]
    assert naming.name_of(answer.ipv4) == NAME
    assert resolve(naming) == answer


def test_name_that_is_not_ours_is_forwarded(naming):
    assert resolve(naming) == Answer(NameOutcome.NOT_OURS, None, VALID_SECONDS)


def test_range_that_is_never_routed_is_waited_for_once(naming, teleport, monkeypatch):
    monkeypatch.setattr("workers.proxy.naming.ROUTE_SECONDS", 0.01)
    teleport.targets[NAME] = app_target(ipv4_range="10.1.0.0/16")
    assert resolve(naming).ipv4[:2] == b"\x0a\x01"
    teleport.targets["other.test"] = app_target(ipv4_range="10.2.0.0/16")
    assert IPv4Address(resolve(naming, "other.test").ipv4) in IPv4Network(NETWORK.ranges[0])
    monkeypatch.setattr("workers.proxy.naming.ROUTE_SECONDS", 60)
    assert resolve(naming, "other.test").outcome is NameOutcome.ADDRESS
    naming.use_network(with_range("10.2.0.0/16"))
    assert resolve(naming, "other.test").ipv4[:2] == b"\x0a\x02"


def test_first_question_waits_until_the_range_of_the_cluster_is_routed(naming, teleport):
    """Otherwise the name would have one address now and another a moment later."""
    teleport.targets[NAME] = app_target(ipv4_range="10.2.0.0/16")

    async def main():
        answer = asyncio.create_task(naming.resolve(NAME))
        await asyncio.sleep(0)
        assert not answer.done()
        naming.use_network(with_range("10.3.0.0/16"))
        naming.use_network(with_range("10.2.0.0/16"))
        return await asyncio.wait_for(answer, 20)

    assert asyncio.run(main()).ipv4[:2] == b"\x0a\x02"


@pytest.mark.parametrize(
    "error",
    [UnreachableError("down"), ZonesUnknownError(UnreachableError("down"))],
    ids=lambda error: type(error).__name__,
)
def test_an_address_of_a_range_that_is_not_routed_is_not_given(naming, teleport, book, error):
    """It would lead into somebody else's network; nor does upstream know the name."""
    fill(book, NAME, "10.66.0.0/16")
    teleport.targets[NAME] = error
    assert resolve(naming) == FAILED


@pytest.mark.parametrize(
    "error",
    [
        UnreachableError("the proxy is down"),
        LoginExpiredError("expired"),
        NotLoggedInError("no login"),
        ZonesUnknownError(UnreachableError("down")),
        TeleportError("something else"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_known_name_is_answered_from_the_book_while_its_cluster_cannot_be_asked(
    naming, teleport, book, error
):
    known = fill(book, NAME)
    teleport.targets[NAME] = error
    assert resolve(naming) == Answer(NameOutcome.ADDRESS, known.packed, UNCERTAIN_SECONDS)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        # It may be an app or not; the other names of the world must go on working.
        (ZonesUnknownError(UnreachableError("down")), NameOutcome.NOT_OURS),
        (NotLoggedInError("no login"), NameOutcome.NOT_OURS),
        (LoginExpiredError("expired"), NameOutcome.NOT_OURS),
        # It is in a zone of a cluster: nobody upstream knows it.
        (UnreachableError("down"), NameOutcome.FAILED),
        (TeleportError("x"), NameOutcome.FAILED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unknown_name_while_its_cluster_cannot_be_asked(naming, teleport, error, answer):
    teleport.targets[NAME] = error
    found = resolve(naming)
    assert found.outcome is answer
    assert found.ipv4 is None
    assert found.valid_seconds == (UNCERTAIN_SECONDS if answer is NameOutcome.NOT_OURS else 0.0)


def test_app_that_is_gone_is_forwarded_though_the_book_knows_it(naming, book):
    fill(book, NAME)
    assert resolve(naming).outcome is NameOutcome.NOT_OURS


def test_full_range_is_told_as_such(teleport):
    teleport.targets[NAME] = app_target()
    naming = Naming(teleport, BrokenBook(RangeFullError("all are taken")), NETWORK)
    assert resolve(naming) == Answer(NameOutcome.RANGE_FULL, None, 0.0)


def test_book_that_cannot_be_used_fails_ours_and_leaves_others_alone(teleport):
    naming = Naming(teleport, BrokenBook(BookUnavailableError("disk full")), NETWORK)
    teleport.targets[NAME] = app_target()
    assert resolve(naming) == FAILED
    teleport.targets[NAME] = UnreachableError("down")
    assert resolve(naming) == FAILED
    assert resolve(naming, "www.test").outcome is NameOutcome.NOT_OURS


def test_target_of_an_address(naming, teleport, book):
    address = fill(book, NAME).packed
    teleport.targets[NAME] = app_target()
    assert asyncio.run(naming.target_of(address)) == (NAME, app_target())


@pytest.mark.parametrize(
    ("target", "error"),
    [(NotOurs(), UnknownAppError), (UnreachableError("down"), UnreachableError)],
    ids=["gone", "unreachable"],
)
def test_target_that_is_gone_or_cannot_be_asked(naming, teleport, book, target, error):
    address = fill(book, NAME).packed
    teleport.targets[NAME] = target
    with pytest.raises(error):
        asyncio.run(naming.target_of(address))


def test_address_that_nobody_has_is_refused_as_such(naming):
    with pytest.raises(UnknownAddressError) as caught:
        asyncio.run(naming.target_of(b"\x64\x40\x09\x09"))
    assert caught.value.refusal is Refusal.UNKNOWN_ADDRESS
    assert naming.name_of(b"\x64\x40\x09\x09") is None

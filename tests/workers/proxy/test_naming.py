"""What dns is told about a name: clusters first, then the address book."""

import asyncio
import dataclasses
from ipaddress import IPv4Address, IPv4Network

import msgspec
import pytest
from glue_fakes import (
    NETWORK,
    PROFILE,
    BrokenBook,
    FakeTeleport,
    app_target,
    cluster_target,
    database_target,
    fill,
)

from ipc.messages import NameOutcome, Refusal
from workers.proxy.book import Book, BookUnavailableError, RangeFullError
from workers.proxy.naming import Naming, UnknownAddressError
from workers.proxy.naming_outcome import UNCERTAIN_SECONDS, VALID_SECONDS, Answer
from workers.proxy.teleport.errors import (
    LoginExpiredError,
    NotLoggedInError,
    TeleportError,
    UnreachableError,
    ZonesUnknownError,
)
from workers.proxy.teleport.targets import NoSuchName, NotOurs, WebApp

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


def test_range_around_vnets_own_is_not_waited_for(teleport, book, monkeypatch):
    monkeypatch.setattr("workers.proxy.naming.ROUTE_SECONDS", 3600)
    naming = Naming(teleport, book, msgspec.structs.replace(NETWORK, ranges=["100.115.92.0/23"]))
    teleport.targets[NAME] = app_target(ipv4_range="100.64.0.0/10")
    address = resolve(naming).ipv4
    assert IPv4Address(address) in IPv4Network("100.115.92.0/23")
    # Once all of it is free the address is good still.
    naming.use_network(msgspec.structs.replace(NETWORK, ranges=["100.64.0.0/10"]))
    assert resolve(naming).ipv4 == address


def test_names_move_with_vnets_own_range(teleport, tmp_path):
    """The range was another in an earlier run, and its addresses now belong to others."""
    names = [f"app{number}.test" for number in range(20)]

    def addresses(text: str) -> list[IPv4Address]:
        own = IPv4Network(text)
        network = msgspec.structs.replace(
            NETWORK, ranges=[text], tun_ipv4=own[1].packed, dns_ipv4=own[2].packed
        )
        book = Book(tmp_path / "book.sqlite", reserved=[own[1], own[2]])
        book.open()
        naming = Naming(teleport, book, network)
        teleport.targets |= {name: app_target() for name in names}
        found = [IPv4Address(resolve(naming, name).ipv4) for name in names]
        assert [naming.name_of(address.packed) for address in found] == names
        assert all(address in own and address not in (own[1], own[2]) for address in found)
        teleport.targets |= dict.fromkeys(names, UnreachableError("down"))
        assert [IPv4Address(resolve(naming, name).ipv4) for name in names] == found
        book.close()
        return found

    wide, part = addresses("100.64.0.0/10"), addresses("100.115.92.0/23")
    assert set(wide).isdisjoint(part)
    # They are in the wide range too.
    assert addresses("100.64.0.0/10") == part
    assert set(addresses("10.0.0.0/27")).isdisjoint(part)


def test_what_is_vnets_own_address_now_is_not_given(teleport, book):
    earlier = Naming(teleport, book, NETWORK)
    teleport.targets[NAME] = app_target()
    address = resolve(earlier).ipv4
    teleport.targets[NAME] = UnreachableError("down")
    assert resolve(earlier).ipv4 == address
    now = Naming(teleport, book, msgspec.structs.replace(NETWORK, dns_ipv4=address))
    assert resolve(now) == FAILED


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


@pytest.mark.parametrize("network", ["100.64.0.0/10", "10.66.0.0/16"])
@pytest.mark.parametrize(
    "error",
    [NotLoggedInError("no login"), ZonesUnknownError(UnreachableError("another is down"))],
    ids=lambda error: type(error).__name__,
)
def test_a_known_name_is_forwarded_when_nobody_is_logged_in_where_it_was(
    naming, teleport, book, error, network
):
    fill(book, NAME, network)
    teleport.owners.clear()
    teleport.targets[NAME] = error
    assert resolve(naming) == Answer(NameOutcome.NOT_OURS, None, UNCERTAIN_SECONDS)


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


TARGETS = [app_target(), database_target("pg"), cluster_target()]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: type(target).__name__)
def test_every_kind_of_target_gets_an_address_of_its_own_and_stays_findable(
    naming, teleport, book, target
):
    teleport.targets[NAME] = target
    answer = resolve(naming)
    assert answer.outcome is NameOutcome.ADDRESS
    entry = naming.entry_of(answer.ipv4)
    assert (entry.name, entry.target.profile) == (NAME, PROFILE)
    assert entry.target.cluster == "example.test"
    assert asyncio.run(naming.meaning_of(entry)) == target
    ranged = dataclasses.replace(target, ipv4_range=IPv4Network("10.1.0.0/16"))
    teleport.targets["other.test"] = ranged
    assert resolve(naming, "other.test").ipv4[:2] == b"\x0a\x01"


def test_book_follows_what_a_name_stands_for(naming, teleport, book):
    notes = []
    for target in TARGETS:
        teleport.targets[NAME] = target
        notes.append((resolve(naming).ipv4, book.by_name(NAME).target))
    addresses, targets = zip(*notes, strict=True)
    assert len(set(addresses)) == 1
    assert [(t.kind, t.resource) for t in targets] == [
        ("app", "pg"),
        ("database", "pg"),
        ("cluster", "node"),
    ]


def test_spelling_of_the_cluster_is_remembered(naming, teleport, book):
    """A program connects by address long after it was told; the cluster compares bytes."""
    app = app_target("PG")
    teleport.targets["pg.example.test"] = app
    teleport.targets["orders.db.proxy.test"] = database_target("Orders")
    teleport.targets["x7.db.proxy.test"] = database_target("Not A Label")
    for name, spelling in (
        ("pg.example.test", "PG.example.test"),
        ("orders.db.proxy.test", "Orders.db.proxy.test"),
        ("x7.db.proxy.test", ""),
    ):
        resolve(naming, name)
        asyncio.run(naming.meaning_of(book.by_name(name)))
        assert teleport.spellings[-1] == spelling


@pytest.mark.parametrize("found", [NotOurs(), WebApp(PROFILE, "grafana")])
def test_names_that_ordinary_dns_knows_are_forwarded(naming, teleport, book, found):
    teleport.targets[NAME] = found
    assert resolve(naming) == Answer(NameOutcome.NOT_OURS, None, VALID_SECONDS)
    assert book.by_name(NAME) is None


def test_name_that_nothing_has_does_not_exist(naming, teleport, book):
    fill(book, NAME)  # it had an address once
    teleport.targets[NAME] = NoSuchName()
    assert resolve(naming) == Answer(NameOutcome.NO_SUCH_NAME, None, VALID_SECONDS)


@pytest.mark.parametrize("kind", ["app", "database", "cluster"])
@pytest.mark.parametrize("stale", [NotOurs(), WebApp(PROFILE, "x"), cluster_target()])
def test_app_made_after_its_name_was_asked_for_counts_at_the_next_connection(
    naming, teleport, book, kind, stale
):
    fill(book, NAME, kind=kind)
    teleport.targets[NAME] = stale
    teleport.fresh[NAME] = app_target()
    assert asyncio.run(naming.meaning_of(book.by_name(NAME))) == app_target()


def test_known_app_is_not_asked_for_anew_at_each_connection(naming, teleport, book):
    fill(book, NAME)
    teleport.targets[NAME] = app_target()
    teleport.fresh[NAME] = UnreachableError("asked")
    assert asyncio.run(naming.meaning_of(book.by_name(NAME))) == app_target()


def test_target_that_cannot_be_asked_is_an_error(naming, teleport, book):
    fill(book, NAME)
    teleport.targets[NAME] = UnreachableError("down")
    with pytest.raises(UnreachableError):
        asyncio.run(naming.meaning_of(book.by_name(NAME)))


def test_address_that_nobody_has_is_refused_as_such(naming):
    with pytest.raises(UnknownAddressError) as caught:
        naming.entry_of(b"\x64\x40\x09\x09")
    assert caught.value.refusal is Refusal.UNKNOWN_ADDRESS
    assert naming.name_of(b"\x64\x40\x09\x09") is None

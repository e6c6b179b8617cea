import logging
import multiprocessing
import sqlite3
from ipaddress import IPv4Address, IPv4Network

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workers.proxy.book import (
    CLUSTER,
    DATABASE,
    Book,
    BookTarget,
    BookUnavailableError,
    RangeFullError,
    RangeTooSmallError,
)
from workers.proxy.probe_order import probe_order

RANGE = IPv4Network("100.64.0.0/10")
SMALL = IPv4Network("10.0.0.0/27")
RESERVED = [IPv4Address("100.64.0.1"), IPv4Address("100.64.0.2")]
TARGET = BookTarget(profile="proxy.test", leaf="", cluster="root.test", resource="pg")
OTHER = BookTarget(profile="proxy.test", leaf="leaf.test", cluster="leaf.test", resource="pg")
HOST = BookTarget(profile="proxy.test", leaf="", cluster="root.test", resource="node", kind=CLUSTER)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "addresses.db"


@pytest.fixture
def make_book(path):
    books = []

    def make(**changes):
        book = Book(path, **({"reserved": RESERVED} | changes))
        books.append(book)
        book.open()
        return book

    yield make
    for book in books:
        book.close()


def test_a_name_keeps_its_address_over_restarts(make_book):
    book = make_book()
    address = book.assign("a.test", RANGE, TARGET).address
    assert address in RANGE
    assert book.assign("a.test", RANGE, TARGET).address == address
    book.close()
    again = make_book()
    assert again.by_name("a.test").address == address
    assert again.by_address(address).name == "a.test"
    assert again.by_address(address).target == TARGET


def test_what_was_never_assigned_is_not_there(make_book):
    book = make_book()
    assert book.by_name("a.test") is None
    assert book.by_address(IPv4Address("100.64.0.9")) is None


def test_an_address_is_the_first_free_one_of_the_order(make_book):
    book = make_book()
    first, second, third = list(probe_order("c.test", SMALL, RESERVED))[:3]
    for name, address in (("a.test", first), ("b.test", second)):
        book._database.execute(
            "INSERT INTO names VALUES (?, ?, ?)",
            (name, int(address), b'{"profile":"","leaf":"","cluster":"","app":""}'),
        )
    assert book.assign("c.test", SMALL, TARGET).address == third


def test_a_full_range_is_an_error_and_known_names_stay(make_book):
    book = make_book(reserved=[SMALL[1], SMALL[2]])
    given_out = {book.assign(f"{i}.test", SMALL, TARGET).address for i in range(28)}
    assert given_out == set(SMALL.hosts()) - {SMALL[1], SMALL[2]}
    with pytest.raises(RangeFullError, match=r"28 addresses of 10\.0\.0\.0/27"):
        book.assign("more.test", SMALL, TARGET)
    assert book.assign("3.test", SMALL, TARGET).address in given_out
    assert book.assign("more.test", RANGE, TARGET).address in RANGE


def test_a_range_too_small_is_an_error(make_book):
    with pytest.raises(RangeTooSmallError):
        make_book().assign("a.test", IPv4Network("10.0.0.0/28"), TARGET)


def test_a_changed_range_gives_a_new_address_in_it(make_book):
    book = make_book()
    old = book.assign("a.test", RANGE, TARGET).address
    new = book.assign("a.test", SMALL, TARGET).address
    assert new in SMALL
    assert book.by_name("a.test").address == new
    assert book.by_address(old) is None


def test_an_address_reserved_later_is_given_up(make_book):
    address = make_book().assign("a.test", RANGE, TARGET).address
    book = make_book(reserved=[address])
    assert book.assign("a.test", RANGE, TARGET).address != address


def test_the_target_follows_the_cluster(make_book):
    book = make_book()
    address = book.assign("a.test", RANGE, TARGET).address
    assert book.assign("a.test", RANGE, OTHER).address == address
    assert make_book().by_name("a.test").target == OTHER


def test_processes_see_each_others_entries(make_book):
    one, two = make_book(), make_book()
    assert two.by_name("a.test") is None
    address = one.assign("a.test", RANGE, TARGET).address
    assert two.by_name("a.test").address == address
    one.assign("a.test", SMALL, TARGET)
    assert two.by_address(address) is None
    assert two.assign("a.test", SMALL, TARGET) == one.by_name("a.test")


def test_the_cache_has_a_limit(make_book):
    book = make_book(max_cached=3)
    for i in range(10):
        book.assign(f"{i}.test", RANGE, TARGET)
    assert len(book._by_name) <= 3
    assert all(book.by_name(f"{i}.test") for i in range(10))


def _assign_many(path, number, results):
    book = Book(path, reserved=RESERVED)
    book.open()
    pairs = [(f"{i}.test", book.assign(f"{i}.test", SMALL, TARGET).address) for i in range(25)]
    pairs += [
        (f"{number}-{i}.test", book.assign(f"{number}-{i}.test", RANGE, TARGET).address)
        for i in range(25)
    ]
    book.close()
    results.put(pairs)


def test_a_name_that_was_an_app_and_is_a_database_now_is_updated(make_book):
    book = make_book()
    address = book.assign("a.test", RANGE, TARGET).address
    database = msgspec.structs.replace(TARGET, kind=DATABASE)
    assert book.assign("a.test", RANGE, database).address == address
    assert make_book().by_name("a.test").target == database


def test_entries_of_the_first_version_are_apps(make_book):
    """And what is written now still has the keys that such a version needs."""
    book = make_book()
    old = {"profile": "p", "leaf": "", "cluster": "c", "app": "pg"}
    for name, address, more in (("a.test", 7, {}), ("b.test", 8, {"public_addr": "B.test"})):
        book._database.execute(
            "INSERT INTO names VALUES (?, ?, ?)", (name, address, msgspec.json.encode(old | more))
        )
    known = BookTarget(profile="p", leaf="", cluster="c", resource="pg")
    assert book.by_name("a.test").target == known
    assert book.by_name("b.test").target == msgspec.structs.replace(known, spelling="B.test")
    assert book.by_name("a.test").target.kind == "app"
    written = msgspec.json.decode(msgspec.json.encode(TARGET))
    assert written.keys() >= old.keys() | {"public_addr"}


def test_entry_of_a_later_version_is_no_damage(make_book):
    book = make_book()
    target = b'{"profile":"","leaf":"","cluster":"","app":"x","kind":"git","color":"red"}'
    book._database.execute("INSERT INTO names VALUES (?, ?, ?)", ("a.test", 7, target))
    assert book.by_name("a.test").target.resource == "x"


def test_names_below_a_cluster_take_at_most_half_of_a_range(make_book):
    book = make_book(reserved=[])
    for i in range(100):
        book.assign(f"{i}.root.test", SMALL, HOST)
        assert book.by_name(f"{i}.root.test")
    kept = [i for i in range(100) if book.by_name(f"{i}.root.test")]
    assert len(kept) == 15
    apps = [book.assign(f"app-{i}.test", SMALL, TARGET) for i in range(15)]
    with pytest.raises(RangeFullError):
        book.assign("more.test", SMALL, TARGET)
    book.assign("another.root.test", SMALL, HOST)
    assert all(book.by_name(entry.name) == entry for entry in apps)


def test_names_below_a_cluster_have_a_limit_and_apps_do_not_count(make_book):
    book = make_book(max_cluster_names=3)
    for i in range(5):
        book.assign(f"app-{i}.test", RANGE, TARGET)
    entries = [book.assign(f"{i}.root.test", RANGE, HOST) for i in range(3)]
    assert [book.by_name(entry.name) for entry in entries] == entries
    # Known names need no room, whatever becomes of them.
    book.assign("0.root.test", RANGE, TARGET)
    book.assign("3.root.test", RANGE, HOST)
    assert book.by_name("1.root.test")
    assert book.by_name("2.root.test")
    book.assign("4.root.test", RANGE, HOST)
    assert sum(book.by_name(f"{i}.root.test") is not None for i in range(1, 5)) == 3
    assert all(book.by_name(f"app-{i}.test") for i in range(5))


def test_parallel_processes_never_give_one_address_twice(path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_assign_many, args=(path, number, results)) for number in range(3)
    ]
    for process in processes:
        process.start()
    answers = [dict(results.get(timeout=60)) for _ in processes]
    for process in processes:
        process.join()
    merged = answers[0] | answers[1] | answers[2]
    assert all(answer.items() <= merged.items() for answer in answers)
    assert len(set(merged.values())) == len(merged) == 25 + 3 * 25


@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
def test_the_book_agrees_with_a_dictionary(make_book, steps):
    book = make_book(reserved=[])
    model = {e.name: e.address for i in range(6) if (e := book.by_name(f"{i}.test"))}
    for number, is_small in steps:
        name, network = f"{number}.test", SMALL if is_small else RANGE
        expected = model.get(name)
        if expected is None or expected not in network:
            free = (a for a in probe_order(name, network, []) if a not in model.values())
            model[name] = next(free)
        assert book.assign(name, network, TARGET).address == model[name]
        for known, address in model.items():
            assert book.by_address(address).name == known


@pytest.mark.parametrize("contents", [b"garbage" * 1000, bytes(8192)])
def test_a_file_that_is_no_book_is_left_alone_and_a_new_one_begins(
    path, make_book, contents, caplog
):
    path.write_bytes(contents)
    with caplog.at_level(logging.ERROR):
        book = make_book()
    address = book.assign("a.test", RANGE, TARGET).address
    assert str(path) in caplog.text
    assert path.read_bytes() == contents
    book.close()
    assert make_book().by_name("a.test").address == address


def test_the_database_of_another_program_is_left_alone(path, make_book):
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE names (x)")
    other.commit()
    other.close()
    before = path.read_bytes()
    make_book().assign("a.test", RANGE, TARGET)
    assert path.read_bytes() == before


def test_an_empty_file_becomes_a_book(path, make_book):
    path.touch()
    make_book().assign("a.test", RANGE, TARGET)
    assert not path.with_name("addresses.db.1").exists()


def test_damage_at_run_time_begins_a_new_book_for_every_process(path, make_book):
    book, other = make_book(), make_book()
    addresses = {i: book.assign(f"{i}.test", RANGE, TARGET).address for i in range(200)}
    book.close()
    other.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    for _ in range(2):
        # Whether opening or the first use finds it, the use after that works.
        for each in (book, other):
            try:
                each.assign("1.test", RANGE, TARGET)
            except BookUnavailableError:
                assert each.assign("1.test", RANGE, TARGET)
    assert book.by_name("1.test") == other.by_name("1.test")
    assert book.by_name("1.test").address == addresses[1]


@pytest.mark.parametrize("target", [b"\0", 7, b'{"x":' + b"[" * 5000])
def test_a_malformed_entry_is_damage(path, make_book, target):
    book, other = make_book(), make_book()
    book._database.execute("INSERT INTO names VALUES ('a.test', 7, ?)", (target,))
    with pytest.raises(BookUnavailableError, match="begins anew"):
        book.by_name("a.test")
    assert book.by_name("a.test") is None
    address = book.assign("a.test", RANGE, TARGET).address
    assert other.by_name("a.test").address == address
    assert book._generation == other._generation == 1


def test_a_deleted_file_is_replaced(path, make_book):
    book = make_book()
    book.assign("a.test", RANGE, TARGET)
    path.unlink()
    assert book.by_name("a.test") is None
    address = book.assign("a.test", RANGE, TARGET).address
    assert make_book().by_name("a.test").address == address


def test_a_full_disk_is_an_error_of_its_own_and_known_names_still_work(make_book):
    book = make_book()
    address = book.assign("a.test", RANGE, TARGET).address
    book._database.execute("PRAGMA max_page_count = 1")
    big = BookTarget(profile="p" * 100_000, leaf="", cluster="", resource="")
    with pytest.raises(BookUnavailableError, match="full"):
        book.assign("b.test", RANGE, big)
    assert book.by_name("b.test") is None
    assert book.by_name("a.test").address == address
    assert book.assign("a.test", RANGE, big).address == address


def test_the_log_of_the_file_stays_small(path, make_book):
    """A small disk must not be full of a book that has a few hundred names."""
    books = [make_book(), make_book()]
    for number in range(600):
        books[number % 2].assign(f"app-{number}.test", RANGE, TARGET)
    files = path.parent.glob(f"{path.name}*")
    assert sum(file.stat().st_size for file in files) < 3 << 19


def test_a_book_locked_too_long_is_unavailable(path, make_book):
    book = make_book(busy_seconds=0.05)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(BookUnavailableError, match="locked"):
        book.assign("a.test", RANGE, TARGET)
    holder.close()
    assert book.assign("a.test", RANGE, TARGET)


def test_a_directory_that_does_not_exist_is_unavailable(tmp_path):
    with pytest.raises(BookUnavailableError, match="none"):
        Book(tmp_path / "none" / "addresses.db", reserved=[]).open()


def test_others_cannot_read_the_file(path, make_book):
    make_book()
    assert path.stat().st_mode & 0o077 == 0

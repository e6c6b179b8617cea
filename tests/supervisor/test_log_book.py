import msgspec
from hypothesis import given
from hypothesis import strategies as st

from supervisor.log_book import LEVELS, MAX_PIECE_LINES, LogBook, LogEntry, Piece


def line(message: str = "x", worker: str = "dns", level: str = "info") -> LogEntry:
    return LogEntry(time="t", level=level, worker=worker, pid=1, logger="n", message=message)


def messages(piece: Piece) -> list[str]:
    return [entry.message for entry in piece.entries]


def read_all(book: LogBook, **wanted: object) -> list[str]:
    """As `vnet logs` reads it."""
    found: list[str] = []
    after, more = 0, True
    while more:
        piece = book.read(after, **wanted)
        found += messages(piece)
        after, more = piece.next, piece.more
    return found


def test_lines_are_numbered_in_the_order_in_which_they_came():
    book = LogBook("run")
    for number in range(6):
        book.add(line(str(number), worker=("dns", "tun", "supervisor")[number % 3]))
    piece = book.read(0)
    assert messages(piece) == list("012345")
    assert [entry.sequence for entry in piece.entries] == [1, 2, 3, 4, 5, 6]
    assert (piece.book, piece.next, piece.more, piece.has_missed) == ("run", 6, False, False)
    assert messages(book.read(4)) == ["4", "5"]
    assert messages(book.read(6)) == []
    assert messages(book.read(1000)) == []


def test_what_is_left_out_is_not_looked_at_again():
    book = LogBook()
    for number in range(10):
        book.add(line(str(number), worker="dns" if number % 2 else "tun"))
    assert messages(book.read(0, worker="dns")) == list("13579")
    assert book.read(0, worker="dns", limit=2).next == 4
    assert book.read(8, worker="tun").next == 10
    assert messages(book.read(0, worker="nobody")) == []


def test_level_is_the_least_that_is_wanted():
    book = LogBook()
    for level in LEVELS:
        book.add(line(level, level=level))
    for place, level in enumerate(LEVELS):
        assert messages(book.read(0, level=level)) == list(LEVELS)[place:]


def test_pieces_are_bounded_and_give_everything_in_the_end():
    book = LogBook()
    for number in range(3000):
        book.add(line(f"{number} {'x' * 500}"))
    first = book.read(0)
    assert first.more
    assert len(first.entries) <= MAX_PIECE_LINES
    assert len(msgspec.json.encode(first)) < 1 << 20
    assert len(read_all(book)) == 3000
    assert read_all(book, limit=7, worker="dns", level="info") == read_all(book)
    huge = LogBook()
    for _ in range(3):
        huge.add(line("x" * 300_000))
    assert len(huge.read(0).entries) == 1
    assert len(read_all(huge)) == 3


def test_oldest_lines_make_room():
    book = LogBook(max_lines=100)
    for number in range(250):
        book.add(line(str(number)))
    assert read_all(book) == [str(number) for number in range(150, 250)]
    assert book.read(0).has_missed
    assert book.read(149).has_missed
    assert not book.read(150).has_missed


def test_bytes_are_bounded_too():
    book = LogBook(max_bytes=1 << 20)
    for _ in range(200):
        book.add(line("x" * 60_000))
        book.add(line("\U0001f600" * 10_000))
    kept = read_all(book)
    assert 10 < len(kept) < 25
    assert sum(len(message.encode()) for message in kept) <= 1 << 20


def test_flood_of_one_worker_leaves_the_lines_of_the_others():
    book = LogBook(max_lines=100)
    for number in range(10):
        book.add(line(f"why {number}", worker="supervisor"))
    for number in range(1000):
        book.add(line(str(number), worker="proxy-0"))
    kept = read_all(book)
    assert kept[:10] == [f"why {number}" for number in range(10)]
    assert kept[-1] == "999"
    assert len(kept) == 100
    assert not book.read(5, worker="supervisor").has_missed
    assert book.read(5, worker="proxy-0").has_missed


def test_book_goes_on_as_another():
    """In an upgrade in place a follower must not notice, unless lines are missing."""
    old = LogBook("run", max_lines=10)
    for number in range(25):
        old.add(line(str(number), worker="dns" if number % 2 else "tun"))
    last, lines = old.keep()
    new = LogBook("other", max_lines=10)
    new.restore(old.name, last, lines)
    for after in (0, 14, 15, 20, 25):
        assert new.read(after) == old.read(after)
    for book in (old, new):
        book.add(line("next"))
        assert messages(book.read(last)) == ["next"]
        assert book.read(0).next == last + 1
    assert read_all(new) == read_all(old)
    empty = LogBook("x")
    empty.restore("run", 7, [])
    assert empty.add(line()).sequence == 8
    assert empty.read(3).has_missed is False


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(list(LEVELS))), max_size=200),
    st.integers(0, 210),
    st.integers(1, 20),
    st.sampled_from([None, *"abc"]),
    st.sampled_from(list(LEVELS)),
)
def test_reader_gets_each_kept_line_once_and_hears_of_gaps(lines, after, limit, worker, level):
    book = LogBook(max_lines=50)
    for number, (name, its_level) in enumerate(lines):
        book.add(line(str(number), worker=name, level=its_level))
    everything = [
        entry.sequence
        for entry in book.read(0, limit=1000).entries
        if worker in (None, entry.worker) and LEVELS[entry.level] >= LEVELS[level]
    ]
    found: list[int] = []
    at, more = after, True
    while more:
        piece = book.read(at, worker=worker, level=level, limit=limit)
        found += [entry.sequence for entry in piece.entries]
        at, more = piece.next, piece.more
    assert found == [sequence for sequence in everything if sequence > after]
    wanted = {
        number + 1
        for number, (name, its_level) in enumerate(lines)
        if number + 1 > after and worker in (None, name) and LEVELS[its_level] >= LEVELS[level]
    }
    if wanted - set(found):
        assert book.read(after, worker=worker, level=level).has_missed

"""The reactor's set over kqueue, with a kernel that is only told what to do (sys/event.h of macOS)."""

import types

from workers.proxy.kqueue_set import DEAD, READABLE, WRITABLE, KqueueSet, changes, meaning

READ, WRITE = -1, -2
ADD, DELETE, DISABLE, EOF = 0x1 | 0x4, 0x2, 0x8, 0x8000
LOWAT, MANY = 0x1, 0x7FFFFFFF
RESET = 54  # ECONNRESET of macOS


class Kernel:
    """Notes what it is told; answers with `ready`."""

    def __init__(self) -> None:
        self.told: list[tuple[int, ...]] = []
        self.ready: list[object] = []

    def control(self, wanted, most, timeout):
        self.told += wanted or []
        return self.ready[:most]

    def fileno(self):
        return 7


def happened(descriptor, kind, flags=0, error=0):
    return types.SimpleNamespace(ident=descriptor, filter=kind, flags=flags, fflags=error)


def made() -> tuple[Kernel, KqueueSet]:
    kernel = Kernel()
    return kernel, KqueueSet(kernel, lambda *change: change)


def test_constants_are_those_of_the_reactor():
    from workers.proxy import reactor

    assert (READABLE, WRITABLE, DEAD) == (reactor.READABLE, reactor.WRITABLE, reactor.DEAD)


def test_only_what_changes_is_told():
    assert changes(5, None, READABLE) == [(5, READ, ADD, 0, 0)]
    assert changes(5, None, WRITABLE) == [(5, READ, ADD, LOWAT, MANY), (5, WRITE, ADD, 0, 0)]
    assert changes(5, WRITABLE, READABLE) == [(5, READ, ADD, 0, 0), (5, WRITE, DELETE, 0, 0)]
    assert changes(5, WRITABLE | READABLE, WRITABLE) == [(5, READ, ADD, LOWAT, MANY)]
    assert changes(5, READABLE, None) == [(5, READ, DELETE, 0, 0)]
    assert changes(5, WRITABLE, None) == [(5, READ, DELETE, 0, 0), (5, WRITE, DELETE, 0, 0)]


def test_a_half_closed_connection_is_not_dead():
    assert meaning(READ, EOF, 0, READABLE) == READABLE
    assert meaning(READ, EOF, 0, 0) == 0
    assert meaning(READ, EOF, RESET, 0) == DEAD
    assert meaning(READ, EOF, RESET, READABLE) == READABLE | DEAD
    assert meaning(WRITE, 0, 0, WRITABLE) == WRITABLE
    assert meaning(WRITE, EOF, RESET, WRITABLE) == WRITABLE | DEAD


def test_both_directions_of_one_descriptor_are_one_answer():
    kernel, ready = made()
    ready.register(5, READABLE | WRITABLE)
    ready.register(6, READABLE)
    kernel.ready = [happened(5, READ), happened(6, READ), happened(5, WRITE)]
    assert ready.poll(0, 64) == [(5, READABLE | WRITABLE), (6, READABLE)]


def test_an_end_that_nobody_reads_yet_is_said_once_and_again_when_it_is_read():
    kernel, ready = made()
    ready.register(5, READABLE)
    ready.modify(5, 0)
    kernel.ready = [happened(5, READ, EOF)]
    assert ready.poll(0, 64) == []
    assert kernel.told[-1] == (5, READ, DISABLE, 0, 0)
    ready.modify(5, READABLE)
    assert kernel.told[-1] == (5, READ, ADD, 0, 0)
    assert ready.poll(0, 64) == [(5, READABLE)]
    ready.unregister(5)
    assert kernel.told[-1] == (5, READ, DELETE, 0, 0)
    told = len(kernel.told)
    assert ready.poll(0, 64) == []
    assert len(kernel.told) == told

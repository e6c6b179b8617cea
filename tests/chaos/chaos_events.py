"""Does what the schedule says: signals, floods, a full disk, faults of the cluster, other files."""

import contextlib
import os
import random
import secrets
import signal
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from chaos_bed import WORKERS, ZONE, Bed, apps, foreign
from chaos_probes import checksum
from chaos_schedule import Event, Kind
from chaos_watch import View, Watcher

from supervisor.cli.control_client import AskError, order
from supervisor.control_messages import Restart
from supervisor.exits import ExitStatus

# A slowed worker runs so long and stands so long, in turns; far below any hang_seconds.
RUN_SECONDS, STAND_SECONDS = (0.05, 0.2), (0.1, 0.6)
# Packets of a flood for each turn of the loop, about 100 turns a second.
PER_TURN = {Kind.FLOOD_SYN: 30, Kind.FLOOD_DNS: 15, Kind.FLOOD_GARBAGE: 30}
SECONDS = {
    Kind.SLOW: (2.0, 4.0),
    Kind.FLOOD_SYN: (1.5, 3.0),
    Kind.FLOOD_DNS: (1.5, 3.0),
    Kind.FLOOD_GARBAGE: (1.5, 3.0),
    Kind.DISK_FULL: (1.5, 3.0),
    Kind.PROXY_DOWN: (0.5, 2.5),
    Kind.AUTH_DOWN: (0.5, 2.5),
    Kind.CLOSE_APPS: (0.3, 0.3),
    Kind.LOGOUT: (0.5, 2.0),
    Kind.REWRITE: (0.5, 0.5),
    Kind.DRAIN: (0.1, 1.0),
}
# No name has an address that begins so: see chaos_bed.NAMES_RANGE.
FLOODED = (100, 100)
TAKEN_SECONDS = 10.0
# Before an upgrade the installed version is tried.
ORDER_SECONDS = 40.0


class SkippedError(Exception):
    """The event cannot happen here; the text says why."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What events act on. `addresses` are virtual ones that are in use."""

    bed: Bed
    watcher: Watcher
    chance: random.Random
    addresses: tuple[str, ...]


class Action:
    """One event on its way: `begin`, `tick` until `seconds` have passed, `end`."""

    def __init__(self, event: Event, stage: Stage) -> None:
        self.event = event
        self.stage = stage
        self.seconds = stage.chance.uniform(*SECONDS.get(event.kind, (0.0, 0.0)))

    def begin(self) -> None:
        """May raise SkippedError."""

    def tick(self) -> None:
        """Called about a hundred times a second."""

    def end(self) -> None:
        """Takes it back."""

    def is_overcome(self, _view: View) -> bool:
        """Whether VNet, which is healthy, has also done what it has to do here."""
        return True


class Signalled(Action):
    """SIGKILL, or SIGSTOP for good: another process has to come."""

    pid = 0

    def begin(self) -> None:
        number = signal.SIGKILL if self.event.kind is Kind.KILL else signal.SIGSTOP
        self.pid = self.stage.watcher.look().pid(self.event.target)
        if not self.pid:
            raise SkippedError(f"{self.event.target} has no process")
        os.kill(self.pid, number)

    def is_overcome(self, view: View) -> bool:
        return view.pid(self.event.target) != self.pid


class Slow(Action):
    """The worker stands still again and again."""

    _stands = False
    _next = 0.0

    def tick(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._stands = not self._stands
        self._next = now + self.stage.chance.uniform(
            *(STAND_SECONDS if self._stands else RUN_SECONDS)
        )
        self._send(signal.SIGSTOP if self._stands else signal.SIGCONT)

    def end(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        view = self.stage.watcher.latest
        if view is not None and (pid := view.pid(self.event.target)):
            # Killed in between, and replaced in a moment.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class Flood(Action):
    """Packets that nobody waits for."""

    def begin(self) -> None:
        self._ends = contextlib.ExitStack()
        raw = socket.socket(type=socket.SOCK_RAW, proto=socket.IPPROTO_RAW)
        self._raw = self._ends.enter_context(raw)
        self._udp = self._ends.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        for end in (self._raw, self._udp):
            end.setblocking(False)
        with socket.socket(type=socket.SOCK_DGRAM) as way:
            way.connect((self.stage.bed.server, 53))
            self._source = socket.inet_aton(way.getsockname()[0])

    def tick(self) -> None:
        send = {
            Kind.FLOOD_SYN: self._send_syn,
            Kind.FLOOD_DNS: self._send_question,
            Kind.FLOOD_GARBAGE: self._send_garbage,
        }[self.event.kind]
        for _ in range(PER_TURN[self.event.kind]):
            # What the kernel has no room for, or does not take, is not sent.
            with contextlib.suppress(OSError):
                send()

    def end(self) -> None:
        self._ends.close()

    def _send_syn(self) -> None:
        """To an address without a name."""
        chance = self.stage.chance
        target = bytes([*FLOODED, chance.randrange(256), chance.randrange(256)])
        tcp = struct.pack(
            "!HHIIBBHHH",
            chance.randrange(1024, 65536),
            chance.randrange(1, 65536),
            chance.randrange(1 << 32),
            0,
            5 << 4,
            2,
            65535,
            0,
            0,
        )
        pseudo = self._source + target + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(tcp))
        sum_of = checksum(pseudo + tcp).to_bytes(2, "big")
        self._send_ip(target, socket.IPPROTO_TCP, tcp[:16] + sum_of + tcp[18:])

    def _send_question(self) -> None:
        """Most for names that are known, a few for names below the zone that nobody has."""
        chance = self.stage.chance
        draw = chance.random()
        if draw < 0.02:
            name = f"nobody-{chance.randrange(10**9)}.{ZONE}"
        else:
            name = chance.choice(apps() if draw < 0.5 else list(foreign()))
        question = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
        head = struct.pack("!HHHHHH", chance.randrange(65536), 0x0100, 1, 0, 0, 0)
        kind = chance.choice((1, 1, 28, 255))
        data = head + question + b"\0" + struct.pack("!HH", kind, 1)
        self._udp.sendto(data, (self.stage.bed.server, 53))

    def _send_garbage(self) -> None:
        """Half to the DNS port; half from below TCP and UDP, to addresses in use and others."""
        chance = self.stage.chance
        data = chance.randbytes(chance.randrange(600))
        if chance.random() < 0.5:
            self._udp.sendto(data, (self.stage.bed.server, 53))
            return
        target = socket.inet_aton(
            chance.choice((*self.stage.addresses, "100.100.1.2", self.stage.bed.server))
        )
        protocol = chance.choice((1, 2, 6, 6, 6, 17, 17, 41, 47, 50, 58, 132, 255))
        if protocol == socket.IPPROTO_TCP and len(data) > 13:
            # A SYN to an app would be a connection, and no garbage.
            data = data[:13] + bytes([data[13] & ~2]) + data[14:]
        self._send_ip(target, protocol, data)

    def _send_ip(self, target: bytes, protocol: int, data: bytes) -> None:
        """The kernel fills in length, identification and checksum (raw(7))."""
        head = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, protocol, 0) + self._source + target
        self._raw.sendto(head + data, (socket.inet_ntoa(target), 0))


class DiskFull(Action):
    """Not a byte is left where the state is kept."""

    @property
    def _path(self) -> Path:
        return self.stage.bed.state_dir / "filler"

    def tick(self) -> None:
        # Again and again: what others give up is taken at once.
        with contextlib.suppress(OSError), self._path.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(65536))

    def end(self) -> None:
        self._path.unlink()


class Fault(Action):
    """A fault of the embedded cluster."""

    def begin(self) -> None:
        self._write(f"{self.event.kind}\n")

    def end(self) -> None:
        self._write("")

    def _write(self, text: str) -> None:
        path = self.stage.bed.home / "faults"
        path.write_text(text)
        taken = path.with_suffix(".taken")
        deadline = time.monotonic() + TAKEN_SECONDS
        while (taken.read_text() if taken.exists() else "") != text:
            if time.monotonic() > deadline:
                raise SkippedError("the embedded cluster does not take the fault over")
            time.sleep(0.01)


class Rewrite(Action):
    """Every file of the login is replaced by one with the same content, keys first, as tsh does."""

    def begin(self) -> None:
        self._write()

    def end(self) -> None:
        self._write()

    def _write(self) -> None:
        home = self.stage.bed.home
        keys = sorted(path for path in (home / "keys").rglob("*") if path.is_file())
        for path in (*keys, *sorted(home.glob("*.yaml")), home / "current-profile"):
            new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            new.write_bytes(path.read_bytes())
            new.chmod(path.stat().st_mode & 0o777)
            new.replace(path)


class Drain(Action):
    """`vnet restart --drain`: other processes come, and nothing is cut."""

    def begin(self) -> None:
        view = self.stage.watcher.look()
        everything = self.event.kind is Kind.UPGRADE
        self._pids = {
            name: view.pid(name) for name in (WORKERS if everything else (self.event.target,))
        }
        request = Restart(worker="all" if everything else self.event.target, drain=True)
        try:
            order(self.stage.bed.run_dir, request, ORDER_SECONDS)
        except AskError as error:
            if error.status is ExitStatus.USAGE:
                raise SkippedError(str(error)) from error
            raise

    def is_overcome(self, view: View) -> bool:
        return all(view.pid(name) != pid for name, pid in self._pids.items())


_ACTIONS: dict[Kind, type[Action]] = {
    Kind.KILL: Signalled,
    Kind.STOP: Signalled,
    Kind.SLOW: Slow,
    Kind.FLOOD_SYN: Flood,
    Kind.FLOOD_DNS: Flood,
    Kind.FLOOD_GARBAGE: Flood,
    Kind.DISK_FULL: DiskFull,
    Kind.PROXY_DOWN: Fault,
    Kind.AUTH_DOWN: Fault,
    Kind.CLOSE_APPS: Fault,
    Kind.LOGOUT: Fault,
    Kind.REWRITE: Rewrite,
    Kind.DRAIN: Drain,
    Kind.UPGRADE: Drain,
}


def action(event: Event, stage: Stage) -> Action:
    """The action of an event."""
    return _ACTIONS[event.kind](event, stage)

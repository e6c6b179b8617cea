"""The load: transfers both ways, short connections, SSH and questions, each written down when it ends.

SSH is the stock client: sessions in which a command sends everything back, and mere logins. It runs in a process of its own. Every connection looks its app's name up first, as a program does.
"""

import asyncio
import contextlib
import hashlib
import random
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import dnslib
import msgspec
from chaos_accounts import Answer, Connection, Lag, Names, Outcome, Question, Record
from chaos_far_end import PIECE_BYTES, PIECE_SECONDS, PORT
from chaos_pattern import PERIOD, PROGRESS, SHORT_BYTES, SUMMARY, Pattern, Request

from ipc.addresses import owner_of_address
from ipc.slots import SSH

# resolv.conf(5): how long the C library waits for an answer, and how often it asks.
ANSWER_SECONDS, TRIES = 5.0, 2
# A held SYN is refused after 30 s at the latest.
CONNECT_SECONDS = 45.0
IDLE_SECONDS = 45.0
# Shorter gaps are not written down.
GAP_SECONDS = 0.2
LAG_LOOK_SECONDS, LAG_SECONDS = 0.05, 0.2
TRANSFER_SECONDS = (5.0, 25.0)
# A quarter of the pace of a transfer: each byte comes back, and the node is a part of the cluster.
SSH_PIECE_BYTES = 8192
# What the client says when it was not let in; everything else that it complains of is a cut.
SSH_REFUSALS = ("Connection refused", "Permission denied")
SSH_TIMEOUTS = ("timed out", "Timeout")
SSH_STRANGER = "Host key verification failed"
MAX_COMPLAINT_BYTES, MAX_DETAIL = 4096, 200
MOST_OPEN = 400


@dataclass(frozen=True, slots=True)
class Load:
    """How much of everything there is, and which names there are.

    `apps` lead to the far end. `fresh` are names of other apps, each asked for once; `foreign` are
    names of others with their addresses. `node` is an SSH server, `ssh_config` how its name is to be
    used.
    """

    server: str
    proxies: int
    apps: tuple[str, ...]
    fresh: tuple[str, ...]
    foreign: Mapping[str, str]
    node: str
    ssh_config: Path
    transfers: int = 6
    short_per_second: float = 10
    questions_per_second: float = 15
    fresh_per_second: float = 1
    ssh_sessions: int = 2
    ssh_logins_per_second: float = 0.5


class Traffic:
    """The load of one run. Times are monotonic seconds."""

    def __init__(self, load: Load, seed: int, sink: BinaryIO) -> None:
        self._load = load
        self._chance = random.Random(seed)
        self._sink = sink
        self._encoder = msgspec.json.Encoder()
        self._loop = asyncio.get_running_loop()
        self._may_run = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._addresses: dict[str, str] = dict(load.foreign)
        self._fresh = list(load.fresh)

    async def obey(self, commands: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        """Carries out `run` and `pause` until `stop` or the end of the commands."""
        makers = [
            asyncio.ensure_future(work)
            for work in (
                self._keep_going(self._load.transfers // 2, self._down_transfer),
                self._keep_going(self._load.transfers // 2, self._up_transfer),
                self._keep_going(self._load.ssh_sessions, self._ssh_session),
                self._often(self._load.ssh_logins_per_second, self._ssh_login),
                self._often(self._load.short_per_second, self._short),
                self._often(self._load.questions_per_second, self._ask_known),
                self._often(self._load.fresh_per_second, self._ask_fresh),
                self._watch_lag(),
            )
        ]
        while (line := await commands.readline()).strip() not in (b"", b"stop"):
            if line.strip() == b"run":
                self._may_run.set()
            else:
                self._may_run.clear()
                await self._wait_for_all()
            answers.write(b"done\n")
        for maker in makers:
            maker.cancel()
        await asyncio.gather(*makers, return_exceptions=True)

    async def _wait_for_all(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _write(self, record: Record) -> None:
        self._sink.write(self._encoder.encode(record) + b"\n")
        self._sink.flush()

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _often(self, per_second: float, make: Callable[[], Awaitable[None]]) -> None:
        """Poisson arrivals, whatever becomes of those before."""
        while True:
            await asyncio.sleep(self._chance.expovariate(per_second))
            await self._may_run.wait()
            if len(self._tasks) < MOST_OPEN:
                self._start(make())

    async def _keep_going(self, count: int, make: Callable[[], Awaitable[None]]) -> None:
        """As many at any time."""
        slots = asyncio.Semaphore(count)

        async def once() -> None:
            try:
                await make()
            finally:
                slots.release()

        while True:
            await slots.acquire()
            await self._may_run.wait()
            self._start(once())
            await asyncio.sleep(0.1)

    async def _watch_lag(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(LAG_LOOK_SECONDS)
            ended = time.monotonic()
            if ended - began > LAG_LOOK_SECONDS + LAG_SECONDS:
                self._write(Lag(began=began, ended=ended))

    # -- connections --

    async def _down_transfer(self) -> None:
        await self._connection("down", self._down)

    async def _up_transfer(self) -> None:
        await self._connection("up", self._up)

    async def _short(self) -> None:
        await self._connection("short", self._fetch)

    async def _connection(
        self, way: str, talk: Callable[[socket.socket, Pattern, Connection], Awaitable[None]]
    ) -> None:
        app = self._chance.choice(self._load.apps)
        address = await self._ask(app, Names.KNOWN, "udp")
        if not address:
            return
        owner = owner_of_address(socket.inet_aton(address), self._load.proxies)
        record = Connection(
            way=way,
            app=app,
            owner=f"proxy-{owner}",
            began=time.monotonic(),
            ended=0.0,
            outcome=Outcome.COMPLETED,
        )
        pattern = Pattern(self._chance.randrange(PERIOD))
        with socket.socket() as end:
            end.setblocking(False)
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await self._loop.sock_connect(end, (address, PORT))
            except TimeoutError:
                record.outcome, record.detail = Outcome.HUNG, "connecting"
            except OSError as error:
                record.outcome, record.detail = Outcome.REFUSED, str(error)
            else:
                await _judged(talk(end, pattern, record), record)
        record.ended = time.monotonic()
        self._write(record)

    async def _fetch(self, end: socket.socket, pattern: Pattern, record: Connection) -> None:
        await self._loop.sock_sendall(end, Request("short", pattern).encode())
        data = b""
        while len(data) < SHORT_BYTES and (piece := await self._receive(end)):
            data += piece
        record.bytes, record.wrong = len(data), pattern.wrong_bytes(0, data)
        end.shutdown(socket.SHUT_WR)
        if len(data) < SHORT_BYTES:
            record.outcome = Outcome.ENDED_EARLY
        elif await self._receive(end):
            record.wrong += 1

    async def _down(self, end: socket.socket, pattern: Pattern, record: Connection) -> None:
        await self._loop.sock_sendall(end, Request("down", pattern).encode())
        until = time.monotonic() + self._chance.uniform(*TRANSFER_SECONDS)
        digest, held, is_ending = hashlib.sha256(), b"", False
        last = time.monotonic()
        while piece := await self._receive(end):
            last = _note_gap(record, last)
            held += piece
            data, held = held[: -SUMMARY.size], held[-SUMMARY.size :]
            record.wrong += pattern.wrong_bytes(record.bytes, data)
            digest.update(data)
            record.bytes += len(data)
            if not is_ending and (last > until or not self._may_run.is_set()):
                is_ending = True
                end.shutdown(socket.SHUT_WR)
        summary = SUMMARY.pack(record.bytes, 0, digest.digest())
        if held != summary:
            _judge_end(record, pattern.wrong_bytes(record.bytes, held) == 0)

    async def _up(self, end: socket.socket, pattern: Pattern, record: Connection) -> None:
        await self._loop.sock_sendall(end, Request("up", pattern).encode())
        digest, sent = hashlib.sha256(), 0

        async def send() -> None:
            nonlocal sent
            until = time.monotonic() + self._chance.uniform(*TRANSFER_SECONDS)
            while time.monotonic() < until and self._may_run.is_set():
                piece = pattern.piece(sent, PIECE_BYTES)
                await self._loop.sock_sendall(end, piece)
                digest.update(piece)
                sent += len(piece)
                await asyncio.sleep(PIECE_SECONDS)
            end.shutdown(socket.SHUT_WR)

        sender = asyncio.ensure_future(send())
        held, last = b"", time.monotonic()
        try:
            while piece := await self._receive(end):
                last = _note_gap(record, last)
                held += piece
                while len(held) >= SUMMARY.size + PROGRESS.size:
                    record.bytes, record.wrong = PROGRESS.unpack_from(held)
                    held = held[PROGRESS.size :]
            # A socket tells its error once; the sender may be the one that was told.
            await asyncio.wait({sender}, timeout=5 * PIECE_SECONDS)
            if sender.done() and (error := sender.exception()) is not None:
                raise error
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sender
        if held != SUMMARY.pack(sent, 0, digest.digest()):
            _judge_end(record, len(held) < SUMMARY.size or record.bytes < sent)

    async def _receive(self, end: socket.socket) -> bytes:
        async with asyncio.timeout(IDLE_SECONDS):
            return await self._loop.sock_recv(end, 1 << 16)

    # -- SSH --

    async def _ssh_session(self) -> None:
        await self._ssh("ssh", "cat", self._echo)

    async def _ssh_login(self) -> None:
        await self._ssh("ssh login", "true", _nothing)

    async def _ssh(self, way: str, command: str, talk: "_Talk") -> None:
        load = self._load
        address = await self._ask(load.node, Names.KNOWN, "udp")
        if not address:
            return
        record = Connection(
            way=way,
            app=load.node,
            owner=SSH,
            began=time.monotonic(),
            ended=0.0,
            outcome=Outcome.COMPLETED,
        )
        client = await asyncio.create_subprocess_exec(
            *("ssh", "-F", str(load.ssh_config), "-o", f"HostName={address}"),
            *("-o", f"ConnectTimeout={CONNECT_SECONDS:g}", load.node, command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stderr is not None
        complaint = asyncio.ensure_future(_complaint_of(client.stderr))
        try:
            is_whole = await talk(client.stdin, client.stdout, record)
            async with asyncio.timeout(IDLE_SECONDS):
                status = await client.wait()
            judge_client(record, status, await complaint, is_whole=is_whole)
        except TimeoutError:
            record.outcome, record.detail = Outcome.HUNG, "open"
            client.kill()
            await client.wait()
        finally:
            complaint.cancel()
        record.ended = time.monotonic()
        self._write(record)

    async def _echo(
        self, to: asyncio.StreamWriter, back: asyncio.StreamReader, record: Connection
    ) -> bool:
        """Sends at an even pace and compares what comes back; whether all of it came."""
        pattern, sent = Pattern(self._chance.randrange(PERIOD)), 0

        async def send() -> None:
            nonlocal sent
            until = time.monotonic() + self._chance.uniform(*TRANSFER_SECONDS)
            with contextlib.suppress(OSError):  # the client's end says more
                while time.monotonic() < until and self._may_run.is_set():
                    piece = pattern.piece(sent, SSH_PIECE_BYTES)
                    sent += len(piece)
                    to.write(piece)
                    await to.drain()
                    await asyncio.sleep(PIECE_SECONDS)
                to.close()

        sender = asyncio.ensure_future(send())
        # A gap is a gap only after something came: the login takes its time.
        last = 0.0
        try:
            while True:
                async with asyncio.timeout(IDLE_SECONDS):
                    piece = await back.read(1 << 16)
                if not piece:
                    return sender.done() and record.bytes == sent
                last = _note_gap(record, last) if last else time.monotonic()
                record.wrong += pattern.wrong_bytes(record.bytes, piece)
                record.bytes += len(piece)
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    # -- questions --

    async def _ask_known(self) -> None:
        way = "tcp" if self._chance.random() < 0.2 else "udp"
        if self._chance.random() < 0.5:
            await self._ask(self._chance.choice(self._load.apps), Names.KNOWN, way)
        else:
            name = self._chance.choice(list(self._load.foreign))
            await self._ask(name, Names.FOREIGN, way)

    async def _ask_fresh(self) -> None:
        if self._fresh:
            await self._ask(self._fresh.pop(), Names.FRESH, "udp")

    async def _ask(self, name: str, names: Names, way: str) -> str:
        """The address of a name, empty when there is none; the question is written down."""
        record = Question(
            way=way,
            names=names,
            name=name,
            began=time.monotonic(),
            ended=0.0,
            answer=Answer.NO_ANSWER,
            tries=0,
        )
        exchange = self._over_udp if way == "udp" else self._over_tcp
        query = dnslib.DNSRecord.question(name)
        address = ""
        while record.tries < TRIES and not address:
            record.tries += 1
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    reply = await exchange(query.pack(), query.header.id)
            except (OSError, EOFError) as error:  # TimeoutError among them
                record.detail = f"{type(error).__name__} {error}".strip()
                continue
            address = self._judge(reply, record)
            # The C library takes every other answer for the last word.
            if record.answer is not Answer.FAILED:
                break
        record.ended = time.monotonic()
        self._write(record)
        return address

    def _judge(self, reply: dnslib.DNSRecord, record: Question) -> str:
        code = dnslib.RCODE[reply.header.rcode]
        found = [str(rr.rdata) for rr in reply.rr if rr.rtype == dnslib.QTYPE.A]
        if code == "NXDOMAIN" or (code == "NOERROR" and not found):
            record.answer = Answer.NO_SUCH_NAME
            return ""
        if code != "NOERROR":
            record.answer, record.detail = Answer.FAILED, str(code)
            return ""
        expected = self._addresses.setdefault(record.name, found[0])
        record.answer = Answer.RIGHT if found == [expected] else Answer.WRONG
        if record.answer is Answer.WRONG:
            record.detail = f"{found} and not {expected}"
        return found[0]

    async def _over_udp(self, query: bytes, number: int) -> dnslib.DNSRecord:
        with socket.socket(type=socket.SOCK_DGRAM) as end:
            end.setblocking(False)
            end.connect((self._load.server, 53))
            await self._loop.sock_sendall(end, query)
            while True:
                reply = dnslib.DNSRecord.parse(await self._loop.sock_recv(end, 4096))
                if reply.header.id == number:
                    return reply

    async def _over_tcp(self, query: bytes, _number: int) -> dnslib.DNSRecord:
        reader, writer = await asyncio.open_connection(self._load.server, 53)
        try:
            writer.write(len(query).to_bytes(2, "big") + query)
            length = int.from_bytes(await reader.readexactly(2), "big")
            return dnslib.DNSRecord.parse(await reader.readexactly(length))
        finally:
            writer.close()


_Talk = Callable[[asyncio.StreamWriter, asyncio.StreamReader, Connection], Awaitable[bool]]


async def _nothing(
    to: asyncio.StreamWriter, _back: asyncio.StreamReader, _record: Connection
) -> bool:
    to.close()
    return True


async def _complaint_of(errors: asyncio.StreamReader) -> str:
    """All that the client says, in one line; of very much the end."""
    found = b""
    while piece := await errors.read(MAX_COMPLAINT_BYTES):
        found = (found + piece)[-MAX_COMPLAINT_BYTES:]
    return " ".join(found.decode(errors="replace").split())


def judge_client(record: Connection, status: int, complaint: str, *, is_whole: bool) -> None:
    """Writes down how a session went, from what the SSH client says of it."""
    if status == 0:
        record.outcome = Outcome.COMPLETED if is_whole else Outcome.ENDED_EARLY
        return
    record.detail = complaint[-MAX_DETAIL:] or f"status {status}"
    if any(text in complaint for text in SSH_TIMEOUTS):
        record.outcome = Outcome.HUNG
    elif any(text in complaint for text in SSH_REFUSALS):
        record.outcome = Outcome.REFUSED
    else:
        record.outcome = Outcome.RESET
    # Nothing that happens to VNet makes the node another one.
    record.wrong += SSH_STRANGER in complaint


async def _judged(talk: Awaitable[None], record: Connection) -> None:
    """Writes down how the conversation ended."""
    try:
        await talk
    except TimeoutError:
        record.outcome, record.detail = Outcome.HUNG, "open"
    except OSError as error:
        record.outcome, record.detail = Outcome.RESET, str(error)


def _note_gap(record: Connection, last: float) -> float:
    now = time.monotonic()
    if now - last > GAP_SECONDS:
        record.gaps.append((last, now))
    return now


def _judge_end(record: Connection, is_early: bool) -> None:
    """The summary at the end is not the expected one."""
    if is_early:
        record.outcome = Outcome.ENDED_EARLY
    else:
        record.wrong = max(record.wrong, 1)


async def run(load: Load, seed: int, commands: socket.socket, path: Path) -> None:
    """Obeys `commands` (lines, each answered by `done`); records go to `path`, one JSON line each."""
    reader, writer = await asyncio.open_connection(sock=commands)
    with path.open("ab") as sink:
        await Traffic(load, seed, sink).obey(reader, writer)


def read(path: Path) -> list[Record]:
    """The records in a file; a last line that was not finished is left out."""
    decoder = msgspec.json.Decoder(Record)
    with path.open("rb") as file:
        return [decoder.decode(line) for line in file if line.endswith(b"\n")]

"""A private network for end-to-end tests, and what runs in it.

    pytest ── vnet demo or unshare ── init of the namespaces ── cluster, VNet, programs

`Bed` knows the init process of a private network (network, mount and pid namespace) and brings
programs and sockets into it: programs with nsenter, so that they are what a user would have started
there; sockets by entering the network namespace for the moment in which they are made, so that a
test can do with them what no program does. Everything ends with init, and init with the test.
"""

import contextlib
import fcntl
import json
import os
import pwd
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import dnslib

from ipc.addresses import owner_of_address
from supervisor.cli.control_client import AskError, ask_status
from supervisor.control_messages import Status
from supervisor.namespace import inside

T = TypeVar("T")

# Generous: the machine may be busy. What must be quick has a limit of its own.
PATIENCE_SECONDS = 30.0
# "At once", on a machine that may be busy. Every limit a refusal could have waited for is longer: 3 s
# for a cluster's first answer, 10 s for a dial, 30 s for a held SYN.
AT_ONCE_SECONDS = 2.5
# For VNet's answer about itself, where the test is about something else.
AN_ANSWER_SECONDS = 10.0
LOG_LINES = 80

# Beds in use; their logs are shown when a test fails.
LIVE: list["Bed"] = []


def wait_until(look: Callable[[], T], what: str, seconds: float = PATIENCE_SECONDS) -> T:
    """The first true value of `look()`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)
    return found


def children(pid: int) -> list[int]:
    """The children of a process; none when it is gone."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except OSError:
        pass
    return found


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    below = children(pid)
    return below + [further for child in below for further in descendants(child)]


def inner_pid(process: Path) -> int:
    """The id of a process (its directory below /proc) in its own pid namespace. Raises OSError."""
    status = (process / "status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Bed:
    """One private network. `environment` is what a program in it is given."""

    def __init__(self, init: int, directory: Path, environment: dict[str, str]) -> None:
        """`init` is our id of the process that holds the namespaces."""
        self.init = init
        self.directory = directory
        self.environment = environment
        self.logs: list[Path] = []
        self._namespace = os.open(f"/proc/{init}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Lets go of the namespace."""
        os.close(self._namespace)

    def path(self, inner: str | Path) -> Path:
        """A path of the private network as it is seen from here."""
        return Path(f"/proc/{self.init}/root/{str(inner).lstrip('/')}")

    # -- programs --

    def command(self, *arguments: str, user: str = "") -> list[str]:
        """The command line that runs a program in the private network, ending with us."""
        enter = ["nsenter", f"--target={self.init}", "--net", "--mount", "--pid", "--"]
        options = ["--pdeathsig=KILL"]
        if user:
            entry = pwd.getpwnam(user)
            options += [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
        return [*enter, "setpriv", *options, *arguments]

    def run(
        self,
        *arguments: str,
        stdin: bytes = b"",
        timeout: float = 60,
        user: str = "",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a program to its end; standard output and error are caught."""
        return subprocess.run(
            self.command(*arguments, user=user),
            input=stdin,
            capture_output=True,
            timeout=timeout,
            check=False,
            env=self.environment | dict(env or {}),
        )

    def output(self, *arguments: str, **options: Any) -> str:
        """Standard output of a program that must succeed."""
        done = self.run(*arguments, **options)
        assert done.returncode == 0, (
            f"{arguments}: status {done.returncode}\n{done.stdout.decode(errors='replace')}"
            f"\n{done.stderr.decode(errors='replace')}"
        )
        return done.stdout.decode()

    @contextlib.contextmanager
    def running(
        self,
        *arguments: str,
        user: str = "",
        log_name: str = "",
        env: Mapping[str, str] | None = None,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A program beside the test; ended with SIGKILL at the latest when the block ends."""
        log = self.directory / f"{log_name or Path(arguments[0]).name}.log"
        with (
            log.open("ab") as sink,
            subprocess.Popen(
                self.command(*arguments, user=user),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=self.environment | dict(env or {}),
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal for a process, by its id in the private network."""
        os.kill(self.outer_pid(pid), number)

    def outer_pid(self, pid: int) -> int:
        """Our id of a process of the private network."""
        namespace = Path(f"/proc/{self.init}/ns/pid").readlink()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (entry / "ns/pid").readlink() == namespace and inner_pid(entry) == pid:
                    return int(entry.name)
        raise ProcessLookupError(f"no process {pid} in the private network")

    # -- sockets --

    def open_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, timeout: float = 20
    ) -> socket.socket:
        """A socket of the private network."""
        with inside(self._namespace):
            end = socket.socket(family, kind)
        end.settimeout(timeout)
        return end

    def connect(self, host: str, port: int, *, timeout: float = 20) -> socket.socket:
        """A connection to a name (its A record) or an address."""
        address = host if _is_address(host) else self.resolve(host)[0]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        end = self.open_socket(family, timeout=timeout)
        try:
            end.connect((address, port))
        except BaseException:
            end.close()
            raise
        return end

    def seconds_until_refused(self, host: str, port: int) -> float:
        """How long a connect takes that ends with "connection refused"; anything else raises."""
        address = host if _is_address(host) else self.resolve(host)[0]
        began = time.monotonic()
        try:
            self.connect(address, port).close()
        except ConnectionRefusedError:
            return time.monotonic() - began
        raise AssertionError(f"{host} port {port} accepted the connection")

    @property
    def dns_server(self) -> str:
        """The DNS server the private network's programs ask."""
        return self.path("/etc/resolv.conf").read_text().split()[1]

    def ask(
        self, name: str, kind: str = "A", server: str = "", *, timeout: float = 10
    ) -> dnslib.DNSRecord:
        """The DNS server's whole answer, over UDP."""
        query = dnslib.DNSRecord.question(name, kind)
        with self.open_socket(kind=socket.SOCK_DGRAM, timeout=timeout) as end:
            end.connect((server or self.dns_server, 53))
            end.send(query.pack())
            return dnslib.DNSRecord.parse(end.recv(65535))

    def resolve(self, name: str, kind: str = "A", server: str = "") -> list[str]:
        """The records of a name as text."""
        answer = self.ask(name, kind, server)
        assert answer.header.rcode == 0, f"{name}: {dnslib.RCODE[answer.header.rcode]}"
        assert answer.rr, f"{name} has no {kind}"
        return [str(record.rdata) for record in answer.rr]

    @contextlib.contextmanager
    def listening(
        self, port: int, serve: Callable[[socket.socket], None], address: str = "127.0.0.1"
    ) -> Iterator[None]:
        """A server on loopback: `serve` gets each connection in a thread and leaves it closed."""
        listener = self.open_socket(timeout=0.1)
        threads: list[threading.Thread] = []
        stopping = threading.Event()

        def talk(connection: socket.socket) -> None:
            # A peer that goes away is part of many tests.
            with contextlib.suppress(OSError), connection:
                connection.settimeout(20)
                serve(connection)

        def accept() -> None:
            while not stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    threads.append(threading.Thread(target=talk, args=(listener.accept()[0],)))
                    threads[-1].start()

        with listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(512)
            acceptor = threading.Thread(target=accept)
            acceptor.start()
            try:
                yield
            finally:
                stopping.set()
                acceptor.join()
        for thread in threads:
            thread.join(30)

    # -- VNet --

    @property
    def run_dir(self) -> Path:
        """The run directory of the VNet that is meant, seen from here."""
        return self.path(self.environment["VNET_RUN_DIR"])

    def status(self) -> dict[str, Any]:
        """`vnet status --json`, without the cost of starting the command. Raises AskError."""
        # The command gives up sooner: that is for tests of the command.
        return dict(json.loads(ask_status(self.run_dir, Status(), AN_ANSWER_SECONDS)[1]))

    def health(self) -> str:
        """The health in one word, "none" when nobody answers."""
        try:
            return ask_status(self.run_dir, Status())[0].health
        except AskError:
            return "none"

    def wait_for_health(self, health: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Returns once VNet has this health."""
        wait_until(lambda: self.health() == health, f"VNet is {health}", seconds)

    def wait_until_ended(self) -> None:
        """Returns once VNet has ended and another may start: the last that it gives back is its lock."""
        wait_until(lambda: self.health() == "none", "VNet answers no more")

        def is_free() -> bool:
            try:
                with (self.run_dir / "lock").open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                pass  # it takes the file away before
            return True

        wait_until(is_free, "VNet has ended")

    def worker(self, name: str) -> dict[str, Any]:
        """One worker of the status."""
        return next(w for w in self.status()["workers"] if w["name"] == name)

    def pids(self) -> dict[str, int]:
        """The process of each worker now; earlier ones may still finish what they have."""
        found: dict[str, int] = {}
        for worker in self.status()["workers"]:
            found.setdefault(worker["name"], worker["pid"])
        return found

    def owner_of(self, address: str) -> str:
        """The proxy that owns a virtual IPv4 address."""
        proxies = sum(name.startswith("proxy-") for name in self.pids())
        return f"proxy-{owner_of_address(socket.inet_aton(address), proxies)}"

    def wait_for_successor(self, name: str, pid: int) -> None:
        """Returns once a worker is ready again with another process than `pid`."""

        def is_back() -> bool:
            now = self.worker(name)
            return bool(now["state"] == "ready" and now["pid"] != pid)

        wait_until(is_back, f"{name} is back")

    def wait_for_counters(self) -> None:
        """Returns once the status counts all that has happened so far: heartbeats bring the numbers."""
        # The first that comes from now on may have been made before.
        for _ in range(2):
            began = time.monotonic()

            def have_all_beaten(began: float = began) -> bool:
                # What the status says of it is rounded.
                longest = time.monotonic() - began - 0.1
                ages = [worker["heartbeat_age_seconds"] for worker in self.status()["workers"]]
                return all(age is not None and age < longest for age in ages)

            wait_until(have_all_beaten, "every worker has said what it counts")

    def reload(self) -> str:
        """What `vnet reload` says; returns once every worker has taken the configuration over."""
        late = "not taken over yet"
        said = self.output("vnet", "reload")
        if late in said:
            # A second is not enough for one that gets no processor.
            wait_until(lambda: late not in self.output("vnet", "reload"), "all have taken it over")
        return said

    def open_files(self, name: str) -> int:
        """How many descriptors a worker holds; `supervisor` is one too."""
        status = self.status()
        pid = status["supervisor"]["pid"] if name == "supervisor" else self.worker(name)["pid"]
        return len(list(Path(f"/proc/{self.outer_pid(pid)}/fd").iterdir()))

    def log(self) -> str:
        """VNet's log so far."""
        return "".join(
            log.read_text(errors="replace")
            for log in (self.path(path) for path in self.logs)
            if log.exists()
        )

    @contextlib.contextmanager
    def faults(self, *lines: str) -> Iterator[None]:
        """Faults of the embedded cluster, in effect when the block begins and gone when it ends."""
        path = self.path(self.environment["TELEPORT_HOME"]) / "faults"
        taken = path.with_suffix(".taken")

        def is_taken(text: str) -> bool:
            return (taken.read_text() if taken.exists() else "") == text

        def put(text: str) -> None:
            # At once: a cluster that sees no fault for a moment ends those that are to go on.
            fresh = path.with_suffix(".fresh")
            fresh.write_text(text)
            fresh.replace(path)

        before = path.read_text() if path.exists() else ""
        wanted = "".join(f"{line}\n" for line in lines)
        put(wanted)
        try:
            wait_until(lambda: is_taken(wanted), "the faults are in effect")
            yield
        finally:
            put(before)
        wait_until(lambda: is_taken(before), "the faults are gone")


def _is_address(text: str) -> bool:
    return ":" in text or text.replace(".", "").isdigit()


@contextlib.contextmanager
def live(bed: Bed) -> Iterator[Bed]:
    """Shows the bed's log with failures while the block lasts."""
    LIVE.append(bed)
    try:
        yield bed
        # A worker may not be able to read its own program any more, depending on where it lies.
        late = [line for line in bed.log().splitlines() if "is imported by a confined" in line]
        assert not late, "modules for workers.preload"
    finally:
        LIVE.remove(bed)
        bed.close()


def read_all(end: socket.socket) -> bytes:
    """Everything until the other side ends."""
    pieces = []
    while piece := end.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def read_exactly(end: socket.socket, count: int) -> bytes:
    """So many bytes; fewer only if the other side ends."""
    data = bytearray()
    while len(data) < count and (piece := end.recv(count - len(data))):
        data += piece
    return bytes(data)


def as_nobody(work: Callable[[], T]) -> T:
    """Runs `work` with the effective user id of nobody."""
    os.seteuid(65534)
    try:
        return work()
    finally:
        os.seteuid(0)


def lines_of(text: str | bytes) -> Sequence[str]:
    """The lines that are not empty."""
    text = text.decode() if isinstance(text, bytes) else text
    return [line for line in text.splitlines() if line.strip()]

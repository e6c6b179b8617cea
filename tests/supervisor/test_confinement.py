"""What a confined worker cannot do, tried by one: real fork, real kernel, no mock."""

import asyncio
import contextlib
import ctypes
import mmap
import os
import pwd
import signal
import socket
import sqlite3
import ssl
import tempfile
import threading
from pathlib import Path

import pytest
import zmq
from confined_body import Ended, common, configuration, run_confined

from ipc import messages as m
from ipc.bus import BusContext
from ipc.curve import make_key_pair
from ipc.errors import ForbiddenMessageError
from supervisor.confinement import apply, identities, landlock, seccomp
from supervisor.confinement.landlock_rules import KEEP_FILES, KEEP_SOCKETS, READ, FileRule, Reach
from supervisor.settings import User

pytestmark = pytest.mark.root

OWNER = pwd.getpwnam("daemon")
USER = User(OWNER.pw_name, OWNER.pw_uid, OWNER.pw_gid, Path("/nonexistent"))
# What every refusal looks like to the program that tried.
REFUSED = {"EPERM", "EACCES"}
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def place():
    """A tsh home, a state directory and others of the VNet user, in one that all may enter."""
    with tempfile.TemporaryDirectory(prefix="vnet-confined-") as name:
        top = Path(name)
        top.chmod(0o755)
        for folder in ("tsh", "state", "mfa", "other"):
            (top / folder).mkdir(mode=0o700)
            (top / folder / "secret").write_text("x")
            for path in (top / folder, top / folder / "secret"):
                os.chown(path, USER.uid, USER.gid)
        (top / "open").write_text("for everyone")
        (top / "open").chmod(0o666)
        yield top


@pytest.fixture
def chosen():
    return identities.choose(["tun", "proxy-0", "proxy-1", "dns", "metrics"], USER)


def of_proxy(place: Path) -> Reach:
    return Reach(
        None,
        (
            FileRule(place / "tsh", READ),
            FileRule(place / "state", KEEP_FILES),
            FileRule(place / "mfa", KEEP_SOCKETS),
        ),
    )


def raw(name: str, *arguments: int) -> None:
    """A system call of libc by its name; -1 raises."""
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)


def close(end: socket.socket) -> str:
    end.close()
    return "made"


def fork() -> str:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return "forked"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def run_thread() -> str:
    ran: list[str] = []
    thread = threading.Thread(target=lambda: ran.append("ran"))
    thread.start()
    thread.join()
    return ran[0]


def refuse_everywhere(place: Path) -> dict:
    """What no worker may do, whatever its role."""
    parent = os.getpid()
    return {
        "run a program": lambda: os.execv("/bin/true", ["true"]),
        "spawn a program": lambda: os.posix_spawn("/bin/true", ["true"], {}),
        "fork": fork,
        "signal the supervisor": lambda: os.kill(parent, signal.SIGTERM),
        "look for the supervisor": lambda: os.kill(parent, 0),
        "signal everyone": lambda: os.kill(-1, signal.SIGTERM),
        "read the supervisor's environment": Path(f"/proc/{parent}/environ").read_bytes,
        "read the supervisor's memory": lambda: os.open(f"/proc/{parent}/mem", os.O_RDONLY),
        "read what everyone may": (place / "open").read_text,
        "write what everyone may": lambda: (place / "open").write_text("!"),
        "read another's secret": (place / "other" / "secret").read_text,
        "list a directory": lambda: names(place / "other"),
        "make a file": lambda: Path("/tmp/vnet-made-by-a-worker").touch(),
        "become another user": lambda: os.setresuid(0, 0, 0),
        "become dumpable": lambda: raw("prctl", 4, 1, 0, 0, 0),
        "live on without the supervisor": lambda: raw("prctl", 1, 0, 0, 0, 0),
        "speak netlink": lambda: close(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)),
        "speak raw IP": lambda: close(socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)),
        "speak raw Ethernet": lambda: close(socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
        "speak vsock": lambda: close(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)),
        "write code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC),
        "make memory executable": lambda: raw("mprotect", 0, 0, mmap.PROT_EXEC),
        "go elsewhere": lambda: os.chdir("/tmp"),
        "have its priority raised": lambda: os.nice(-5),
    }


WORKS_EVERYWHERE = {
    "start a thread": run_thread,
    "draw numbers": lambda: len(os.urandom(32)),
    "make a pipe": lambda: [os.close(end) for end in os.pipe()] and "made",
    "make a pair": lambda: [end.close() for end in socket.socketpair()] and "made",
}


def assert_all_worked(ended: Ended, expected: dict[str, object]) -> None:
    found = {name: ended.outcomes.get(name) for name in expected}
    assert found == {name: str(value) for name, value in expected.items()}


def assert_all_refused(ended: Ended, names) -> None:
    assert {
        name: ended.outcomes.get(name) for name in names if ended.outcomes.get(name) not in REFUSED
    } == {}


def try_it(monkeypatch, chosen, place, slot, reach, refused, works) -> Ended:
    everywhere = refuse_everywhere(place)
    attempts = {**everywhere, **refused, **WORKS_EVERYWHERE, **works}
    ended = run_confined(monkeypatch, slot, chosen.of[slot], reach, attempts)
    assert ended.status == 0, ended.log
    assert_all_refused(ended, [*everywhere, *refused])
    assert_all_worked(
        ended,
        {"start a thread": "ran", "draw numbers": 32, "make a pipe": "made", "make a pair": "made"},
    )
    assert ended.report is not None
    assert ended.report.no_new_privs
    assert ended.report.capabilities == []
    assert ended.report.uid == chosen.of[slot].uid
    return ended


@pytest.mark.parametrize("slot", ["tun", "metrics"])
def test_tun_and_metrics_can_make_no_socket_and_open_no_file(monkeypatch, chosen, place, slot):
    refused = {
        **{
            f"make a socket ({family.name}, {kind.name})": lambda family=family, kind=kind: close(
                socket.socket(family, kind)
            )
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        },
        "open the tsh home": (place / "tsh" / "secret").read_text,
        "open its own program": Path(apply.__file__).read_text,
        "open /dev/null": lambda: os.open(os.devnull, os.O_RDONLY),
        "make memory files": lambda: os.memfd_create("x"),
        "see what there is": (place / "open").stat,
    }
    try_it(monkeypatch, chosen, place, slot, Reach(), refused, {})


def test_dns_can_ask_servers_and_open_no_file(monkeypatch, chosen, place):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        address = server.getsockname()

        def ask() -> str:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
                end.connect(address)
                return str(end.send(b"question"))

        refused = {
            "open the tsh home": (place / "tsh" / "secret").read_text,
            "open the address book": (place / "state" / "secret").read_text,
            "write to /dev/null": lambda: os.open(os.devnull, os.O_WRONLY),
            "take a port": lambda: take_port(socket.SOCK_STREAM),
            "take a datagram port": lambda: take_port(socket.SOCK_DGRAM),
        }
        works = {"ask a server": ask, "spare descriptor": lambda: os.open(os.devnull, 0) > 2}
        ended = try_it(monkeypatch, chosen, place, "dns", Reach(), refused, works)
        assert_all_worked(ended, {"ask a server": 8, "spare descriptor": True})
        assert server.recv(100) == b"question"


def take_port(kind: int, port: int = 0) -> str:
    with socket.socket(socket.AF_INET, kind) as end:
        end.bind(("127.0.0.1", port))
        return "taken"


def use_book(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE t (x)")
        database.execute("INSERT INTO t VALUES (7)")
        return str(database.execute("SELECT x FROM t").fetchone()[0])


def prompt(path: Path) -> str:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(path))
        server.listen()
        client.connect(str(path))
        server.accept()[0].close()
    path.unlink()
    return "answered"


def key_from_memory() -> str:
    descriptor = os.memfd_create("identity", os.MFD_CLOEXEC)
    os.write(descriptor, b"no certificate")
    try:
        ssl.create_default_context().load_cert_chain(f"/proc/self/fd/{descriptor}")
    except ssl.SSLError:
        return "read"  # and found wanting; a file that cannot be opened is an OSError
    return "?"


def test_proxy_reads_its_credentials_and_keeps_its_book_and_nothing_else(
    monkeypatch, chosen, place
):
    (place / "state" / "link").symlink_to(place / "other" / "secret")
    refused = {
        "write to the tsh home": lambda: (place / "tsh" / "secret").write_text("!"),
        "add to the tsh home": (place / "tsh" / "more").touch,
        "remove from the tsh home": (place / "tsh" / "secret").unlink,
        "leave by a link": (place / "state" / "link").read_text,
        "open another's home": lambda: names(Path("/root")),
        "list all homes": lambda: names(Path("/home")),
        "list all processes": lambda: names(Path("/proc")),
        "take a port of its choice": lambda: take_port(socket.SOCK_STREAM, 7077),
        "make a directory": (place / "state" / "folder").mkdir,
        "make a file among the sockets": (place / "mfa" / "file").touch,
        "change the hosts": lambda: os.open("/etc/hosts", os.O_WRONLY),
    }
    works = {
        "take any port": lambda: take_port(socket.SOCK_STREAM),
        "read the login": (place / "tsh" / "secret").read_text,
        "list the logins": lambda: names(place / "tsh"),
        "use the book": lambda: use_book(place / "state" / "book.sqlite"),
        "make a prompt": lambda: prompt(place / "mfa" / "proxy-0.sock"),
        "find a name": lambda: socket.getaddrinfo("localhost", 80)[0][4][1],
        "read the hosts": lambda: "localhost" in Path("/etc/hosts").read_text(),
        "load a key from memory": key_from_memory,
        "trust what the system trusts": lambda: ssl.create_default_context().verify_mode,
        "know its mounts": lambda: "/" in Path("/proc/self/mountinfo").read_text(),
    }
    ended = try_it(monkeypatch, chosen, place, "proxy-0", of_proxy(place), refused, works)
    assert_all_worked(
        ended,
        {
            "take any port": "taken",
            "read the login": "x",
            "list the logins": ["secret"],
            "use the book": 7,
            "make a prompt": "answered",
            "find a name": 80,
            "read the hosts": True,
            "load a key from memory": "read",
            "trust what the system trusts": 2,
            "know its mounts": True,
        },
    )


def test_proxy_cannot_look_into_another_proxy(monkeypatch, chosen, place):
    """They are one user, and one of them may be the attacker's."""
    others = os.fork()
    if others == 0:
        apply.confine("proxy", chosen.of["proxy-1"], of_proxy(place), 100, os.getppid())
        while True:
            signal.pause()
    try:
        ended = run_confined(
            monkeypatch,
            "proxy-0",
            chosen.of["proxy-0"],
            Reach(None, (FileRule(Path("/proc"), READ),)),
            {
                name: Path(f"/proc/{others}/{name}").read_bytes
                for name in ("mem", "environ", "maps", "auxv")
            }
            | {"signal": lambda: os.kill(others, signal.SIGKILL)},
        )
    finally:
        os.kill(others, signal.SIGKILL)
        os.waitpid(others, 0)
    assert_all_refused(ended, ["mem", "environ", "maps", "auxv", "signal"])


@pytest.mark.parametrize("slot", ["tun", "dns", "proxy-0"])
@pytest.mark.parametrize("name", ["ptrace", "unshare", "mount"])
def test_what_no_worker_ever_needs_ends_it(monkeypatch, chosen, slot, name):
    ended = run_confined(
        monkeypatch, slot, chosen.of[slot], Reach(), {name: lambda: raw(name, 0, 0, 0, 0, 0)}
    )
    assert ended.status == -signal.SIGSYS
    assert ended.outcomes == {}


@pytest.mark.parametrize("slot", ["tun", "dns", "proxy-0"])
def test_every_thread_is_confined(monkeypatch, chosen, slot, marker):
    """Those that libraries start later included."""
    seen: list[dict[str, str]] = []

    def look(pid: int) -> None:
        with contextlib.suppress(OSError):
            threads = list(Path(f"/proc/{pid}/task").iterdir())
            if len(threads) >= 4:
                seen[:] = [fields(thread / "status") for thread in threads]
                marker.is_set = False

    def keep_threads() -> str:
        zmq.Context().socket(zmq.REP)  # starts two
        ended = threading.Event()
        for _ in range(2):
            threading.Thread(target=ended.wait, daemon=True).start()
        while marker.is_set:  # until they were looked at
            ended.wait(0.01)
        return str(threading.active_count())

    run_confined(
        monkeypatch, slot, chosen.of[slot], Reach(), {"threads": keep_threads}, meanwhile=look
    )
    assert len(seen) >= 4
    for thread in seen:
        assert thread["Seccomp"] == "2"
        assert thread["NoNewPrivs"] == "1"
        assert thread["Uid"].split() == [str(chosen.of[slot].uid)] * 4
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(thread[name], 16) == 0


def fields(status: Path) -> dict[str, str]:
    lines = status.read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def test_worker_cannot_speak_as_another(monkeypatch, chosen, place, marker):
    """dns, taken over, has its own key of the bus: with it nobody listens to what tun may say."""
    bus = place / "bus"
    bus.mkdir()
    bus.chmod(0o755)
    keys = {slot: make_key_pair() for slot in ("tun", "dns", "proxy-0")}

    def keys_of(slot: str, *peers: str) -> m.BusKeys:
        public, secret = keys[slot]
        return m.BusKeys(public=public, secret=secret, peers={p: keys[p][0] for p in peers})

    settings = common("dns", keys_of("dns", "proxy-0"), str(bus))
    verdict = b"\x82\xa1t\xabDialVerdict\xa7flow_id\x07"
    request_of_tun = m.DialRequest(
        flow_id=1,
        source=b"\x7f\0\0\1",
        source_port=1,
        destination=b"\x64\x40\3\4",
        destination_port=1,
    )

    def speak(
        server: str, public: str, secret: str, message: bytes, *, is_heard: bool = False
    ) -> str:
        with zmq.Context() as context, context.socket(zmq.DEALER) as end:
            end.linger = 0
            end.curve_serverkey = keys[server][0].encode()
            end.curve_publickey, end.curve_secretkey = public.encode(), secret.encode()
            end.connect(f"ipc://{bus / server}")
            end.send(message)
            while is_heard and marker.is_set:  # until that it broke the rules was noted
                if end.poll(10):
                    return "an answer"
            return "an answer" if end.poll(700) else "no answer"

    from ipc import codec

    attempts = {
        "as itself": lambda: speak(
            "proxy-0", *keys["dns"], codec.encode(request_of_tun), is_heard=True
        ),
        "as a stranger": lambda: speak("proxy-0", *make_key_pair(), codec.encode(request_of_tun)),
        "to tun": lambda: speak("tun", *keys["dns"], verdict),
        "take a place on the bus": lambda: prompt(bus / "proxy-1"),
        "remove another's place": (bus / "tun").unlink,
    }
    heard: list[object] = []
    breaches: list[tuple[str, str]] = []

    def note_breach(peer: str, error: Exception) -> None:
        breaches.append((peer, type(error).__name__))
        marker.is_set = False

    async def serve() -> Ended:
        contexts = []
        for slot, peers in (("proxy-0", ("tun", "dns")), ("tun", ("proxy-0",))):
            context = BusContext(bus, slot, keys_of(slot, *peers))
            contexts.append(context)
            context.serve(
                lambda peer, message: heard.append((peer, message)),
                note_breach,
            )
        for path in bus.iterdir():
            path.chmod(0o777)
        ended = await asyncio.to_thread(
            run_confined, monkeypatch, "dns", chosen.of["dns"], Reach(), attempts,
            configuration(settings),
        )  # fmt: skip
        for context in contexts:
            context.close()
        return ended

    ended = asyncio.run(serve())
    assert heard == []
    assert breaches == [("dns", ForbiddenMessageError.__name__)]
    assert set(ended.outcomes.values()) <= {"no answer"} | REFUSED
    assert_all_refused(ended, ["take a place on the bus", "remove another's place"])


# -- what is missing, and what fails --


def test_kernel_without_the_parts_goes_on_and_says_so(monkeypatch, chosen):
    def no_landlock() -> int:
        raise landlock.NoLandlockError("this kernel has no Landlock")

    def no_seccomp() -> None:
        raise seccomp.NoSeccompError("libseccomp is not installed")

    monkeypatch.setattr(landlock, "version", no_landlock)
    monkeypatch.setattr(seccomp, "require", no_seccomp)
    ended = run_confined(monkeypatch, "tun", chosen.of["tun"], Reach(), {"work": lambda: "done"})
    assert ended.status == 0
    assert ended.report is not None
    assert (ended.report.landlock, ended.report.seccomp) == (None, None)
    assert ended.report.missing == ["this kernel has no Landlock", "libseccomp is not installed"]


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_older_landlock_is_used_as_far_as_it_goes(monkeypatch, chosen, place, version):
    monkeypatch.setattr(landlock, "version", lambda: version)
    ended = run_confined(
        monkeypatch,
        "proxy-0",
        chosen.of["proxy-0"],
        of_proxy(place),
        {
            "read the login": (place / "tsh" / "secret").read_text,
            "read another's": (place / "other" / "secret").read_text,
            "use the book": lambda: use_book(place / "state" / "book.sqlite"),
        },
    )
    assert_all_worked(ended, {"read the login": "x", "read another's": "EACCES", "use the book": 7})
    assert ended.report is not None
    assert ended.report.landlock == version
    assert bool(ended.report.missing) == (version < 6)


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ("privileges.give_up", "user and capabilities"),
        ("landlock.restrict", "Landlock"),
        ("seccomp.restrict", "system call filter"),
    ],
)
def test_worker_does_not_start_when_the_kernel_refuses_what_it_has(monkeypatch, chosen, part, step):
    def fail(*_: object) -> None:
        raise OSError(7, "the kernel says no")

    monkeypatch.setattr(f"supervisor.confinement.apply.{part}", fail)
    ended = run_confined(monkeypatch, "dns", chosen.of["dns"], Reach(), {"work": lambda: "done"})
    assert ended.status == 70
    assert ended.outcomes == {}
    assert ended.report is None
    assert ended.log == f"dns cannot be confined: {step}: the kernel says no"


def test_worker_does_not_start_with_a_thread(monkeypatch, chosen):
    monkeypatch.setattr(
        apply.os, "listdir", lambda path: ["1", "2"] if path == "/proc/self/task" else []
    )
    ended = run_confined(monkeypatch, "dns", chosen.of["dns"], Reach(), {"work": lambda: "done"})
    assert ended.status == 70
    assert ended.log.endswith("2 threads run already")


def test_another_machine_has_no_filter_and_says_so(monkeypatch):
    monkeypatch.setattr(seccomp, "MACHINES", ("pdp11",))
    with pytest.raises(seccomp.NoSeccompError, match="no list of system calls"):
        seccomp.require()


def test_without_libseccomp_the_filter_is_missing(monkeypatch):
    monkeypatch.setattr(seccomp, "pyseccomp", None)
    with pytest.raises(seccomp.NoSeccompError, match="libseccomp2"):
        seccomp.require()


@pytest.mark.parametrize("machine", ["X86_64", "AARCH64"])
@pytest.mark.parametrize("slot", ["tun", "dns", "proxy-0", "metrics"])
def test_filter_can_be_built_for_each_machine(machine, slot):
    from pyseccomp import Arch, resolve_syscall

    from ipc.permits import role_of
    from supervisor.confinement.system_calls import call_list

    calls = call_list(role_of(slot), 1)
    names = {call.name for call in calls.allowed}
    known = {name for name in names if resolve_syscall(getattr(Arch, machine), name) >= 0}
    # Older calls that newer machines never had, and nothing else.
    assert names - known <= {
        *("epoll_wait", "poll", "select", "time", "getrlimit", "open", "stat", "lstat", "access"),
        *("readlink", "unlink", "rename", "chmod", "arch_prctl"),
    }
    lists = [names, set(calls.absent), set(calls.lethal)]
    assert len(set.union(*lists)) == sum(map(len, lists))

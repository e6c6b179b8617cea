"""Connections that wait for a second factor, and the ways in which a user gives it."""

import contextlib
import os
import pwd
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare_clusters import cluster_in, upstream_dns
from demo_bed import bare_bed, demo_bed, supervisor_in
from private_bed import AT_ONCE_SECONDS, Bed, as_nobody, read_exactly, wait_until
from second_factors import (
    MFA_AS_USER,
    WITH_KEY,
    fresh_code,
    key_environment,
    mfa,
    program,
    started,
    terminal,
)

from supervisor.exits import ExitStatus

pytestmark = [pytest.mark.root, pytest.mark.e2e]

# A root cluster for each test: each cluster takes a code once.
DEVICES = {
    "lines": '["totp"]',
    "typed": '["totp", "webauthn"]',
    "ports": '["totp"]',
    "many": '["totp"]',
    "wrong": '["totp"]',
    "gone": '["totp"]',
    "declined": '["totp"]',
    "killed": '["totp"]',
    "far": '["totp"]',
    "key": '["webauthn"]',
    "refuses": '["totp"]',
    "nothing": "[]",
}
ROOT = """
[[clusters]]
name = "{name}.test"
proxy_addr = "teleport.{name}.test:3080"
mfa_devices = {devices}
[[clusters.apps]]
name = "page"
uri = "tcp://hello.backend.internal:80"
session_mfa = true
[[clusters.apps]]
name = "ports"
uri = "tcp://ports.backend.internal"
tcp_ports = [{{ port = 8000, end_port = 8010 }}]
session_mfa = true
"""
LEAF = """
[[clusters]]
name = "leaf.test"
leaf_of = "far.test"
[[clusters.apps]]
name = "page"
uri = "tcp://hello.backend.internal:80"
session_mfa = true
"""
CLUSTERS = "".join(ROOT.format(name=name, devices=text) for name, text in DEVICES.items()) + LEAF
# A worker is killed on purpose.
CONFIG = """
[supervisor]
restart_max = 1000
restart_window_seconds = 1
"""
COULD_NOT_CONNECT = 7  # curl's exit status


@pytest.fixture(scope="module")
def module_bed() -> Iterator[Bed]:
    """One demo; each test has a cluster of its own."""
    with demo_bed(CLUSTERS, CONFIG) as bed:
        yield bed


@pytest.fixture
def bed(module_bed) -> Bed:
    module_bed.wait_for_health("healthy")
    return module_bed


def app(cluster: str, name: str = "page") -> str:
    return f"{name}.teleport.{cluster}.test"


def curl(name: str) -> tuple[str, ...]:
    # One address family: refused by one address, curl would ask for another second factor by the next.
    return ("curl", "-4", "-sS", "--max-time", "100", f"http://{name}/")


def prompts(bed: Bed, cluster: str, app: str = "page") -> int:
    """How many prompts there were so far."""
    return bed.log().count(f"app {app} in {cluster}.test waits for a second factor")


def wait_for_prompts(bed: Bed, count: int, cluster: str, app: str = "page") -> None:
    wait_until(lambda: prompts(bed, cluster, app) == count, "a prompt")


def told_port(bed: Bed, name: str, port: int) -> int:
    """What the app says behind a port; it says its own."""
    with bed.connect(name, port, timeout=60) as end:
        return int(read_exactly(end, 5))


def test_a_code_on_standard_input_lets_the_program_go_on(bed):
    with started(bed, *curl(app("lines"))) as waiting:
        wait_for_prompts(bed, 1, "lines")
        assert not waiting.is_over
        status, told = mfa(bed, fresh_code(bed, "lines"))
        assert status == 0, told
        assert "app page in lines.test waits for a second factor of alice" in told
        assert "app page can be used now" in told
        status, page = waiting.result()
        assert status == 0, page
        assert "Hello from VNet" in page
    assert "Hello from VNet" in bed.output(*curl(app("lines")))
    assert prompts(bed, "lines") == 1
    assert mfa(bed) == (0, "no prompt is waiting\n")


def test_a_code_is_typed_in_a_terminal(bed):
    with (
        terminal(bed, "vnet", "mfa", "--watch") as screen,
        started(bed, *curl(app("typed"))) as waiting,
    ):
        screen.expect("waiting for prompts; Ctrl-C ends")
        screen.expect("app page in typed.test waits for a second factor of alice")
        screen.expect("security key, or code (empty: later, n: decline): ")
        screen.type(f"{fresh_code(bed, 'typed')}\n")
        screen.expect("app page can be used now")
        assert "Hello from VNet" in waiting.result()[1]


def test_each_port_of_an_app_asks_once(bed):
    name = app("ports", "ports")
    for number, port in enumerate((8000, 8001), start=1):
        told: list[int] = []
        thread = threading.Thread(
            target=lambda told=told, port=port: told.append(told_port(bed, name, port))
        )
        thread.start()
        wait_for_prompts(bed, number, "ports", "ports")
        assert mfa(bed, fresh_code(bed, "ports"))[0] == 0
        thread.join()
        assert told == [port]
        assert told_port(bed, name, port) == port
        assert prompts(bed, "ports", "ports") == number


def syns(bed: Bed, address: str) -> list[str]:
    """The connections to an address that are not yet accepted."""
    return bed.output("ss", "-Htn", "state", "syn-sent", "dst", address).splitlines()


def test_many_connections_at_once_make_one_prompt(bed):
    address, greetings = bed.resolve(app("many"))[0], []

    def connect() -> None:
        with bed.connect(address, 80, timeout=60) as end:
            end.sendall(b"GET / HTTP/1.0\r\nHost: many\r\n\r\n")
            greetings.append(read_exactly(end, 8))

    threads = [threading.Thread(target=connect) for _ in range(20)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(syns(bed, address)) == 20, "all connections wait")
    wait_for_prompts(bed, 1, "many")
    status, told = mfa(bed, fresh_code(bed, "many"))
    assert (status, told.count("waits for a second factor")) == (0, 1), told
    for thread in threads:
        thread.join()
    assert greetings == [b"HTTP/1.1"] * 20
    assert prompts(bed, "many") == 1


def test_after_a_wrong_code_the_right_one_does(bed):
    with started(bed, *curl(app("wrong"))) as waiting:
        wait_for_prompts(bed, 1, "wrong")
        status, told = mfa(bed, "000000", fresh_code(bed, "wrong"))
        assert status == 0, told
        assert "not taken: wrong.test refused: invalid totp token" in told
        assert "app page can be used now" in told
        assert "Hello from VNet" in waiting.result()[1]


def test_an_answer_after_the_program_has_given_up_serves_the_next_one(bed):
    with started(bed, *curl(app("gone"))):
        wait_for_prompts(bed, 1, "gone")
    status, told = mfa(bed, fresh_code(bed, "gone"))
    assert (status, "app page can be used now" in told) == (0, True), told
    assert "Hello from VNet" in bed.output(*curl(app("gone")))
    assert prompts(bed, "gone") == 1


def test_a_declined_connection_is_refused_and_the_next_one_asks_again(bed):
    for number in (1, 2):
        with started(bed, *curl(app("declined"))) as waiting:
            wait_for_prompts(bed, number, "declined")
            status, told = mfa(bed, "n")
            assert (status, "app page in declined.test: declined" in told) == (0, True), told
            status, told = waiting.result()
            assert status == COULD_NOT_CONNECT, told
    wait_until(
        lambda: (
            "app page in declined.test needs a second factor, and the user declined" in bed.log()
        ),
        "the log says why",
    )


def test_a_killed_proxy_costs_the_answer_not_the_connection(bed):
    name = app("killed")
    owner = bed.owner_of(bed.resolve(name)[0])
    with (
        terminal(bed, "vnet", "mfa", "--watch") as screen,
        started(bed, *curl(name)) as waiting,
    ):
        screen.expect("app page in killed.test waits")
        screen.expect("decline): ")
        pid = bed.worker(owner)["pid"]
        bed.kill(pid)
        screen.expect("app page in killed.test: the proxy has ended")
        bed.wait_for_successor(owner, pid)
        # The connection is asked about again by itself.
        screen.expect("app page in killed.test waits")
        screen.expect("decline): ")
        assert not waiting.is_over
        screen.type(f"{fresh_code(bed, 'killed')}\n")
        screen.expect("app page can be used now")
        assert "Hello from VNet" in waiting.result()[1]


def test_an_app_of_a_leaf_asks_too(bed):
    with started(bed, *curl("page.leaf.test")) as waiting:
        wait_for_prompts(bed, 1, "leaf")
        status, told = mfa(bed, fresh_code(bed, "far"))
        assert (status, "app page in leaf.test waits" in told) == (0, True), told
        assert "Hello from VNet" in waiting.result()[1]


def test_a_security_key_answers(bed):
    with started(bed, *curl(app("key"))) as waiting:
        wait_for_prompts(bed, 1, "key")
        vnet_mfa = program(WITH_KEY, "mfa")
        done = bed.run(*vnet_mfa, env=key_environment("teleport.key.test"))
        told = done.stdout.decode()
        assert done.returncode == 0, (told, done.stderr)
        assert "touch your security key" in told
        assert "app page can be used now" in told
        assert "Hello from VNet" in waiting.result()[1]


def test_answers_the_cluster_never_takes_end_in_a_refusal_that_says_so(bed):
    name = app("refuses")
    with bed.faults("mfa_refused"), started(bed, *curl(name)) as waiting:
        wait_for_prompts(bed, 1, "refuses")
        status, told = mfa(bed, "111111", "222222", "333333")
        assert (status, told.count("a fault refuses every answer")) == (0, 3), told
        status, told = waiting.result()
        assert status == COULD_NOT_CONNECT, told
    reason = "app page: the second factor was refused 3 times"
    wait_until(lambda: reason in bed.log(), "the log says why")
    with started(bed, *curl(name)) as waiting:
        with terminal(bed, "vnet", "mfa") as screen:
            screen.expect("app page in refuses.test waits")
            screen.type(f"{fresh_code(bed, 'refuses')}\n")
            screen.expect("can be used now")
        assert "Hello from VNet" in waiting.result()[1]


@pytest.mark.parametrize(
    ("cluster", "reason"),
    [
        (
            "nothing",
            "and you have none that VNet can ask for: register a security key with tsh mfa",
        ),
    ],
)
def test_a_user_whom_vnet_cannot_ask_is_refused_at_once_and_the_log_says_what_to_do(
    bed, cluster, reason
):
    assert bed.seconds_until_refused(app(cluster), 80) < AT_ONCE_SECONDS
    wait_until(lambda: f"app page needs a second factor, {reason}" in bed.log(), "a log line")
    assert mfa(bed) == (0, "no prompt is waiting\n")
    assert {c["state"] for c in bed.status()["clusters"]} == {"ok"}


# -- with a VNet of their own --

OWN_CLUSTER = """
[[clusters]]
name = "own.test"
proxy_addr = "localhost:3080"
custom_dns_zones = ["own.test"]
mfa_devices = ["totp"]
"""
OWN_APP = """
[[clusters.apps]]
name = "{name}"
uri = "tcp://echo.backend.internal:7"
public_addr = "{name}.own.test"
session_mfa = true
"""
OWN_CONFIG = """
[dns]
upstream = ["127.0.0.54"]
os_integration = "none"
[teleport]
ca_file = "{home}/web-ca.pem"
mfa_seconds = {seconds}
"""
SERVER = "100.64.0.2"
# So long connections wait where nobody answers: enough to type a code on a machine that is busy.
LATE_SECONDS = 8


@pytest.fixture(scope="module")
def own_bed() -> Iterator[Bed]:
    """A private network with a cluster, without VNet."""
    apps = "".join(OWN_APP.format(name=name) for name in ("late", "rights", "desktop"))
    with bare_bed() as bed, upstream_dns(bed):
        home = Path(bed.environment["TELEPORT_HOME"])
        with cluster_in(bed, OWN_CLUSTER + apps, home):
            yield bed


def own_config(home: str | Path, seconds: float) -> str:
    return OWN_CONFIG.format(home=home, seconds=seconds)


def own_address(bed: Bed, name: str) -> str:
    return bed.resolve(f"{name}.own.test", server=SERVER)[0]


@contextlib.contextmanager
def echo_in_background(bed: Bed, address: str) -> Iterator[None]:
    """A connection that waits while the block lasts, and works afterwards."""
    answers = []

    def connect() -> None:
        with bed.connect(address, 7, timeout=60) as end:
            end.sendall(b"hello")
            answers.append(read_exactly(end, 5))

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert answers == [b"hello"]


def test_when_nobody_answers_the_connection_is_refused_in_time_and_the_next_one_asks_again(own_bed):
    bed = own_bed
    config = own_config(bed.environment["TELEPORT_HOME"], LATE_SECONDS)
    with supervisor_in(bed, config=config, name="late"):
        bed.wait_for_health("healthy")
        address = own_address(bed, "late")
        with terminal(bed, "vnet", "mfa", "--watch") as screen:
            screen.expect("waiting for prompts")
            # In time: `connect` waits no longer than 20 s.
            assert bed.seconds_until_refused(address, 7) > LATE_SECONDS - 1
            screen.expect("app late in own.test waits for a second factor of alice, ")
            screen.expect(" s are left")
            # The proxy may have been told of the screen a moment after the connection.
            left = re.findall(r"of alice, (\d+) s are left", screen.text)[-1]
            assert LATE_SECONDS - 3 <= int(left) <= LATE_SECONDS
            screen.expect("app late in own.test: nobody gave the second factor in time")
            wait_until(
                lambda: "nobody gave it in time: run vnet mfa and connect again" in bed.log(),
                "the log says what to do",
            )
            with echo_in_background(bed, address):
                screen.expect("decline): ")
                screen.type(f"{fresh_code(bed, 'own')}\n")
                screen.expect("app late can be used now")


def test_nobody_but_the_vnet_user_and_root_reaches_the_prompts(own_bed):
    bed, user = own_bed, pwd.getpwnam("daemon")
    home = bed.directory / "home-of-daemon"
    shutil.copytree(bed.environment["TELEPORT_HOME"], home)
    for path in (home, *home.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)
    with supervisor_in(
        *(bed, "--user", user.pw_name),
        config=own_config(home, 110),
        name="rights",
        env={"TELEPORT_HOME": str(home)},
    ):
        bed.wait_for_health("healthy")
        directory = bed.run_dir / "mfa"
        sockets = sorted(directory.glob("*.sock"))
        assert [path.name for path in sockets] == ["proxy-0.sock", "proxy-1.sock", "ssh.sock"]
        for path, mode in ((directory, 0o700), *((path, 0o600) for path in directory.iterdir())):
            found = path.stat()
            assert (found.st_mode & 0o7777, found.st_uid) == (mode, user.pw_uid), path
        with socket.socket(socket.AF_UNIX) as end, pytest.raises(PermissionError):
            as_nobody(lambda: end.connect(str(sockets[0])))
        vnet_mfa = program(MFA_AS_USER)
        done = bed.run(*vnet_mfa, env={"AS_USER": "nobody"})
        assert done.returncode == ExitStatus.NOT_PERMITTED, done
        assert b"may not be opened: run as root or as the VNet user" in done.stderr
        assert mfa(bed) == (0, "no prompt is waiting\n")
        with echo_in_background(bed, own_address(bed, "rights")):
            wait_until(lambda: "app rights in own.test waits" in bed.log(), "a prompt")
            code = f"{fresh_code(bed, 'own')}\n".encode()
            done = bed.run(*vnet_mfa, env={"AS_USER": user.pw_name}, stdin=code)
            assert (done.returncode, done.stderr) == (0, b""), done
    assert not directory.exists()


DESKTOP = """
import os, sys
from jeepney import MessageType, message_bus, new_method_return
from jeepney.io.blocking import open_dbus_connection
with open_dbus_connection(os.environ["DBUS_SESSION_BUS_ADDRESS"]) as bus:
    assert bus.send_and_get_reply(message_bus.RequestName("org.freedesktop.Notifications"))
    print("ready", flush=True)
    while True:
        call = bus.receive()
        if call.header.message_type is MessageType.method_call:
            print(call.body[3], "|", call.body[4], flush=True)
            bus.send(new_method_return(call, "u", (1,)))
"""
BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={path}</listen>
<policy context="default"><allow send_destination="*" eavesdrop="true"/>
<allow eavesdrop="true"/><allow own="*"/></policy>
</busconfig>"""


def listens_at(path: Path) -> bool:
    """Whether somebody accepts connections there: a socket has its path before."""
    with socket.socket(socket.AF_UNIX) as end:
        return end.connect_ex(str(path)) == 0


def test_the_desktop_tells_of_a_prompt(own_bed):
    bed = own_bed
    path, shown = bed.directory / "bus", bed.directory / "desktop.log"
    (bed.directory / "bus.conf").write_text(BUS.format(path=path))
    env = {"DBUS_SESSION_BUS_ADDRESS": f"unix:path={path}"}
    with contextlib.ExitStack() as closing:
        arguments = ("dbus-daemon", f"--config-file={bed.directory}/bus.conf", "--nofork")
        closing.enter_context(bed.running(*arguments))
        wait_until(lambda: listens_at(path), "the bus is there")
        closing.enter_context(bed.running(*program(DESKTOP), env=env, log_name="desktop"))
        wait_until(lambda: "ready" in shown.read_text(), "the desktop is there")
        config = own_config(bed.environment["TELEPORT_HOME"], 110)
        closing.enter_context(supervisor_in(bed, config=config, name="desktop-vnet", env=env))
        bed.wait_for_health("healthy")
        with bed.open_socket() as end:
            end.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                end.connect((own_address(bed, "desktop"), 7))
            wait_until(lambda: "|" in shown.read_text(), "a notification")
    assert shown.read_text().splitlines()[1:] == [
        "VNet waits for a second factor | app desktop in own.test: run vnet mfa"
    ]

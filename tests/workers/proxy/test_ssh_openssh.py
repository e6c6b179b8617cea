"""OpenSSH's client and sshd with a session between them: everything that passes through."""

import contextlib
import fcntl
import hashlib
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import termios
import threading
import time

import paramiko
import pytest
from ssh_bed import DEADLINE_SECONDS, NAME, Cluster, Gateway, until
from sshd_server import Sshd, new_key, own_user, private_pem

from workers.proxy.relay import RelayEnd
from workers.proxy.ssh.session import SshSettings

MEGABYTE = os.urandom(1 << 20)


@pytest.fixture(scope="module")
def cluster():
    return Cluster()


@pytest.fixture(scope="module")
def sshd(cluster, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sshd")
    xauth = directory / "xauth"
    xauth.write_text("#!/bin/sh\ncat >/dev/null\n")
    xauth.chmod(0o755)
    options = ["RekeyLimit 1M", f"XAuthLocation {xauth}"]
    users = [cluster.users.line]
    with Sshd(directory, cluster.hosts, user_authority_lines=users, options=options) as server:
        yield server


@pytest.fixture
def gateway(sshd, cluster, tmp_path):
    with Gateway(tmp_path / "gateway", sshd.port, cluster) as gateway:
        yield gateway


def run(command, data=b"", code=0):
    done = subprocess.run(
        command, input=data, capture_output=True, timeout=DEADLINE_SECONDS, check=False
    )
    assert done.returncode == code, done.stderr.decode(errors="replace")
    return done


def read_until(descriptor, wanted):
    seen = b""
    while wanted not in seen:
        assert select.select([descriptor], [], [], DEADLINE_SECONDS)[0], seen
        seen += os.read(descriptor, 4096)
    return seen


@contextlib.contextmanager
def background(command, **options):
    process = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class Echo:
    """Answers each connection with what it sends, in capitals."""

    def __init__(self, path=None):
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.port = self._listener.getsockname()[1]
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    connection.sendall(connection.recv(100).upper())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def connected(port):
    """A connection, as soon as something listens there."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def asked(address, data=b"hello"):
    """The answer of an `Echo`, as soon as something listens there."""
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX

    def try_once():
        with socket.socket(family) as connection, contextlib.suppress(OSError):
            connection.settimeout(DEADLINE_SECONDS)
            connection.connect(address)
            connection.sendall(data)
            return connection.recv(100)
        return b""

    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (answer := try_once()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return answer


def test_a_command_has_its_input_output_errors_and_exit_status(gateway, cluster):
    before = len(cluster.asked)
    done = run([*gateway.ssh(), "cat; echo error >&2; exit 42"], b"input", 42)
    assert (done.stdout, done.stderr) == (b"input", b"error\n")
    assert cluster.asked[before:] == [own_user()]
    assert gateway.identity.looked_up == [NAME]
    outcome = gateway.ended()
    assert (outcome.end, outcome.error) == (RelayEnd.PROGRAM_CLOSED, "")
    assert min(outcome.bytes_up, outcome.bytes_down) > 1000


def test_the_host_certificate_or_the_plain_key_is_what_the_client_wants(gateway):
    plain = f"UserKnownHostsFile={gateway.directory}/known_plain"
    for options in (["-v"], ["-v", "-o", plain, "-o", "HostKeyAlgorithms=ssh-ed25519"]):
        done = run([*gateway.ssh(*options), "true"])
        kind = "-cert-v01@openssh.com" if len(options) == 1 else "\n"
        lines = done.stderr.decode().replace("\r", "")
        assert f"kex: host key algorithm: ssh-ed25519{kind}" in lines
        assert "cipher: aes128-gcm@openssh.com" in lines


def test_a_client_that_trusts_nobody_is_not_deceived(gateway, cluster):
    before = len(cluster.asked)
    stranger = ["-o", "UserKnownHostsFile=/dev/null"]
    done = run([*gateway.ssh(*stranger), "true"], code=255)
    assert b"Host key verification failed" in done.stderr
    assert cluster.asked[before:] == []


@pytest.mark.parametrize(
    "options",
    [
        ["-c", "aes256-gcm@openssh.com"],
        ["-c", "aes128-ctr", "-m", "hmac-sha2-256-etm@openssh.com"],
        ["-c", "aes192-ctr", "-m", "hmac-sha2-512-etm@openssh.com"],
        ["-c", "aes256-ctr", "-m", "hmac-sha2-256"],
        ["-c", "aes256-ctr", "-m", "hmac-sha2-512"],
        ["-o", "KexAlgorithms=ecdh-sha2-nistp256"],
        ["-o", "KexAlgorithms=ecdh-sha2-nistp521"],
        ["-o", "KexAlgorithms=curve25519-sha256"],
        ["-o", "KexAlgorithms=curve25519-sha256@libssh.org"],
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_every_algorithm_that_is_offered_works_with_new_keys_all_the_time(gateway, options):
    data = MEGABYTE * 4
    done = run([*gateway.ssh(*options, "-o", "RekeyLimit=1M"), "cat"], data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize(
    "options",
    [
        ["-c", "chacha20-poly1305@openssh.com"],
        ["-c", "aes128-cbc"],
        ["-c", "aes128-ctr", "-m", "hmac-sha1"],
        ["-o", "KexAlgorithms=diffie-hellman-group14-sha1"],
        ["-o", "HostKeyAlgorithms=ssh-rsa"],
    ],
    ids=lambda options: options[-1],
)
def test_what_is_weak_or_unknown_is_not_agreed_on(gateway, options):
    done = run([*gateway.ssh(*options), "true"], code=255)
    assert b"no matching" in done.stderr
    assert gateway.ended().error.startswith("the program does not agree: ") or (
        gateway.ended().end is RelayEnd.PROGRAM_CLOSED
    )


def test_all_three_may_change_keys_at_any_time_under_load(sshd, cluster, tmp_path):
    settings = SshSettings(rekey_bytes=1 << 20)
    data = MEGABYTE * 48
    with Gateway(tmp_path / "gateway", sshd.port, cluster, settings) as gateway:
        done = run([*gateway.ssh("-v", "-o", "RekeyLimit=1500K"), "cat"], data)
        assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
        assert done.stderr.count(b"SSH2_MSG_NEWKEYS received") > 20
        assert gateway.ended().error == ""


def test_we_change_the_keys_when_time_is_up(sshd, cluster, tmp_path):
    with Gateway(
        tmp_path / "gateway", sshd.port, cluster, SshSettings(rekey_seconds=0.0)
    ) as gateway:
        done = run([*gateway.ssh("-v"), "cat"], b"data")
        assert done.stdout == b"data"
        assert done.stderr.count(b"SSH2_MSG_NEWKEYS received") > 1


def test_either_direction_may_end_first(gateway):
    digest = hashlib.sha256(MEGABYTE).hexdigest().encode()
    assert digest in run([*gateway.ssh(), "sha256sum"], MEGABYTE).stdout
    # And the other one first: a server that has said all it has to say still listens.
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"all")
                connection.shutdown(socket.SHUT_WR)
                seen.append(b"".join(iter(lambda: connection.recv(1 << 16), b"")))

        thread = threading.Thread(target=serve)
        thread.start()
        port, target = free_port(), f"127.0.0.1:{listener.getsockname()[1]}"
        forward = gateway.ssh("-N", "-L", f"{port}:{target}")
        with background(forward, stdout=subprocess.DEVNULL), connected(port) as connection:
            assert connection.recv(10) == b"all"
            assert connection.recv(10) == b""
            connection.sendall(MEGABYTE)
            connection.shutdown(socket.SHUT_WR)
            thread.join(DEADLINE_SECONDS)
    assert seen == [MEGABYTE]


def test_a_terminal_with_its_size_its_changes_and_its_signals(gateway):
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    script = "trap 'stty size' WINCH; stty size; while ! read line; do :; done; echo got $line"
    script += "; trap 'echo interrupted; exit 3' INT; echo ready; while :; do sleep 0.1; done"
    command = [*gateway.ssh("-tt"), f'exec bash -c "{script}"']
    with background(command, stdin=terminal, stdout=terminal, start_new_session=True) as process:
        read_until(control, b"33 77")
        fcntl.ioctl(control, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 88, 0, 0))
        process.send_signal(signal.SIGWINCH)
        os.write(control, b"a line\n")
        seen = read_until(control, b"ready")
        assert b"44 88" in seen
        assert b"got" in seen
        os.write(control, b"\x03")
        read_until(control, b"interrupted")
        assert process.wait(DEADLINE_SECONDS) == 3
    os.close(control)
    os.close(terminal)


def test_a_login_shell(gateway):
    done = run(gateway.ssh("-T"), b"echo shell $((6 * 7))\nexit 5\n", 5)
    assert b"shell 42" in done.stdout


def test_the_environment_that_the_node_accepts(gateway):
    environment = {**os.environ, "VNET_TEST": "one two"}
    done = subprocess.run(
        [*gateway.ssh("-o", "SendEnv=VNET_TEST"), "echo $VNET_TEST"],
        env=environment,
        capture_output=True,
        timeout=DEADLINE_SECONDS,
        check=True,
    )
    assert done.stdout == b"one two\n"


def test_a_command_that_a_signal_ends(gateway):
    done = run([*gateway.ssh("-v"), "kill -TERM $$"], code=255)
    assert b"exit-signal" in done.stderr


def test_agent_forwarding(gateway, tmp_path):
    agent, key = tmp_path / "agent", tmp_path / "key"
    key.touch(0o600)
    key.write_bytes(private_pem(new_key()))
    environment = {**os.environ, "SSH_AUTH_SOCK": str(agent)}
    with background(["ssh-agent", "-D", "-a", str(agent)], stdout=subprocess.DEVNULL):
        until(agent.exists)
        subprocess.run(["ssh-add", "-q", str(key)], env=environment, check=True, timeout=20)
        forwarded = ["-A", "-o", f"IdentityAgent={agent}"]
        listed = run([*gateway.ssh(*forwarded), "ssh-add -L"]).stdout
        own = subprocess.run(
            ["ssh-add", "-L"], env=environment, capture_output=True, timeout=20, check=True
        )
        assert listed == own.stdout
        assert listed.startswith(b"ssh-ed25519 ")


def test_ports_and_sockets_are_forwarded_both_ways(gateway, tmp_path):
    local, remote, dynamic = free_port(), free_port(), free_port()
    near, far = tmp_path / "near", tmp_path / "far"
    with Echo() as echo, Echo(far):
        target = f"127.0.0.1:{echo.port}"
        options = ["-N", "-L", f"{local}:{target}", "-R", f"127.0.0.1:{remote}:{target}"]
        options += ["-D", f"127.0.0.1:{dynamic}", "-L", f"{near}:{far}"]
        with background(gateway.ssh(*options), stdout=subprocess.DEVNULL):
            assert asked(("127.0.0.1", local)) == b"HELLO"
            assert asked(("127.0.0.1", remote)) == b"HELLO"
            assert asked(str(near)) == b"HELLO"
            with socket.create_connection(("127.0.0.1", dynamic), DEADLINE_SECONDS) as connection:
                connection.sendall(b"\5\1\0")
                assert connection.recv(2) == b"\5\0"
                address = socket.inet_aton("127.0.0.1") + struct.pack(">H", echo.port)
                connection.sendall(b"\5\1\0\1" + address)
                assert connection.recv(10)[:2] == b"\5\0"
                connection.sendall(b"socks")
                assert connection.recv(10) == b"SOCKS"
    assert gateway.ended().error == ""


def test_one_connection_carries_many_commands_and_is_asked_for_once(gateway, cluster, tmp_path):
    before = len(cluster.asked)
    shared = ["-S", str(tmp_path / "control")]
    with background(gateway.ssh("-N", "-M", *shared), stdout=subprocess.DEVNULL) as master:
        until((tmp_path / "control").exists)
        for number in range(5):
            done = run([*gateway.ssh(*shared), f"echo {number}; exit {number}"], code=number)
            assert done.stdout == b"%d\n" % number
        run(gateway.ssh(*shared, "-O", "exit"))
        assert master.wait(DEADLINE_SECONDS) in {0, 255}
    assert cluster.asked[before:] == [own_user()]
    assert len(gateway.sessions) == 1
    assert gateway.ended().end is RelayEnd.PROGRAM_CLOSED


def test_files_by_sftp_and_scp(gateway, tmp_path):
    source, there, back = (tmp_path / name for name in ("source", "there", "back"))
    source.write_bytes(MEGABYTE * 8)
    script = f"put {source} {there}\nget {there} {back}\nls {tmp_path}\n"
    done = run(gateway.program("-b", "-", NAME, program="sftp"), script.encode())
    assert b"there" in done.stdout
    assert back.read_bytes() == source.read_bytes()
    back.unlink()
    run(gateway.program("-q", f"{NAME}:{there}", str(back), program="scp"))
    assert back.read_bytes() == source.read_bytes()


def test_keep_alives_are_answered_by_the_other_end(gateway):
    options = ["-vvv", "-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=1"]
    with background(
        [*gateway.ssh(*options), "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        for line in process.stderr:
            if b"receive packet: type 82" in line:  # the node knows no such request, and says so
                break
        process.stdin.close()
        assert process.wait(DEADLINE_SECONDS) == 0


def test_the_node_s_host_keys_are_not_announced_to_the_client(gateway):
    """It would keep them under the name that VNet has for the node."""
    done = run([*gateway.ssh("-vvv", "-o", "UpdateHostKeys=yes"), "true"])
    assert b"hostkeys-00" not in done.stderr


def test_the_node_going_away_is_seen_by_the_client(cluster, tmp_path):
    users = [cluster.users.line]
    with (
        Sshd(tmp_path / "sshd", cluster.hosts, user_authority_lines=users) as server,
        Gateway(tmp_path / "gateway", server.port, cluster) as gateway,
    ):
        with background(
            [*gateway.ssh(), "echo started; kill -9 $PPID"],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
        ) as process:
            assert process.wait(DEADLINE_SECONDS) == 255
            assert b"closed" in process.stderr.read()
        assert gateway.ended().end in {RelayEnd.APP_CLOSED, RelayEnd.APP_RESET}


def test_aborting_resets(gateway):
    with background(
        [*gateway.ssh(), "echo started; cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"started\n"
        gateway.call(gateway.sessions[0].abort)
        assert process.wait(DEADLINE_SECONDS) == 255
    assert gateway.ended().end is RelayEnd.ABORTED


def test_a_client_that_is_killed_leaves_nothing(gateway):
    with background(
        [*gateway.ssh(), "echo started; cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"started\n"
    assert gateway.ended().end in {RelayEnd.PROGRAM_CLOSED, RelayEnd.PROGRAM_RESET}
    assert gateway.call(len, gateway.reactor) == 0


def test_many_connections_at_once(gateway):
    threads = threading.active_count()
    processes = [
        subprocess.Popen([*gateway.ssh(), f"echo {number}"], stdout=subprocess.PIPE)
        for number in range(40)
    ]
    try:
        for number, process in enumerate(processes):
            answer, _ = process.communicate(timeout=100)
            assert (answer, process.returncode) == (b"%d\n" % number, 0)
    finally:
        for process in processes:
            process.kill()
    gateway.ended(40)
    assert gateway.call(len, gateway.reactor) == 0
    assert threading.active_count() < threads + 20


def test_a_channel_that_nobody_reads_stalls_no_other(gateway, tmp_path):
    """Its window is full, at the client; the node may not send more for it."""
    shared = ["-S", str(tmp_path / "control")]
    with background(gateway.ssh("-N", "-M", *shared), stdout=subprocess.DEVNULL):
        until((tmp_path / "control").exists)
        stalled = [*gateway.ssh(*shared), "echo started; exec cat /dev/zero"]
        with background(stalled, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"started\n"
            session = gateway.sessions[0]
            until(lambda: is_steady(lambda: session.bytes_down))
            for _ in range(3):
                assert run([*gateway.ssh(*shared), "sha256sum"], MEGABYTE).returncode == 0
            assert session.bytes_down < 32 << 20
            assert session._local.pending_bytes <= SshSettings().max_pending_bytes
            process.kill()
        run(gateway.ssh(*shared, "-O", "exit"))


def is_steady(figure):
    before = figure()
    time.sleep(0.3)
    return figure() == before


def test_x11_forwarding(gateway, sshd):
    """The node's display is a port; who connects to it reaches the client's."""
    key = paramiko.Ed25519Key.from_private_key_file(str(gateway.directory / "id_vnet"))
    taken = []
    with contextlib.closing(paramiko.Transport(("127.0.0.1", gateway.port))) as transport:
        transport.connect(username=own_user(), pkey=key)
        session = transport.open_session()
        session.request_x11(handler=lambda channel, _: taken.append(channel))
        session.exec_command("echo $DISPLAY; cat")
        display = session.makefile().readline().strip()
        port = 6000 + int(display.rpartition(":")[2].partition(".")[0])
        with socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS) as program:
            # What an X client says first: its byte order, and the cookie that sshd looks at.
            program.sendall(b"l\0\x0b\0\0\0\0\0\0\0\0\0")
            until(lambda: taken)
            assert taken[0].recv(12) == b"l\0\x0b\0\0\0\0\0\0\0\0\0"
            taken[0].sendall(b"answer")
            assert program.recv(10) == b"answer"

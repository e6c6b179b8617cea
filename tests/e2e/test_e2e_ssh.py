"""The stock OpenSSH client, through a whole VNet, to nodes of embedded clusters and to a real sshd."""

import contextlib
import hashlib
import json
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_bed import demo_bed
from far_bed import listens
from private_bed import AT_ONCE_SECONDS, Bed, wait_until
from second_factors import fresh_code, mfa, started
from shared_cluster import CONFIG
from sshd_bed import (
    CLUSTER,
    LEAF_SSHD_PORT,
    LOGIN,
    SSH_FAILED,
    SSHD_PORT,
    UUID,
    WEB_PORT,
    copied_key,
    home,
    ssh,
    ssh_command,
    ssh_config,
    ssh_output,
    sshd_in,
)

pytestmark = [pytest.mark.root, pytest.mark.e2e]

DATA = random.Random(6).randbytes(8 << 20)
WHERE = "echo $SSH_TELEPORT_CLUSTER_NAME"


@pytest.fixture(scope="module")
def module_bed() -> Iterator[Bed]:
    """One demo with two real sshds for all tests here."""
    with (
        demo_bed(CLUSTER, CONFIG) as bed,
        sshd_in(bed, "real.ssh.test", SSHD_PORT),
        sshd_in(bed, "real.leaf.ssh.test", LEAF_SSHD_PORT),
    ):
        yield bed


@pytest.fixture
def bed(module_bed) -> Bed:
    module_bed.wait_for_health("healthy")
    return module_bed


# --- Names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("node1.ssh.test", "ssh.test"),
        ("node1.ssh.test.", "ssh.test"),
        (f"{UUID}.ssh.test", "ssh.test"),
        ("node.with.dots.ssh.test", "ssh.test"),
        # The root has a node `inner.leaf`: the longest cluster name counts.
        ("inner.leaf.ssh.test", "leaf.ssh.test"),
        ("inner.leaf.ssh.test.ssh.test", "leaf.ssh.test"),
        ("deep.far.test", "far.test"),
        ("deep.far.test.ssh.test", "far.test"),
    ],
)
def test_node_is_reached_by_each_of_its_names(bed, name, cluster):
    assert ssh_output(bed, name, WHERE) == f"{cluster}\n"


@pytest.mark.parametrize("name", ["real.ssh.test", "real.leaf.ssh.test"])
def test_real_sshd_is_reached_in_the_root_and_in_a_leaf(bed, name):
    assert ssh_output(bed, name, "echo $SSH_CONNECTION").split()[-1] in {
        str(SSHD_PORT),
        str(LEAF_SSHD_PORT),
    }
    assert ssh_output(bed, name, "id -un") == f"{LOGIN}\n"


def test_other_ports_of_a_node_are_refused_and_the_web_port_is_the_proxys(bed):
    ssh_output(bed, "node1.ssh.test", "true")
    for port in (21, 23, 2222):
        assert bed.seconds_until_refused("node1.ssh.test", port) < AT_ONCE_SECONDS
    # A node of another name, which no connection has decided about yet.
    assert bed.seconds_until_refused("fresh.ssh.test", 80) < AT_ONCE_SECONDS
    bed.connect("fresh.ssh.test", WEB_PORT).close()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("unknown.ssh.test", "no matching hosts"),
        ("twin.ssh.test", "ambiguous"),
        ("nobody.ssh.test", "nobody"),
        ("node1.far.test", "no matching hosts"),
    ],
)
def test_node_that_cannot_be_reached_refuses_the_connection(bed, name, why):
    done = ssh(bed, name, "true")
    assert done.returncode == SSH_FAILED
    assert b"Connection refused" in done.stderr
    wait_until(lambda: any(name in line and why in line for line in bed.log().splitlines()), why)


def test_node_that_is_offline_for_a_while_comes_back(bed):
    assert ssh_output(bed, "deep.far.test", "echo here") == "here\n"
    with bed.faults("node_offline deep"):
        done = ssh(bed, "deep.far.test", "true")
        assert b"Connection refused" in done.stderr
    assert ssh_output(bed, "deep.far.test", "echo here") == "here\n"


def test_app_with_port_22_is_no_node(bed):
    with bed.connect("app22.teleport.ssh.test", 22) as end:
        end.sendall(b"hello")
        assert end.recv(100) == b"hello"


def test_nodes_are_listed(bed):
    listed = json.loads(bed.output("vnet", "ls", "--kind", "node", "--json"))
    found = {row["address"] for row in listed["resources"]}
    assert {"node1.ssh.test", "inner.leaf.ssh.test", "deep.far.test", "real.ssh.test"} <= found
    assert "secret.ssh.test" not in found


# --- Who may log in -------------------------------------------------------------------------


def test_wrong_login_is_told_which(bed):
    for host in ("node1.ssh.test", "real.ssh.test"):
        done = ssh(bed, host, "true", login="mallory")
        assert done.returncode == SSH_FAILED
        name = host.partition(".")[0]
        assert f"VNet: access denied to mallory connecting to {name}".encode() in done.stderr
        assert b"Permission denied" in done.stderr


def test_only_the_key_of_this_vnet_is_let_in(bed):
    keys = copied_key(bed, "vnet_known_hosts")
    other = keys / "other"
    bed.output("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other))
    options = ["-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
    options += ["-o", f"UserKnownHostsFile={keys}/vnet_known_hosts", "-i", str(other)]
    done = bed.run("ssh", "-v", *options, f"{LOGIN}@node1.ssh.test", "true")
    assert done.returncode == SSH_FAILED
    assert b"Permission denied (publickey)" in done.stderr
    assert b"Server accepts key" not in done.stderr


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("expired", "expired"),
        ("not_yet_valid", "not valid"),
        ("wrong_principal", "node1"),
        ("wrong_ca", "authorit"),
        ("user_type", "host"),
        ("plain_key", "certificate"),
    ],
)
def test_node_with_a_wrong_host_certificate_is_not_logged_in_to(bed, kind, why):
    mark = bed.directory / f"logged-in-{kind}"
    with bed.faults(f"host_certificate {kind}"):
        done = ssh(bed, "node1.ssh.test", f"touch {mark}")
    assert done.returncode == SSH_FAILED
    told = [line for line in done.stderr.decode().splitlines() if line.startswith("VNet: ")]
    assert told, done.stderr
    assert why in told[0]
    assert not mark.exists()


def test_host_authority_that_is_rotated_is_trusted_soon(bed):
    def says(host: str, word: str) -> bool:
        return ssh(bed, host, f"echo {word}").stdout == f"{word}\n".encode()

    hosts = ("node1.ssh.test", "inner.leaf.ssh.test")
    with bed.faults("rotate_ca"):
        for host in hosts:
            wait_until(lambda host=host: says(host, "during"), "the new authority is trusted")
    for host in hosts:
        wait_until(lambda host=host: says(host, "after"), "the new authority is trusted alone")


# --- Second factors -------------------------------------------------------------------------


def prompts(bed: Bed, host: str) -> int:
    return sum(
        "waits for a second factor" in line and host in line for line in bed.log().splitlines()
    )


@pytest.mark.parametrize("host", ["mfa1.ssh.test", "mfa2.leaf.ssh.test"])
def test_second_factor_is_asked_for_once_for_each_connection(bed, host):
    name = host.partition(".")[0]
    before = prompts(bed, name)
    control = bed.directory / f"control-{name}"
    options = ("-o", f"ControlPath={control}", "-o", "ControlMaster=yes")
    command = ssh_command(bed, *options, "-l", LOGIN, host, "echo first; cat")
    with started(bed, *command[:-1], "-N") as master:
        wait_until(lambda: prompts(bed, name) == before + 1, "a prompt")
        assert not master.is_over
        status, told = mfa(bed, fresh_code(bed, "ssh.test"))
        assert status == 0, told
        wait_until(control.exists, "the connection is there")
        for number in range(3):
            done = ssh(bed, host, f"echo {number}", options=("-o", f"ControlPath={control}"))
            assert done.stdout == f"{number}\n".encode(), done.stderr
        assert prompts(bed, name) == before + 1
        bed.run(*ssh_command(bed, "-o", f"ControlPath={control}", "-O", "exit", host))
        master.result()


def test_declined_second_factor_is_a_refusal_with_a_banner(bed):
    before = prompts(bed, "mfa1")
    command = ssh_command(bed, "-l", LOGIN, "mfa1.ssh.test", "true")
    with started(bed, *command) as waiting:
        wait_until(lambda: prompts(bed, "mfa1") == before + 1, "a prompt")
        mfa(bed, "n")
        status, told = waiting.result()
    assert status == SSH_FAILED
    assert "VNet: " in told
    assert "Permission denied" in told


def test_who_knows_only_the_public_key_triggers_nothing(bed):
    before = prompts(bed, "mfa1")
    keys = copied_key(bed, "id_vnet.pub", "vnet_known_hosts")
    options = ["-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
    options += ["-o", f"UserKnownHostsFile={keys}/vnet_known_hosts"]
    done = bed.run(
        *("ssh", "-v", *options, "-i", f"{keys}/id_vnet.pub", f"{LOGIN}@mfa1.ssh.test", "true"),
        env={"SSH_AUTH_SOCK": ""},
    )
    assert done.returncode == SSH_FAILED
    # The key is known, and yet nothing has been asked or tried.
    assert b"Server accepts key" in done.stderr
    assert prompts(bed, "mfa1") == before
    assert mfa(bed) == (0, "no prompt is waiting\n")


# --- What passes through --------------------------------------------------------------------


@pytest.fixture(params=["real.ssh.test", "node1.ssh.test"])
def host(request) -> str:
    """Debian's sshd, and the cluster's own server."""
    return str(request.param)


def test_status_output_errors_and_input(bed, host):
    done = ssh(bed, host, "cat; echo wrong >&2; exit 7", stdin=b"given")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"given", b"wrong\n")


def test_megabytes_both_ways_with_half_close(bed, host):
    done = ssh(bed, host, "cat", stdin=DATA)
    assert done.returncode == 0
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(DATA).digest()


def test_rekeying_in_the_middle_of_data(bed):
    options = ("-o", "RekeyLimit=1M")
    done = ssh(bed, "real.ssh.test", "cat", options=options, stdin=DATA)
    assert done.returncode == 0
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(DATA).digest()


def test_terminal_and_its_status(bed, host):
    done = ssh(bed, host, "tty && exit 3", options=["-tt"])
    assert done.returncode == 3
    assert done.stdout.startswith(b"/dev/pts/")


def test_files_by_scp_sftp_and_rsync(bed, host):
    here = bed.directory / f"files-{host}"
    here.mkdir()
    (here / "a").write_bytes(DATA)
    config = ssh_config(bed)
    bed.output("scp", "-q", "-F", config, f"{here}/a", f"{LOGIN}@{host}:{here}/by-scp")
    bed.output("scp", "-q", "-F", config, f"{LOGIN}@{host}:{here}/a", f"{here}/from-scp")
    bed.output("scp", "-q", "-O", "-F", config, f"{here}/a", f"{LOGIN}@{host}:{here}/by-old-scp")
    bed.output(
        *("rsync", "-a", "-e", f"ssh -F {config}", f"{here}/a", f"{LOGIN}@{host}:{here}/by-rsync")
    )
    batch = f"put {here}/a {here}/by-sftp\nget {here}/by-sftp {here}/from-sftp\n"
    bed.output("sftp", "-q", "-b", "-", "-F", config, f"{LOGIN}@{host}", stdin=batch.encode())
    names = ("by-scp", "from-scp", "by-old-scp", "by-rsync", "by-sftp", "from-sftp")
    for name in names:
        assert (here / name).read_bytes() == DATA, name


def test_git_over_ssh(bed, host):
    work = bed.directory / f"git-{host}"
    env = {
        "GIT_SSH_COMMAND": f"ssh -F {ssh_config(bed)} -o BatchMode=yes",
        **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "a"),
        **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "a@b.test"),
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }

    def git(*arguments: str) -> str:
        return bed.output("git", *arguments, env=env)

    git("init", "-q", "--bare", f"{work}.git")
    git("init", "-q", str(work))
    (work / "file").write_bytes(DATA[: 1 << 20])
    git("-C", str(work), "add", "file")
    git("-C", str(work), "commit", "-q", "-m", "first")
    url = f"{LOGIN}@{host}:{work}.git"
    git("-C", str(work), "push", "-q", url, "HEAD:refs/heads/main")
    git("clone", "-q", "-b", "main", url, f"{work}-clone")
    assert (Path(f"{work}-clone") / "file").read_bytes() == DATA[: 1 << 20]


def test_keyscan_sees_the_plain_key_of_this_vnet(bed):
    scanned = bed.output("ssh-keyscan", "-t", "ed25519", "node1.ssh.test").split()
    key = (home(bed) / "vnet_host_key").read_bytes()
    private = bed.directory / "vnet-host-key"
    private.touch(0o600)
    private.write_bytes(key)
    shown = bed.output("ssh-keygen", "-y", "-f", str(private)).split()
    assert scanned[:2] == ["node1.ssh.test", "ssh-ed25519"]
    assert scanned[2] == shown[1]
    certificate = bed.run("ssh-keyscan", "-c", "node1.ssh.test").stdout
    assert b"ssh-ed25519-cert-v01@openssh.com" in certificate


def test_connections_of_a_control_master(bed, host):
    control = bed.directory / f"master-{host}"
    path = ("-o", f"ControlPath={control}")
    master = ssh_command(bed, *path, "-M", "-N", "-l", LOGIN, host)
    with started(bed, *master) as waiting:
        wait_until(control.exists, "the master is there")
        answers: dict[int, bytes] = {}

        def ask(number: int) -> None:
            answers[number] = ssh(bed, host, f"sleep 0.1; echo {number}", options=path).stdout

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {number: f"{number}\n".encode() for number in range(8)}
        bed.output(*ssh_command(bed, *path, "-O", "exit", host))
        waiting.result()


def echo(connection: socket.socket) -> None:
    while data := connection.recv(4096):
        connection.sendall(data)


@contextlib.contextmanager
def forwarding(bed: Bed, host: str, *options: str, port: int) -> Iterator[None]:
    """An ssh that only forwards, once somebody listens on this port of the bed."""
    fails = ("-o", "ExitOnForwardFailure=yes")
    with started(bed, *ssh_command(bed, *fails, *options, "-N", "-l", LOGIN, host)) as client:

        def is_ready() -> bool:
            assert not client.is_over, client.result()
            return listens(bed, "127.0.0.1", port)

        wait_until(is_ready, "the port is forwarded")
        yield
        assert not client.is_over
        client.process.terminate()
    # Whoever forwards it next must not meet this one, nor the sshd that listens for it.
    wait_until(lambda: not listens(bed, "127.0.0.1", port), "nobody listens any more")


@pytest.mark.parametrize(
    ("option", "name"),
    [("-L", "real.ssh.test"), ("-L", "node1.ssh.test"), ("-R", "real.ssh.test")],
)
def test_ports_are_forwarded_both_ways(bed, option, name):
    with (
        bed.listening(7101, echo),
        forwarding(bed, name, option, "127.0.0.1:7102:127.0.0.1:7101", port=7102),
        bed.connect("127.0.0.1", 7102) as end,
    ):
        end.sendall(b"hello")
        assert end.recv(100) == b"hello"
        end.shutdown(socket.SHUT_WR)
        assert end.recv(100) == b""


def test_dynamic_forwarding_is_a_socks_proxy(bed, host):
    with (
        bed.listening(7111, lambda end: end.sendall(b"HTTP/1.0 200 OK\r\n\r\npage")),
        forwarding(bed, host, "-D", "127.0.0.1:7112", port=7112),
    ):
        page = bed.output(
            "curl", "-sS", "--socks5-hostname", "127.0.0.1:7112", "http://127.0.0.1:7111/"
        )
        assert page == "page"


def test_stream_local_forwarding(bed):
    server = bed.directory / "server.sock"
    with bed.open_socket(socket.AF_UNIX) as listener:
        listener.bind(str(server))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            # The probe of `forwarding` comes first.
            with connection, contextlib.suppress(OSError):
                echo(connection)
            connection, _ = listener.accept()
            with connection:
                echo(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            forwarding(bed, "real.ssh.test", "-L", f"127.0.0.1:7121:{server}", port=7121),
            bed.connect("127.0.0.1", 7121) as end,
        ):
            end.sendall(b"hello")
            assert end.recv(100) == b"hello"
        thread.join(20)
        assert not thread.is_alive()


def test_agent_of_the_user_is_forwarded(bed):
    agent, key = bed.directory / "agent.sock", bed.directory / "agent-key"
    bed.output("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "mine", "-f", str(key))
    with started(bed, "ssh-agent", "-D", "-a", str(agent)):
        env = {"SSH_AUTH_SOCK": str(agent)}
        # Its socket is there a moment before it can be reached; without keys the status is 1.
        wait_until(lambda: bed.run("ssh-add", "-l", env=env).returncode == 1, "the agent is there")
        bed.output("ssh-add", "-q", str(key), env=env)
        listed = ssh(bed, "real.ssh.test", "ssh-add -l", options=["-A"], env=env)
        assert b" mine (ED25519)" in listed.stdout, listed.stderr
        assert ssh(bed, "real.ssh.test", "ssh-add -l", env=env).returncode != 0


def test_environment_signals_and_many_commands(bed):
    done = ssh(
        *(bed, "real.ssh.test", "echo $VNET_A $VNET_B"),
        options=["-o", "SendEnv=VNET_A", "-o", "SetEnv=VNET_B=two"],
        env={"VNET_A": "one"},
    )
    assert done.stdout == b"one two\n"
    done = ssh(bed, "real.ssh.test", "kill -TERM $$")
    assert done.returncode == SSH_FAILED  # as OpenSSH says that a signal has ended a program


def test_way_of_vs_code(bed, host):
    """A script on standard input of a plain shell, with a SOCKS port for everything after it."""
    script = b"uname >/dev/null; printf 'ready %s\\n' $((6 * 7)); exit 0\n"
    done = ssh(bed, host, "bash", options=["-T", "-D", "7131"], stdin=script)
    assert (done.returncode, done.stdout) == (0, b"ready 42\n")


def test_included_configuration_is_enough(bed):
    user_home = bed.directory / "user"
    (user_home / ".ssh").mkdir(mode=0o700, parents=True)
    config = user_home / ".ssh" / "config"
    config.write_text("Host *\n  ServerAliveInterval 7\n")
    # OpenSSH takes the home directory of the password file, whatever HOME is.
    entries = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
    for entry in entries:
        if entry[0] == LOGIN:
            entry[5] = str(user_home)
    passwd = bed.directory / "passwd"
    passwd.write_text("".join(":".join(entry) + "\n" for entry in entries))
    steps = (
        f"mount --bind {passwd} /etc/passwd; vnet ssh-config --install; vnet ssh-config --install;"
        f" ssh -o BatchMode=yes {LOGIN}@node1.ssh.test echo here"
    )
    shell = ("unshare", "--mount", "sh", "-ec", steps)
    assert bed.output(*shell, env={"HOME": str(user_home)}).endswith("here\n")
    text = config.read_text()
    assert text.count("Include") == 1
    assert text.index("Include") < text.index("Host *")


def test_twenty_logins_at_once(bed, host):
    results: dict[int, tuple[int, bytes]] = {}

    def log_in(number: int) -> None:
        done = ssh(bed, host, f"echo {number}")
        results[number] = done.returncode, done.stdout

    threads = [threading.Thread(target=log_in, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: (0, f"{number}\n".encode()) for number in range(20)}


def test_nothing_is_left_of_ended_connections(bed):
    def use() -> None:
        ssh_output(bed, "node1.ssh.test", "true")
        ssh(bed, "node1.ssh.test", "true", login="mallory")
        ssh(bed, "unknown.ssh.test", "true")
        with bed.connect("node1.ssh.test", 22) as end:
            end.recv(5)

    def active() -> int:
        return int(bed.status()["connections"]["active"])

    use()  # what is kept for later, such as connections to auth servers, is there afterwards
    wait_until(lambda: active() == 0, "all connections have ended")
    before = bed.open_files("ssh")
    for _ in range(5):
        use()
    wait_until(lambda: active() == 0, "all connections have ended")
    wait_until(lambda: bed.open_files("ssh") <= before, "no descriptor is left")

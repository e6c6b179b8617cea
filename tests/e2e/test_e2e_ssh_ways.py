"""SSH nodes of clusters that are reached and set up in different ways, and other SSH clients."""

import asyncio
import hashlib
import random
import socket
import threading
from collections.abc import Iterator

import asyncssh
import paramiko
import pytest
from cluster_ways import SSH_PORT, WAYS, WEB_PORT
from demo_bed import demo_bed
from private_bed import Bed, wait_until
from second_factors import fresh_code, mfa, started
from shared_cluster import CONFIG
from sshd_bed import (
    LOGIN,
    RECORDED_SSHD_PORT,
    SSH_FAILED,
    home,
    ssh,
    ssh_command,
    ssh_config,
    ssh_output,
    sshd_in,
)

pytestmark = [pytest.mark.root, pytest.mark.e2e]

DATA = random.Random(7).randbytes(4 << 20)
SETTINGS = WAYS | {
    "v16": "home_layout = 16",
    "recording": 'session_recording = "proxy"',
    "old-recording": 'session_recording = "proxy"\nhome_layout = 16',
}
ONE = """
[[clusters]]
name = "{way}.test"
proxy_addr = "teleport.{way}.test:{port}"
logins = ["{login}"]
mfa_devices = ["totp"]
{keys}
nodes = [
  {{ hostname = "node1" }},
  {{ hostname = "mfa1", session_mfa = true }},
  {{ hostname = "real", addr = "127.0.0.1:{sshd}" }},
]
[[clusters]]
name = "leaf-of-{way}.test"
leaf_of = "{way}.test"
logins = ["{login}"]
{leaf_keys}
nodes = [{{ hostname = "node2" }}]
"""


def cluster_file() -> str:
    found = ""
    for way, keys in SETTINGS.items():
        recording = [line for line in keys.splitlines() if line.startswith("session_recording")]
        found += ONE.format(
            way=way,
            port=WEB_PORT,
            login=LOGIN,
            keys=keys,
            leaf_keys="\n".join(recording),
            sshd=RECORDED_SSHD_PORT,
        )
    return found


@pytest.fixture(scope="module")
def module_bed() -> Iterator[Bed]:
    """One demo with a cluster for each way, and a real sshd that all of them call their own."""
    with (
        demo_bed(cluster_file(), CONFIG) as bed,
        sshd_in(bed, "real.recording.test", RECORDED_SSHD_PORT),
    ):
        yield bed


@pytest.fixture
def bed(module_bed) -> Bed:
    module_bed.wait_for_health("healthy")
    return module_bed


@pytest.mark.parametrize("way", SETTINGS)
def test_node_and_node_of_a_leaf_are_reached(bed, way):
    for host in (f"node1.{way}.test", f"node2.leaf-of-{way}.test"):
        assert ssh_output(bed, host, "echo here") == "here\n"


@pytest.mark.parametrize("way", SETTINGS)
def test_data_goes_both_ways_unchanged(bed, way):
    done = ssh(bed, f"node1.{way}.test", "cat; exit 3", stdin=DATA)
    assert done.returncode == 3
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(DATA).digest()


@pytest.mark.parametrize("way", SETTINGS)
def test_second_factor_lets_in(bed, way):
    host = f"mfa1.{way}.test"
    with started(bed, *ssh_command(bed, "-l", LOGIN, host, "echo here")) as waiting:
        # With the word before it: the name of one way may end with that of another.
        prompt = f" in {way}.test waits for a second factor"
        wait_until(lambda: prompt in bed.log(), "a prompt")
        status, told = mfa(bed, fresh_code(bed, f"{way}.test"))
        assert status == 0, told
        assert waiting.result() == (0, "here\n")


def test_node_that_is_unknown_is_refused_on_every_way(bed):
    for way in SETTINGS:
        done = ssh(bed, f"unknown.{way}.test", "true")
        assert done.returncode == SSH_FAILED
        assert b"Connection refused" in done.stderr


def test_recording_proxy_logs_in_to_a_real_sshd_with_the_agent_of_the_session(bed):
    # The proxy ends the session: it is the proxy that shows the name, and the proxy that logs in.
    assert ssh_output(bed, "real.recording.test", "id -un") == f"{LOGIN}\n"
    # The session's agent is for the proxy, not for the node.
    assert ssh_output(bed, "real.recording.test", "echo [$SSH_AUTH_SOCK]") == "[]\n"
    here = bed.directory / "recorded"
    here.mkdir()
    (here / "a").write_bytes(DATA)
    where = f"{LOGIN}@real.recording.test"
    bed.output("scp", "-q", "-F", ssh_config(bed), f"{here}/a", f"{where}:{here}/b")
    assert (here / "b").read_bytes() == DATA


def test_wrong_login_at_a_recording_proxy_is_told(bed):
    done = ssh(bed, "node1.recording.test", "true", login="mallory")
    assert done.returncode == SSH_FAILED
    assert b"VNet: access denied to mallory connecting to node1" in done.stderr


def test_ssh_port_of_the_proxy_is_where_ssh_goes_without_tls_routing(bed):
    assert SSH_PORT != WEB_PORT
    port = f"{SSH_PORT:04X}"
    with started(bed, *ssh_command(bed, "-l", LOGIN, "node1.separate.test", "sleep 20")) as client:

        def is_connected() -> bool:
            rows = bed.output("cat", "/proc/net/tcp").splitlines()[1:]
            remote = [row.split()[2].partition(":")[2] for row in rows if row.split()[3] == "01"]
            return port in remote

        wait_until(is_connected, "a connection to the SSH port")
        client.process.terminate()


def test_default_demo_lets_its_user_in_to_node1():
    with demo_bed() as bed:
        assert ssh_output(bed, "node1.demo.test", "id -un") == f"{LOGIN}\n"


# --- Other clients --------------------------------------------------------------------------


def test_paramiko_with_the_plain_host_key(bed):
    key = paramiko.Ed25519Key(filename=str(home(bed) / "id_vnet"))
    expected = paramiko.Ed25519Key(filename=str(home(bed) / "vnet_host_key"))
    with bed.connect("node1.v16.test", 22) as end:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as OpenSSH for sftp
        client = paramiko.Transport(end)
        try:
            client.start_client(timeout=20)
            assert client.get_remote_server_key().asbytes() == expected.asbytes()
            client.auth_publickey(LOGIN, key)
            channel = client.open_session()
            channel.exec_command("echo here; exit 4")
            assert channel.makefile("rb").read() == b"here\n"
            assert channel.recv_exit_status() == 4
            with paramiko.SFTPClient.from_transport(client) as files:
                with files.open(str(bed.directory / "by-paramiko"), "wb") as file:
                    file.write(DATA)
                assert files.stat(str(bed.directory / "by-paramiko")).st_size == len(DATA)
        finally:
            client.close()
            client.join()
    assert (bed.directory / "by-paramiko").read_bytes() == DATA


def test_asyncssh_with_the_authority_of_this_run(bed):
    async def talk(end) -> None:
        async with asyncssh.connect(
            sock=end,
            host="node1.v16.test",
            username=LOGIN,
            client_keys=[str(home(bed) / "id_vnet")],
            known_hosts=str(home(bed) / "vnet_known_hosts"),
            config=None,
            agent_path=None,
        ) as client:
            done = await client.run("cat; exit 5", input=DATA.hex(), check=False)
            assert (done.exit_status, done.stdout) == (5, DATA.hex())
            async with client.create_process("cat") as process:
                process.stdin.write("a")
                assert await process.stdout.read(1) == "a"
                process.stdin.write_eof()
                assert await process.stdout.read() == ""

    end = bed.connect("node1.v16.test", 22)
    end.settimeout(None)
    asyncio.run(asyncio.wait_for(talk(end), 60))


def test_many_connections_to_many_clusters_at_once(bed):
    answers: dict[tuple[str, int], bytes] = {}

    def ask(way: str, number: int) -> None:
        answers[way, number] = ssh(bed, f"node1.{way}.test", f"echo {number}").stdout

    pairs = [(way, number) for way in SETTINGS for number in range(3)]
    threads = [threading.Thread(target=ask, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {(way, number): f"{number}\n".encode() for way, number in pairs}

"""Plans, dials and logins for SSH against the embedded cluster, by every way to its proxy.

In most tests an SSH client stands where the session of the product would: its bytes go through a
relay. The last ones have the session, and OpenSSH as its client.
"""

import asyncio
import contextlib
import io
import socket
import time
from pathlib import Path

import paramiko
import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    SSHCertificate,
    load_ssh_public_identity,
    load_ssh_public_key,
)
from mfa_fakes import FakePrompter
from relay_bed import until

from demo.cluster.config import Cluster, ClusterFile, Node, check_clusters
from demo.cluster.server import EmbeddedCluster
from demo.cluster.totp import totp_code
from workers.proxy.dial import NodeUnreachableError, dial
from workers.proxy.dial_errors import DialError
from workers.proxy.reactor import Reactor
from workers.proxy.relay import Relay
from workers.proxy.ssh.housekeeping import SshHousekeeping
from workers.proxy.ssh.opening import offer_agent, opener
from workers.proxy.teleport.client import Teleport, default_settings
from workers.proxy.teleport.errors import MfaUnansweredError
from workers.proxy.teleport.ssh_credentials import SshCredentials
from workers.proxy.teleport.targets import ClusterTarget

ROOT, LEAF = "root.demo.test", "leaf.demo.test"
WAYS = {
    "direct": {},
    "upgrade": {"conn_upgrade_required": True},
    "separate": {"tls_routing": False},
    "old home": {"home_layout": 16},
}


def cluster_file(**changes) -> ClusterFile:
    root = Cluster(
        name=ROOT,
        proxy_addr="localhost:0",
        nodes=(
            Node(hostname="node1"),
            Node(hostname="dotted.node"),
            Node(hostname="guarded", session_mfa=True),
            Node(hostname="twin", uuid="00000000-0000-4000-8000-000000000001"),
            Node(hostname="twin", uuid="00000000-0000-4000-8000-000000000002"),
            Node(hostname="gone", addr="127.0.0.1:1"),
        ),
        **changes,
    )
    leaf = Cluster(name=LEAF, leaf_of=ROOT, nodes=(Node(hostname="node2"),))
    return check_clusters(ClusterFile(clusters=(root, leaf)))


class Bed:
    def __init__(self, client: Teleport, reactor: Reactor, home: Path) -> None:
        self.client, self.reactor, self.home = client, reactor, home
        self.outcomes: list = []

    def target(self, host: str, leaf: str = "") -> ClusterTarget:
        return ClusterTarget(
            profile="localhost", root_cluster=ROOT, leaf=leaf, ipv4_range=None, host=host
        )

    async def dial(self, host: str, leaf: str = ""):
        plan = await self.client.ssh_plan(self.target(host, leaf))
        return await dial(plan, 10.0, self.reactor)

    @contextlib.asynccontextmanager
    async def reached(self, upstream):
        """A socket that leads to the host."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            program = socket.create_connection(listener.getsockname())
            local, _ = listener.accept()
        local.setblocking(False)
        relay = Relay(self.reactor, local, upstream, self.outcomes.append)
        relay.start()
        try:
            yield program
        finally:
            program.close()
            relay.abort()

    async def run(self, host: str, command: str, *, leaf: str = "", user: str = "alice") -> bytes:
        upstream = await self.dial(host, leaf)
        try:
            credentials = await self.client.ssh_credentials(self.target(host, leaf), user)
        except BaseException:
            upstream.close()
            raise
        offer_agent(upstream, credentials)
        async with self.reached(upstream) as program:
            return await asyncio.to_thread(run_command, program, credentials, command)


def run_command(program: socket.socket, credentials: SshCredentials, command: str) -> bytes:
    pem = credentials.private_key.private_bytes(
        Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
    ).decode()
    kind = paramiko.RSAKey if b"-rsa-" in credentials.certificate else paramiko.Ed25519Key
    key = kind(file_obj=io.StringIO(pem))
    key.load_certificate(credentials.certificate.decode())
    transport = paramiko.Transport(program)
    transport.set_log_channel("tests.ssh")
    try:
        transport.start_client(timeout=20)
        transport.auth_publickey(credentials.user, key)
        channel = transport.open_session()
        channel.exec_command(command)
        channel.shutdown_write()
        return channel.makefile("rb").read()
    finally:
        transport.close()
        transport.join(20)


def run(home: Path, scenario, *, prompter=None, **changes):
    async def main():
        async with EmbeddedCluster(cluster_file(**changes), home) as cluster:
            client = Teleport(
                home,
                default_settings(ca_file=str(cluster.web_ca_file), prompter=prompter),
                poll_seconds=0.02,
            )
            reactor = Reactor(asyncio.get_running_loop())
            await client.start()
            try:
                await until(lambda: len(client.states()) == 2)
                await until(lambda: all(c.is_configured for c in client.states()))
                return await scenario(Bed(client, reactor, home))
            finally:
                await client.close()
                reactor.close()

    return asyncio.run(main())


@pytest.mark.parametrize("way", WAYS)
def test_a_command_on_a_host_by_every_way(tmp_path, way):
    async def scenario(bed):
        assert await bed.run("node1", "echo from $USER", user="root") == b"from root\n"
        assert await bed.run("dotted.node", "echo dots") == b"dots\n"
        assert await bed.run("node2", "echo leaf", leaf=LEAF) == b"leaf\n"
        twin = "00000000-0000-4000-8000-000000000002"
        assert await bed.run(twin, "echo uuid") == b"uuid\n"

    run(tmp_path, scenario, **WAYS[way])


def test_megabytes_through_a_host(tmp_path):
    size = 8 * 1024 * 1024

    async def scenario(bed):
        output = await bed.run("node1", f"head -c {size} /dev/zero | tee /dev/null")
        assert output == bytes(size)

    run(tmp_path, scenario)


@pytest.mark.parametrize("kind", ["unknown", "offline", "ambiguous", "leaf"])
def test_hosts_that_are_not_reached(tmp_path, kind):
    host = {"unknown": "nobody", "offline": "gone", "ambiguous": "twin", "leaf": "node1"}[kind]

    async def scenario(bed):
        with pytest.raises(DialError) as caught:
            await bed.dial(host, LEAF if kind == "leaf" else "")
        return caught.value

    error = run(tmp_path, scenario)
    assert isinstance(error, NodeUnreachableError)
    assert f"SSH host {host} of cluster {LEAF if kind == 'leaf' else ROOT} at localhost:" in str(
        error
    )


def test_the_certificate_is_for_the_login_and_the_authorities_are_the_clusters(tmp_path):
    async def scenario(bed):
        found = await bed.client.ssh_credentials(bed.target("node2", LEAF), "alice")
        certificate = load_ssh_public_identity(found.certificate)
        assert isinstance(certificate, SSHCertificate)
        assert b"alice" in certificate.valid_principals
        certificate.verify_cert_signature()
        of_root = await bed.client.ssh_credentials(bed.target("node1"), "alice")
        assert set(found.host_authorities).isdisjoint(of_root.host_authorities)
        known = (bed.home / "known_hosts").read_bytes()
        for authority in (*found.host_authorities, *of_root.host_authorities):
            load_ssh_public_key(authority)
            assert authority in known

    run(tmp_path, scenario)


def test_a_rotated_authority_is_trusted_at_once(tmp_path):
    async def scenario(bed):
        before = await bed.client.ssh_credentials(bed.target("node1"), "alice")
        (bed.home / "faults").write_text("rotate_ca")
        found = before
        async with asyncio.timeout(20):
            while found.host_authorities == before.host_authorities:
                await asyncio.sleep(0.05)
                # As if its time had passed.
                bed.client._sessions["localhost"]._ssh._authorities.expire()
                found = await bed.client.ssh_credentials(bed.target("node1"), "alice")
        assert set(found.host_authorities) > set(before.host_authorities)

    run(tmp_path, scenario)


def test_a_second_factor_for_each_connection(tmp_path):
    prompter = CodePrompter(tmp_path)

    async def scenario(bed):
        for _ in range(2):
            assert await bed.run("guarded", "echo in") == b"in\n"
        prompter.error = MfaUnansweredError("declined")
        with pytest.raises(MfaUnansweredError):
            await bed.run("guarded", "echo in")
        assert bed.client._settings.tally.counters == {
            "certificates_ssh_issued": 2,
            "certificates_ssh_failed": 1,
        }

    run(tmp_path, scenario, prompter=prompter)
    assert [q.target for q in prompter.questions] == ["SSH host guarded as alice"] * 3


class CodePrompter(FakePrompter):
    """Answers with a code of the cluster's user, another one each time."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self._home = home

    async def ask(self, question, renew):
        secret = (self._home / "totp-secret").read_text().strip()
        steps = len(self.questions) - 1  # the one before, this one
        self.codes = [totp_code(secret, time.time() + 30 * steps)]
        return await super().ask(question, renew)


def test_a_recording_proxy_logs_in_with_the_agent(tmp_path):
    async def scenario(bed):
        assert await bed.run("node1", "echo recorded") == b"recorded\n"

    run(tmp_path, scenario, session_recording="proxy")


def test_a_login_that_the_host_refuses(tmp_path):
    async def scenario(bed):
        with pytest.raises(paramiko.SSHException):
            await bed.run("node1", "echo in", user="nobody-else")
        await until(lambda: not len(bed.reactor))

    run(tmp_path, scenario)


# -- the session --


async def ssh(bed: Bed, host: str, command: str, leaf: str = "") -> tuple[int, str, str]:
    """(status, output, errors) of OpenSSH's client, whose connection becomes a session."""
    cluster = leaf or ROOT
    files = SshHousekeeping(bed.home, lambda: [ROOT, LEAF])
    await files.start()
    target = bed.target(host, leaf)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        name = f"{host}.{cluster}"
        client = await asyncio.create_subprocess_exec(
            *("ssh", "-F", bed.home / "vnet_ssh_config", "-o", "HostName=127.0.0.1"),
            *("-o", f"HostKeyAlias={name}", "-p", str(listener.getsockname()[1])),
            *("-l", "alice", name, command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        local, _ = await asyncio.get_running_loop().sock_accept(listener)
    session = opener(files.identity)(
        bed.reactor,
        local,
        await bed.dial(host, leaf),
        name=name,
        about={},
        credentials=lambda user: bed.client.ssh_credentials(target, user),
        on_end=bed.outcomes.append,
    )
    session.start()
    output, errors = await client.communicate()
    await until(lambda: bool(bed.outcomes))
    await files.close(remove=True)
    assert client.returncode is not None
    return client.returncode, output.decode(), errors.decode()


@pytest.mark.parametrize("recording", ["node", "proxy"])
@pytest.mark.parametrize("leaf", ["", LEAF])
def test_openssh_through_a_session_whoever_records(tmp_path, recording, leaf):
    async def scenario(bed):
        host = "node2" if leaf else "node1"
        assert await ssh(bed, host, "echo $USER; exit 7", leaf) == (7, "alice\n", "")
        [outcome] = bed.outcomes
        assert not outcome.error
        assert outcome.bytes_up > 0
        assert outcome.bytes_down > 0
        assert not len(bed.reactor)

    run(tmp_path, scenario, session_recording=recording)


def test_openssh_is_told_why_there_is_no_login(tmp_path):
    async def scenario(bed):
        (bed.home / "keys" / "localhost" / "alice").unlink()
        status, _, errors = await ssh(bed, "node1", "true")
        assert status == 255
        assert "VNet: " in errors
        assert "run tsh login --proxy=localhost" in errors
        assert "run tsh login" in bed.outcomes[0].error

    run(tmp_path, scenario)

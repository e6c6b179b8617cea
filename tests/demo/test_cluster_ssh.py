"""The embedded clusters' SSH: the transport service, the small server, certificates, recording."""

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import os
import socket
import threading
import time
from pathlib import Path

import paramiko
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    SSHCertificate,
    SSHCertificateBuilder,
    SSHCertificateType,
    load_ssh_public_identity,
    load_ssh_public_key,
)
from embedded_cluster_client import VERSION, AppPair, SoftwareKey, cert_request, session_challenge
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from proxy_bed import run, set_faults, tunnel, until
from proxy_ssh_client import (
    Frame,
    Request,
    log_in,
    run_command,
    ssh_stream,
    transport,
    user_key,
)

from demo.cluster.authorities import ssh_public_line
from workers.proxy.teleport.pb import auth_grpc, auth_pb2, transport_pb2

Certs = auth_pb2.UserCertsRequest
FILE = """
[[clusters]]
name = "root.test"
proxy_addr = "localhost:0"
{keys}
nodes = [
  {{ hostname = "node1", labels = {{ env = "prod" }} }},
  {{ hostname = "node.with.dots" }},
  {{ hostname = "mfa1", session_mfa = true }},
  {{ hostname = "secret", allowed_roles = ["admin"] }},
  {{ hostname = "twin", uuid = "00000000-0000-4000-8000-000000000001" }},
  {{ hostname = "twin", uuid = "00000000-0000-4000-8000-000000000002" }},
  {{ hostname = "nobody", addr = "127.0.0.1:1" }},
]

[[clusters]]
name = "leaf.test"
leaf_of = "root.test"
nodes = [{{ hostname = "node2" }}]
"""
PLAIN = FILE.format(keys="")


def session(tmp_path, scenario, *, file=PLAIN, target="node1:0", cluster="root.test", **login):
    """Runs `scenario(client)` in a thread, logged in to a node."""

    async def work(home):
        async with transport(home) as stub, ssh_stream(stub, target, cluster) as sock:

            def talk():
                client = log_in(sock, home, **login)
                try:
                    scenario(client)
                finally:
                    client.close()
                    client.join()

            await asyncio.to_thread(talk)
        await until(no_threads_of_ssh)

    run(tmp_path, file, work)


def no_threads_of_ssh():
    names = [thread.name for thread in threading.enumerate()]
    return not any("ssh session" in name or "paramiko" in name for name in names)


# --- Programs -------------------------------------------------------------------------------


def test_command_runs_with_its_input_output_errors_and_status(tmp_path):
    def scenario(client):
        command = "cat; echo wrong >&2; exit 3"
        assert run_command(client, command, b"given") == (3, b"given", b"wrong\n")

    session(tmp_path, scenario)


def test_command_runs_as_the_clusters_own_user_under_the_name_of_the_login(tmp_path):
    def scenario(client):
        status, output, _ = run_command(client, "id -u; echo $USER $HOME")
        uid, rest = output.decode().split("\n", 1)
        assert status == 0
        assert int(uid) == os.getuid()
        assert rest == f"alice {Path.home()}\n"

    session(tmp_path, scenario)


def test_megabytes_pass_unchanged_both_ways(tmp_path):
    sent = os.urandom(3 << 20)

    def scenario(client):
        channel = client.open_session()
        channel.exec_command("cat")
        feeder = threading.Thread(target=lambda: (channel.sendall(sent), channel.shutdown_write()))
        feeder.start()
        received = channel.makefile("rb").read()
        feeder.join()
        assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()

    session(tmp_path, scenario)


def test_many_channels_at_once(tmp_path):
    def scenario(client):
        channels = [client.open_session() for _ in range(20)]
        for number, channel in enumerate(channels):
            channel.exec_command(f"read line; echo {number} $line; exit {number}")
        for channel in reversed(channels):
            channel.sendall(b"x\n")
        for number, channel in enumerate(channels):
            assert channel.makefile("rb").read() == f"{number} x\n".encode()
            assert channel.recv_exit_status() == number

    session(tmp_path, scenario)


def test_shell_has_a_terminal_whose_size_changes(tmp_path):
    def scenario(client):
        channel = client.open_session()
        channel.get_pty("vt220", 90, 33)
        channel.invoke_shell()
        received = b""

        def expect(text):
            nonlocal received
            while text not in received:
                piece = channel.recv(4096)
                assert piece, received
                received += piece

        channel.sendall(b"echo [$TERM]; stty size; tty >/dev/null && echo is''tty\n")
        expect(b"[vt220]")
        expect(b"33 90")
        expect(b"istty")
        channel.resize_pty(70, 20)
        channel.sendall(b"stty size\n")
        expect(b"20 70")
        channel.sendall(b"exit 7\n")
        while channel.recv(4096):
            pass
        assert channel.recv_exit_status() == 7

    session(tmp_path, scenario)


def test_terminal_is_the_controlling_one(tmp_path):
    def scenario(client):
        channel = client.open_session()
        channel.get_pty()
        channel.exec_command("trap 'exit 7' INT; echo rea''dy; while :; do sleep 0.05; done")
        received = b""
        while b"ready" not in received:
            piece = channel.recv(4096)
            assert piece, received
            received += piece
        channel.sendall(b"\x03")  # Ctrl-C
        assert channel.recv_exit_status() == 7

    session(tmp_path, scenario)


def test_only_harmless_variables_are_taken(tmp_path):
    def scenario(client):
        channel = client.open_session()
        channel.set_environment_variable("LC_TEST", "given")
        channel.set_environment_variable("LD_PRELOAD", "given")
        channel.exec_command("echo [$LC_TEST] [$LD_PRELOAD]")
        assert channel.makefile("rb").read() == b"[given] []\n"

    session(tmp_path, scenario)


def test_signal_ends_the_program_and_is_told(tmp_path):
    told = []

    def scenario(client):
        channel = client.open_session()
        channel.exec_command("echo begun; exec sleep 1000")
        assert channel.recv(100) == b"begun\n"
        original = channel._handle_request

        def watch(message):
            told.append(message.get_text())
            message.rewind()
            message.get_int()
            original(message)

        client._channel_handler_table = paramiko.Transport._channel_handler_table | {
            98: lambda _channel, message: watch(message)
        }
        message = paramiko.Message()
        message.add_byte(bytes([98]))
        message.add_int(channel.remote_chanid)
        message.add_string("signal")
        message.add_boolean(False)
        message.add_string("TERM")
        client._send_user_message(message)
        assert channel.recv(100) == b""
        assert told == ["exit-signal"]

    session(tmp_path, scenario)


def test_program_is_hung_up_on_when_the_connection_breaks(tmp_path):
    mark = tmp_path / "hung-up"
    begun = tmp_path / "begun"

    async def work(home):
        async with transport(home) as stub, ssh_stream(stub, "node1:0") as sock:
            client = await asyncio.to_thread(log_in, sock, home)
            channel = await asyncio.to_thread(client.open_session)
            script = f"trap 'touch {mark}; exit' HUP; touch {begun}; while :; do sleep 0.05; done"
            await asyncio.to_thread(channel.exec_command, script)
            await until(begun.exists)
            client.close()
        await until(mark.exists)
        await until(no_threads_of_ssh)

    run(tmp_path, PLAIN, work)


def test_cluster_that_stops_ends_its_programs(tmp_path):
    began = tmp_path / "pid"

    async def work(home):
        async with transport(home) as stub, ssh_stream(stub, "node1:0") as sock:
            client = await asyncio.to_thread(log_in, sock, home)
            channel = await asyncio.to_thread(client.open_session)
            script = f"trap '' HUP; echo $$ > {began}.new; mv {began}.new {began}; while :; do sleep 0.05; done"
            await asyncio.to_thread(channel.exec_command, script)
            await until(began.exists)
            pid = int(began.read_text())
            await home.embedded.stop()
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            client.close()

    run(tmp_path, PLAIN, work)


# --- Files and ports ------------------------------------------------------------------------


def test_files_go_both_ways_by_sftp(tmp_path):
    here = tmp_path / "files"
    here.mkdir()
    content = os.urandom(300_000)

    def scenario(client):
        with paramiko.SFTPClient.from_transport(client) as files:
            with files.open(f"{here}/a", "wb") as file:
                file.write(content)
            files.chmod(f"{here}/a", 0o640)
            files.rename(f"{here}/a", f"{here}/b")
            files.mkdir(f"{here}/d")
            files.symlink("b", f"{here}/link")
            assert sorted(files.listdir(str(here))) == ["b", "d", "link"]
            assert files.readlink(f"{here}/link") == "b"
            assert files.stat(f"{here}/link").st_size == len(content)
            with files.open(f"{here}/link", "rb") as file:
                assert file.read() == content
            files.truncate(f"{here}/b", 10)
            files.utime(f"{here}/b", (1, 2))
            assert files.normalize(f"{here}/d/..") == str(here)
            with pytest.raises(FileNotFoundError):
                files.stat(f"{here}/none")
            with pytest.raises(OSError):
                files.rename(f"{here}/b", f"{here}/d")
            files.rmdir(f"{here}/d")
            files.remove(f"{here}/link")

    session(tmp_path, scenario)
    assert (here / "b").read_bytes() == content[:10]
    assert (here / "b").stat().st_mtime == 2
    assert (here / "b").stat().st_mode & 0o777 == 0o640


def test_ports_are_forwarded_to_what_the_node_can_reach(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                received = b""
                while piece := connection.recv(4096):
                    received += piece
                connection.sendall(received[::-1])

        thread = threading.Thread(target=serve)
        thread.start()

        def scenario(client):
            target = listener.getsockname()
            channel = client.open_channel("direct-tcpip", target, ("127.0.0.1", 1))
            channel.sendall(b"abc")
            channel.shutdown_write()
            assert channel.makefile("rb").read() == b"cba"
            with pytest.raises(paramiko.ChannelException):
                client.open_channel("direct-tcpip", ("127.0.0.1", 1), ("127.0.0.1", 1))

        session(tmp_path, scenario)
        thread.join()


def test_forwarded_connection_ends_with_the_clients(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        async def work(home):
            async with transport(home) as stub, ssh_stream(stub, "node1:0") as sock:
                client = await asyncio.to_thread(log_in, sock, home)
                where = listener.getsockname(), ("127.0.0.1", 1)
                channel = await asyncio.to_thread(client.open_channel, "direct-tcpip", *where)
                connection, _ = listener.accept()
                # The far end keeps its side open whatever the client does.
                channel.shutdown_write()
                client.close()
            with connection:
                connection.settimeout(20)
                assert await asyncio.to_thread(connection.recv, 1) == b""

                def is_closed():
                    with contextlib.suppress(OSError):
                        connection.send(b"x")
                        return False
                    return True

                await until(is_closed)

        run(tmp_path, PLAIN, work)


# --- Which node -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "cluster"),
    [
        ("node1:0", "root.test"),
        ("node1:22", "root.test"),
        ("node1:0", ""),
        ("node.with.dots:0", "root.test"),
        ("00000000-0000-4000-8000-000000000002:0", "root.test"),
        ("node2:0", "leaf.test"),
    ],
)
def test_node_is_found(tmp_path, target, cluster):
    def scenario(client):
        assert run_command(client, "echo here")[1] == b"here\n"

    session(tmp_path, scenario, target=target, cluster=cluster)


async def refusal(home, target, cluster="root.test", **where):
    async with transport(home, **where) as stub:
        request = transport_pb2.TargetHost(host_port=target, cluster=cluster)
        with pytest.raises(GRPCError) as error:
            await stub.ProxySSH([Request(dial_target=request)], metadata=VERSION)
    return error.value.status, error.value.message


def test_refusals_say_why(tmp_path):
    async def scenario(home):
        status, text = await refusal(home, "nowhere:0")
        assert (status, text) == (Status.NOT_FOUND, "no matching hosts for 'nowhere'")
        status, text = await refusal(home, "twin:0")
        assert status is Status.NOT_FOUND
        assert "ambiguous" in text
        assert "UUID" in text
        assert (await refusal(home, "node1:0", "other.test"))[0] is Status.NOT_FOUND
        assert (await refusal(home, "node2:0"))[0] is Status.NOT_FOUND
        # Nobody listens there.
        assert (await refusal(home, "nobody:0"))[0] is Status.UNAVAILABLE

    run(tmp_path, PLAIN, scenario)


@pytest.mark.parametrize(
    ("fault", "target", "cluster"),
    [
        ("node_offline node1", "node1:0", "root.test"),
        ("leaf_offline leaf.test", "node2:0", "leaf.test"),
    ],
)
def test_offline_node_is_unavailable_and_its_connections_end(tmp_path, fault, target, cluster):
    async def scenario(home):
        async with transport(home) as stub, ssh_stream(stub, target, cluster) as sock:
            client = await asyncio.to_thread(log_in, sock, home)
            set_faults(home, fault)
            await until(lambda: not client.is_active())
            status, text = await refusal(home, target, cluster)
            assert status is Status.UNAVAILABLE
            assert "offline" in text
            set_faults(home, "")
        async with transport(home) as stub:

            async def works():
                try:
                    async with ssh_stream(stub, target, cluster):
                        return True
                except (GRPCError, StreamTerminatedError):
                    return False

            while not await works():
                await asyncio.sleep(0.02)

    run(tmp_path, PLAIN, scenario)


def test_node_is_reached_without_tls_routing_and_through_an_upgraded_connection(tmp_path):
    async def talk(home, **where):
        async with transport(home, **where) as stub, ssh_stream(stub, "node1:0") as sock:
            client = await asyncio.to_thread(log_in, sock, home)
            assert (await asyncio.to_thread(run_command, client, "echo here"))[1] == b"here\n"
            client.close()
            await asyncio.to_thread(client.join)

    async def by_the_ssh_port(home):
        port = int(home.profile["ssh_proxy_addr"].rpartition(":")[2])
        await talk(home, address=("127.0.0.1", port))

    run(tmp_path / "1", FILE.format(keys="tls_routing = false"), by_the_ssh_port)

    async def by_upgrade(home):
        async with tunnel(home) as sock:
            await talk(home, address=sock)

    run(tmp_path / "2", FILE.format(keys="conn_upgrade_required = true"), by_upgrade)


# --- Who may log in -------------------------------------------------------------------------


def is_refused(sock, home, user="alice", key=None):
    with pytest.raises(paramiko.AuthenticationException):
        log_in(sock, home, user, key)
    return True


async def certificate_from_cluster(home, *, node="mfa1", cluster="root.test", mfa=False, **changes):
    """The login's key with another certificate, asked for as a client does."""
    bare = paramiko.Ed25519Key(file_obj=io.StringIO((home.keys / "alice").read_text()))
    request = cert_request(home, AppPair(), {}, Usage=Certs.SSH)
    request.ClearField("TLSPublicKey")
    request.RequesterName = Certs.UNSPECIFIED
    request.Purpose = Certs.CERT_PURPOSE_SINGLE_USE_CERTS
    request.SSHPublicKey = (home.keys / "alice.pub").read_bytes()
    request.NodeName, request.SSHLogin, request.RouteToCluster = node, "alice", cluster
    for name, value in changes.items():
        setattr(request, name, value)
    async with home.auth() as channel:
        stub = auth_grpc.AuthServiceStub(channel)
        if mfa:
            challenge = await stub.CreateAuthenticateChallenge(
                session_challenge(), metadata=VERSION
            )
            answer = SoftwareKey(home.path).answer(
                challenge, f"https://localhost:{home.address[1]}"
            )
            request.MFAResponse.CopyFrom(answer)
        certs = await stub.GenerateUserCerts(request, metadata=VERSION)
    assert not certs.TLS
    bare.load_certificate(certs.SSH.decode())
    return bare


def test_login_needs_an_allowed_name_and_a_certificate(tmp_path):
    async def scenario(home):
        bare = paramiko.Ed25519Key(file_obj=io.StringIO((home.keys / "alice").read_text()))
        stranger = paramiko.ECDSAKey.generate()
        async with transport(home) as stub:
            for user, key in (("mallory", None), ("alice", bare), ("alice", stranger)):
                async with ssh_stream(stub, "node1:0") as sock:
                    assert await asyncio.to_thread(is_refused, sock, home, user, key)
            async with ssh_stream(stub, "secret:0") as sock:
                assert await asyncio.to_thread(is_refused, sock, home)

    run(tmp_path, PLAIN, scenario)


def own_certificate(home, authority=None, **changes):
    """The login's key with a certificate that the test signs."""
    state = home.embedded.states["root.test"]
    key = paramiko.Ed25519Key(file_obj=io.StringIO((home.keys / "alice").read_text()))
    fields = {
        "kind": SSHCertificateType.USER,
        "logins": [b"alice"],
        "after": 0,
        "before": 2**63,
        "options": {},
        "roles": ["access"],
    } | changes
    builder = (
        SSHCertificateBuilder()
        .public_key(load_ssh_public_key((home.keys / "alice.pub").read_bytes()))
        .serial(0)
        .type(fields["kind"])
        .key_id(b"alice")
        .valid_principals(fields["logins"])
        .valid_after(fields["after"])
        .valid_before(fields["before"])
        .add_extension(b"teleport-roles", json.dumps({"roles": fields["roles"]}).encode())
    )
    for name, value in fields["options"].items():
        builder = builder.add_critical_option(name, value)
    signer = authority or state.user_ca.ssh
    key.load_certificate(builder.sign(signer).public_bytes().decode())
    return key


def test_certificate_has_to_be_right_in_every_part(tmp_path):
    now = int(time.time())

    async def scenario(home):
        good = [{}, {"options": {b"source-address": b"10.0.0.0/8,127.0.0.0/8"}}]
        bad = [
            {"authority": Ed25519PrivateKey.generate()},
            {"authority": home.embedded.states["root.test"].host_ca.ssh},
            {"kind": SSHCertificateType.HOST},
            {"logins": [b"bob"]},
            {"after": now + 1000},
            {"before": now - 1},
            {"options": {b"source-address": b"10.0.0.0/8"}},
            {"options": {b"force-command": b"true"}},
            {"roles": ["other"]},
        ]
        async with transport(home) as stub:
            for changes in good:
                async with ssh_stream(stub, "node1:0") as sock:
                    key = own_certificate(home, **changes)
                    client = await asyncio.to_thread(log_in, sock, home, "alice", key)
                    client.close()
            for changes in bad:
                async with ssh_stream(stub, "node1:0") as sock:
                    key = own_certificate(home, **changes)
                    assert await asyncio.to_thread(is_refused, sock, home, "alice", key), changes

    run(tmp_path, PLAIN, scenario)


def test_users_of_the_root_log_in_to_nodes_of_a_leaf_but_not_the_other_way_round(tmp_path):
    async def scenario(home):
        of_the_leaf = home.embedded.states["leaf.test"].user_ca.ssh
        key = own_certificate(home, of_the_leaf)
        async with transport(home) as stub:
            for target, cluster in (("node2:0", "leaf.test"), ("node1:0", "root.test")):
                async with ssh_stream(stub, target, cluster) as sock:
                    if cluster == "leaf.test":
                        client = await asyncio.to_thread(log_in, sock, home, "alice", key)
                        client.close()
                    else:
                        assert await asyncio.to_thread(is_refused, sock, home, "alice", key)

    run(tmp_path, PLAIN, scenario)


def test_node_with_session_mfa_takes_only_a_certificate_that_says_so(tmp_path):
    async def scenario(home):
        without = await certificate_from_cluster(home)
        with_mfa = await certificate_from_cluster(home, mfa=True)
        blob = base64.b64encode(with_mfa.public_blob.key_blob)
        shown = load_ssh_public_identity(b"ssh-ed25519-cert-v01@openssh.com " + blob)
        assert shown.valid_before - time.time() < 61
        async with transport(home) as stub:
            for key in (None, without):
                async with ssh_stream(stub, "mfa1:0") as sock:
                    assert await asyncio.to_thread(is_refused, sock, home, "alice", key)
            async with ssh_stream(stub, "mfa1:0") as sock:
                client = await asyncio.to_thread(log_in, sock, home, "alice", with_mfa)
                assert (await asyncio.to_thread(run_command, client, "true"))[0] == 0
                client.close()

    run(tmp_path, PLAIN, scenario)


@pytest.mark.parametrize(
    ("node", "login", "required"),
    [
        ("mfa1", "alice", True),
        ("node1", "alice", False),
        # Who may not log in anyway learns nothing.
        ("mfa1", "mallory", False),
        ("secret", "alice", False),
    ],
)
def test_whether_a_node_needs_mfa_can_be_asked(tmp_path, node, login, required):
    async def scenario(home):
        target = auth_pb2.NodeLogin(Node=node, Login=login)
        async with home.auth() as channel:
            answer = await auth_grpc.AuthServiceStub(channel).IsMFARequired(
                auth_pb2.IsMFARequiredRequest(Node=target), metadata=VERSION
            )
        assert answer.Required is required

    run(tmp_path, PLAIN, scenario)


def test_login_of_a_home_as_it_was_up_to_v16_works_too(tmp_path):
    async def scenario(home):
        pem = home.keys / "alice-x509.pem"
        async with (
            transport(home, certificate=pem, key=home.keys / "alice") as stub,
            ssh_stream(stub, "node1:0") as sock,
        ):
            client = await asyncio.to_thread(log_in, sock, home)
            assert (await asyncio.to_thread(run_command, client, "echo here"))[1] == b"here\n"
            client.close()

    run(tmp_path, FILE.format(keys="home_layout = 16"), scenario)


# --- Host certificates ----------------------------------------------------------------------


async def shown_certificate(home, target="node1:0", cluster="root.test"):
    """What a node shows as its host key."""
    async with transport(home) as stub, ssh_stream(stub, target, cluster) as sock:
        client = await asyncio.to_thread(log_in, sock, home)
        client.close()
    kind = client.host_key_type.encode()
    return load_ssh_public_identity(kind + b" " + base64.b64encode(client.shown))


def signer(certificate):
    return ssh_public_line(certificate.signature_key())


def test_node_shows_a_host_certificate_with_its_names(tmp_path):
    async def scenario(home):
        for target, cluster in (("node1:0", "root.test"), ("node2:0", "leaf.test")):
            host, state = target.partition(":")[0], home.embedded.states[cluster]
            shown = await shown_certificate(home, target, cluster)
            shown.verify_cert_signature()
            assert shown.type is SSHCertificateType.HOST
            uuid = state.find_node(host).uuid
            names = {name.decode() for name in shown.valid_principals}
            assert {f"{uuid}.{cluster}", uuid, f"{host}.{cluster}", host, "localhost"} <= names
            assert signer(shown) == state.host_ca.ssh_public_line()
            known = (home.path / "known_hosts").read_bytes()
            assert any(
                line.startswith(b"@cert-authority ")
                and cluster.encode() in line.split()[1].split(b",")
                and signer(shown) in line
                for line in known.splitlines()
            )

    run(tmp_path, PLAIN, scenario)


@pytest.mark.parametrize(
    ("fault", "is_wrong"),
    [
        ("expired", lambda shown, state: shown.valid_before < time.time() - 3600),
        ("not_yet_valid", lambda shown, state: shown.valid_after > time.time() + 3600),
        ("wrong_principal", lambda shown, state: b"node1" not in shown.valid_principals),
        ("wrong_ca", lambda shown, state: signer(shown) != state.host_ca.ssh_public_line()),
        ("user_type", lambda shown, state: shown.type is SSHCertificateType.USER),
        ("plain_key", lambda shown, state: not isinstance(shown, SSHCertificate)),
    ],
)
def test_fault_makes_the_host_certificate_wrong(tmp_path, fault, is_wrong):
    async def scenario(home):
        state = home.embedded.states["root.test"]
        assert not is_wrong(await shown_certificate(home), state)
        set_faults(home, f"host_certificate {fault}")
        await until(lambda: state.faults.host_certificate == fault)
        assert is_wrong(await shown_certificate(home), state)

    run(tmp_path, PLAIN, scenario)


def test_rotation_of_the_host_authority_reaches_nodes_at_once(tmp_path):
    async def scenario(home):
        state = home.embedded.states["root.test"]
        before = signer(await shown_certificate(home))
        set_faults(home, "rotate_ca")
        await until(lambda: state.faults.rotate_ca)
        assert signer(await shown_certificate(home)) != before

    run(tmp_path, PLAIN, scenario)


def test_files_for_a_real_sshd_are_in_the_home(tmp_path):
    file = PLAIN.replace(
        '{ hostname = "node2" }', '{ hostname = "node2", addr = "127.0.0.1:2222" }'
    )

    async def scenario(home):
        leaf, root = (home.embedded.states[name] for name in ("leaf.test", "root.test"))
        # Only nodes with an address need any.
        assert sorted(path.name for path in (home.path / "nodes").iterdir()) == [
            "nobody.root.test",
            "node2.leaf.test",
        ]
        found = home.path / "nodes" / "node2.leaf.test"
        assert (found / "ssh_host_key").stat().st_mode & 0o777 == 0o600
        key = paramiko.Ed25519Key(filename=str(found / "ssh_host_key"))
        certificate = load_ssh_public_identity((found / "ssh_host_key-cert.pub").read_bytes())
        assert certificate.public_key().public_bytes_raw() == key.verifying_key.encode()
        assert signer(certificate) == leaf.host_ca.ssh_public_line()
        assert (found / "user_ca.pub").read_bytes().splitlines() == [
            leaf.user_ca.ssh_public_line(),
            root.user_ca.ssh_public_line(),
        ]
        set_faults(home, "rotate_ca")

        def is_new():
            line = (found / "ssh_host_key-cert.pub").read_bytes()
            return signer(load_ssh_public_identity(line)) != signer(certificate)

        await until(is_new)
        assert (
            signer(load_ssh_public_identity((found / "ssh_host_key-cert.pub").read_bytes()))
            == leaf.host_ca.ssh_public_line()
        )

    run(tmp_path, file, scenario)


# --- A proxy that records -------------------------------------------------------------------

RECORDING = FILE.format(keys='session_recording = "proxy"')


class Agent:
    """An SSH agent with one certificate; it answers whole questions only."""

    def __init__(self, key):
        self.key = key
        self.asked = []

    def __call__(self, data):
        kind, question = data[4], paramiko.Message(data[5:])
        self.asked.append(kind)
        answer = paramiko.Message()
        if kind == 11:
            answer.add_byte(bytes([12]))
            answer.add_int(1)
            answer.add_string(self.key.public_blob.key_blob)
            answer.add_string("")
        elif kind == 13 and question.get_binary() == self.key.public_blob.key_blob:
            answer.add_byte(bytes([14]))
            answer.add_string(self.key.sign_ssh_data(question.get_binary()).asbytes())
        else:
            answer.add_byte(bytes([5]))
        content = answer.asbytes()
        return len(content).to_bytes(4, "big") + content


def test_recording_proxy_logs_in_to_the_node_with_the_clients_agent(tmp_path):
    sent = os.urandom(1 << 20)

    async def scenario(home):
        agent = Agent(user_key(home))
        async with transport(home) as stub, ssh_stream(stub, "node1:0", agent=agent) as sock:
            client = await asyncio.to_thread(log_in, sock, home)
            done = await asyncio.to_thread(run_command, client, "cat; echo no >&2; exit 5", sent)
            assert done == (5, sent, b"no\n")
            assert agent.asked == [11, 13]
            # It is the proxy that shows the node's name, with a certificate of the cluster's.
            kind = client.host_key_type.encode()
            shown = load_ssh_public_identity(kind + b" " + base64.b64encode(client.shown))
            state = home.embedded.states["root.test"]
            assert signer(shown) == state.host_ca.ssh_public_line()
            assert b"node1" in shown.valid_principals
            # Two further sessions need no further login.
            assert (await asyncio.to_thread(run_command, client, "exit 6"))[0] == 6
            assert agent.asked == [11, 13]
            client.close()
            await asyncio.to_thread(client.join)
        await until(no_threads_of_ssh)

    run(tmp_path, RECORDING, scenario)


def test_recording_proxy_ends_the_connection_of_a_client_without_agent(tmp_path):
    async def scenario(home):
        def refuse(_data):
            return (1).to_bytes(4, "big") + bytes([5])

        async with transport(home) as stub, ssh_stream(stub, "node1:0", agent=refuse) as sock:
            client = await asyncio.to_thread(log_in, sock, home)
            await until(lambda: not client.is_active())
        await until(no_threads_of_ssh)

    run(tmp_path, RECORDING, scenario)


def test_agent_frames_at_a_node_that_records_itself_mean_nothing(tmp_path):
    async def scenario(home):
        async with transport(home) as stub, stub.ProxySSH.open(metadata=VERSION) as stream:
            target = transport_pb2.TargetHost(host_port="node1:0", cluster="root.test")
            await stream.send_message(Request(dial_target=target))
            assert (await stream.recv_message()).HasField("details")
            await stream.send_message(Request(agent=Frame(payload=b"anything")))
            await stream.send_message(Request())
            reply = await stream.recv_message()
            assert reply.ssh.payload.startswith(b"SSH-2.0-Teleport\r\n")
            await stream.cancel()

    run(tmp_path, PLAIN, scenario)

"""Who gets in, and what happens at the node before somebody does: nothing."""

import asyncio
import base64
import logging
import socket
import subprocess
import threading
import time

import asyncssh
import paramiko
import pytest
from cryptography.hazmat.primitives.serialization import SSHCertificateType
from ssh_bed import DEADLINE_SECONDS, FLOW, NODE, Cluster, Gateway, until
from ssh_raw_peers import RawClient, RawNode
from sshd_server import Authority, Sshd, new_key, own_user, public_line

from ipc.connection_id import connection_id
from workers.proxy.relay import RelayEnd
from workers.proxy.ssh.messages import BY_APPLICATION, disconnect, string
from workers.proxy.ssh.session import SshSettings
from workers.proxy.teleport.errors import MfaUnansweredError
from workers.proxy.tls import READ_BYTES

DAY = 24 * 3600
NOW = int(time.time())


@pytest.fixture(scope="module")
def cluster():
    return Cluster()


@pytest.fixture(scope="module")
def sshd(cluster, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sshd")
    note = directory / "note"
    note.write_text("A note from the node.\n")
    users = [cluster.users.line]
    options = ["LogLevel DEBUG1", f"Banner {note}"]
    with Sshd(directory, cluster.hosts, user_authority_lines=users, options=options) as server:
        yield server


def ssh(gateway, *options, code=255):
    done = subprocess.run(
        [*gateway.ssh(*options), "echo in"],
        capture_output=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stderr.decode().replace("\r", "")


def trusted(gateway):
    return paramiko.Ed25519Key.from_private_key_file(str(gateway.directory / "id_vnet"))


def logins(sshd):
    """How many login requests the server has seen."""
    return sshd.log.read_text().count("userauth-request for user")


@pytest.mark.parametrize("authority_kind", ["ed25519", "ecdsa256", "rsa"])
@pytest.mark.parametrize("kind", ["ed25519", "ecdsa256", "ecdsa384", "ecdsa521", "rsa"])
def test_every_kind_of_key_logs_in(kind, authority_kind, tmp_path):
    """The user's key, and the host's; certificates are signed by each kind of authority."""
    cluster = Cluster(kind, authority_kind)
    users = [cluster.users.line]
    host_key = new_key(kind)
    with (
        Sshd(tmp_path / "d", cluster.hosts, user_authority_lines=users, host_key=host_key) as sshd,
        Gateway(tmp_path / "g", sshd.port, cluster) as gateway,
    ):
        ssh(gateway, code=0)
        wanted = {"rsa": "RSA-CERT", "ed25519": "ED25519-CERT"}.get(kind, "ECDSA-CERT")
        assert f"Accepted publickey for {own_user()}" in sshd.log.read_text()
        assert wanted in sshd.log.read_text()


def test_a_note_of_the_node_reaches_the_user(sshd, cluster, tmp_path):
    with Gateway(tmp_path, sshd.port, cluster) as gateway:
        assert "A note from the node." in ssh(gateway, code=0)


def test_a_strange_key_causes_nothing(sshd, cluster, tmp_path):
    asked, seen = len(cluster.asked), logins(sshd)
    with Gateway(tmp_path, sshd.port, cluster) as gateway:
        gateway.config = gateway.config_with("id_other")
        assert "Permission denied (publickey)" in ssh(gateway)
        assert gateway.ended().end is RelayEnd.PROGRAM_CLOSED
    assert (len(cluster.asked), logins(sshd)) == (asked, seen)


def test_knowing_the_public_key_causes_nothing(sshd, cluster, tmp_path):
    asked, seen = len(cluster.asked), logins(sshd)
    with Gateway(tmp_path, sshd.port, cluster) as gateway:
        (tmp_path / "alone.pub").write_bytes((gateway.directory / "id_vnet.pub").read_bytes())
        gateway.config = gateway.config_with("alone.pub")
        errors = ssh(gateway, "-v")
        assert "Server accepts key" in errors  # the probe is answered
        assert "Permission denied (publickey)" in errors
        gateway.ended()
    assert (len(cluster.asked), logins(sshd)) == (asked, seen)


class Pretender:
    """Shows one key and signs with another."""

    def __init__(self, shown, signing):
        self._shown, self._signing = shown, signing
        self.public_blob = None

    def __getattr__(self, name):
        return getattr(self._shown, name)

    def asbytes(self):
        return self._shown.asbytes()

    def sign_ssh_data(self, data, algorithm=None):
        return self._signing.sign_ssh_data(data, algorithm)


def test_a_wrong_signature_causes_nothing(sshd, cluster, tmp_path):
    asked, seen = len(cluster.asked), logins(sshd)
    with Gateway(tmp_path, sshd.port, cluster) as gateway:
        other = paramiko.Ed25519Key.from_private_key_file(str(gateway.directory / "id_other"))
        with RawClient(gateway.port, None) as client:
            for _ in range(3):
                with pytest.raises(paramiko.AuthenticationException):
                    client.transport.auth_publickey("root", Pretender(trusted(gateway), other))
        gateway.ended()
    assert (len(cluster.asked), logins(sshd)) == (asked, seen)


def test_only_keys_get_in(sshd, cluster, tmp_path):
    asked = len(cluster.asked)
    with Gateway(tmp_path, sshd.port, cluster) as gateway:
        with RawClient(gateway.port, None) as client:
            with pytest.raises(paramiko.BadAuthenticationType) as refused:
                client.transport.auth_none("root")
            assert refused.value.allowed_types == ["publickey"]
            for attempt in (
                lambda: client.transport.auth_password("root", "x", fallback=False),
                lambda: client.transport.auth_interactive("root", lambda *_: []),
            ):
                with pytest.raises(paramiko.BadAuthenticationType):
                    attempt()
            # And after all of that the right one.
            client.transport.auth_publickey(own_user(), trusted(gateway))
        assert len(cluster.asked) == asked + 1


def test_attempts_are_limited(sshd, cluster, tmp_path):
    with Gateway(tmp_path, sshd.port, cluster) as gateway:
        with RawClient(gateway.port, None) as client:
            for _ in range(20):
                try:
                    client.transport.auth_publickey("root", paramiko.ECDSAKey.generate())
                except paramiko.AuthenticationException:
                    continue
                except (paramiko.SSHException, EOFError):
                    break
            client.gone()
        outcome = gateway.ended()
    assert outcome.end is RelayEnd.BROKEN
    assert "tried too many keys" in outcome.error


def test_what_the_cluster_answers_is_what_the_user_reads(sshd, cluster, tmp_path):
    seen = logins(sshd)

    async def refuse(_):
        raise MfaUnansweredError("nobody gave the second factor for node1")

    with Gateway(tmp_path, sshd.port, refuse) as gateway:
        errors = ssh(gateway)
        assert "VNet: nobody gave the second factor for node1\n" in errors
        assert "Permission denied (publickey)" in errors
        outcome = gateway.ended()
    assert outcome.end is RelayEnd.BROKEN
    assert outcome.error == "nobody gave the second factor for node1"
    assert logins(sshd) == seen


def test_a_refused_client_that_stays_is_asked_for_nothing_and_sent_away(sshd, cluster, tmp_path):
    asked = []

    async def refuse(user):
        asked.append(user)
        raise MfaUnansweredError("no")

    settings = SshSettings(refused_seconds=2.0)
    with Gateway(tmp_path, sshd.port, refuse, settings) as gateway:
        with RawClient(gateway.port, None) as client:
            for _ in range(3):
                with pytest.raises(paramiko.AuthenticationException):
                    client.transport.auth_publickey("root", trusted(gateway))
            client.gone()
        assert gateway.ended().error == "no"
    assert asked == ["root"]


def test_a_mistake_of_ours_is_an_answer_too(sshd, tmp_path, caplog):
    async def fail(_):
        raise KeyError("secret detail")

    with Gateway(tmp_path, sshd.port, fail) as gateway:
        errors = ssh(gateway)
    assert "VNet: the login could not be done" in errors
    assert "secret" not in errors
    assert "KeyError" in caplog.text


def test_a_certificate_that_is_none_is_an_answer_too(sshd, cluster, tmp_path):
    async def broken(user):
        return cluster.credentials(user, certificate=b"ssh-ed25519-cert-v01@openssh.com !")

    with Gateway(tmp_path, sshd.port, broken) as gateway:
        assert "VNet: the login could not be done" in ssh(gateway)


def test_the_node_refuses(sshd, cluster, tmp_path):
    async def for_somebody_else(user):
        certificate = cluster.users.user_certificate(cluster.key, ["nobody-else"])
        return cluster.credentials(user, certificate=certificate)

    with Gateway(tmp_path, sshd.port, for_somebody_else) as gateway:
        text = f"access denied to {own_user()} connecting to {NODE}"
        assert f"VNet: {text}\n" in ssh(gateway)
        outcome = gateway.ended()
        assert (outcome.end, outcome.error) == (RelayEnd.BROKEN, text)


def test_a_node_that_goes_ends_the_question(cluster, tmp_path):
    """Its login grace time is over, say: what the user gives now would be in vain."""
    events = []

    async def ask(_):
        events.append("asked")
        try:
            await asyncio.Event().wait()
        finally:
            events.append("given up")

    with RawNode(cluster) as node, Gateway(tmp_path, node.port, ask) as gateway:
        with RawClient(gateway.port, None) as client:
            login = threading.Thread(target=client.try_to_log_in, args=("root", trusted(gateway)))
            login.start()
            until(lambda: events == ["asked"])
            node.transport.sock.shutdown(socket.SHUT_WR)
            login.join(DEADLINE_SECONDS)
            assert client.transport.get_banner() == b"VNet: the node closed the connection\n"
        until(lambda: events == ["asked", "given up"])
        assert gateway.ended().error == "the node closed the connection"


def test_what_a_node_says_before_it_is_trusted_is_not_shown(cluster, tmp_path):
    asked, answer = threading.Event(), asyncio.Event()

    async def slowly(user):
        asked.set()
        await answer.wait()
        return cluster.credentials(user)

    with (
        RawNode(cluster) as node,
        Gateway(tmp_path, node.port, slowly) as gateway,
        RawClient(gateway.port, None) as client,
    ):
        login = threading.Thread(target=client.try_to_log_in, args=("root", trusted(gateway)))
        login.start()
        assert asked.wait(DEADLINE_SECONDS)
        heard = node.unimplemented()
        node.send(b"\x35" + string(b"Your password, please") + string(b""), b"\xc0")
        heard.get(timeout=DEADLINE_SECONDS)  # and so the one before has arrived
        gateway.call(answer.set)
        login.join(DEADLINE_SECONDS)
        assert client.transport.is_authenticated()
        assert client.transport.get_banner() is None


def test_a_program_that_does_not_wait_for_its_login_loses_nothing(cluster, tmp_path):
    """What it sends meanwhile waits in the kernel, not here."""
    asked, answer = threading.Event(), asyncio.Event()

    async def slowly(user):
        asked.set()
        await answer.wait()
        return cluster.credentials(user)

    with (
        RawNode(cluster) as node,
        Gateway(tmp_path, node.port, slowly) as gateway,
        RawClient(gateway.port, None) as client,
    ):
        login = threading.Thread(target=client.try_to_log_in, args=("root", trusted(gateway)))
        login.start()
        assert asked.wait(DEADLINE_SECONDS)
        data = b"\x5e" + bytes(4) + string(bytes(30_000))
        sending = threading.Thread(target=client.send, args=[data] * 1000)
        sending.start()
        session, settings = gateway.sessions[0], SshSettings()
        until(lambda: session._local.reader.kept_bytes > settings.max_waiting_bytes)
        until(lambda: not session._local.endpoint._is_reading)
        assert session._local.reader.kept_bytes <= settings.max_waiting_bytes + READ_BYTES
        gateway.call(answer.set)
        assert [node.take() for _ in range(1000)] == [data] * 1000
        for thread in (login, sending):
            thread.join(DEADLINE_SECONDS)


def test_half_a_login_at_the_node_is_none(cluster, tmp_path):
    """It wants another method as well (RFC 4252 section 5.1)."""
    with (
        RawNode(cluster, paramiko.AUTH_PARTIALLY_SUCCESSFUL) as node,
        Gateway(tmp_path, node.port, cluster) as gateway,
    ):
        client = RawClient(gateway.port, None)
        with client, pytest.raises(paramiko.AuthenticationException):
            client.transport.auth_publickey("root", trusted(gateway))
        assert gateway.ended().error == f"access denied to root connecting to {NODE}"


def test_a_login_that_is_asked_for_twice_is_one(cluster, tmp_path):
    asked = len(cluster.asked)
    with (
        RawNode(cluster) as node,
        Gateway(tmp_path, node.port, cluster) as gateway,
        RawClient(gateway.port, None) as client,
    ):
        send = client.transport._send_message

        def send_twice(message):
            for _ in range(2 if message.asbytes()[0] == 50 else 1):
                send(message)

        client.transport._send_message = send_twice
        client.transport.auth_publickey("root", trusted(gateway))
        client.send(b"\x60" + bytes(4))
        assert node.take() == b"\x60" + bytes(4)
    assert len(cluster.asked) == asked + 1


CHANGED = {"user": (b"other", b"ssh-connection"), "service": (b"root", b"ssh-other")}


@pytest.mark.parametrize("case", CHANGED)
def test_a_login_that_changes_on_its_way_is_the_end(case, cluster, tmp_path):
    """RFC 4252 section 5."""
    asked = len(cluster.asked)
    with RawNode(cluster) as node, Gateway(tmp_path, node.port, cluster) as gateway:
        with RawClient(gateway.port, None) as client:
            client.send(b"\x05" + string(b"ssh-userauth"))
            for user, service in ((b"root", b"ssh-connection"), CHANGED[case]):
                client.send(b"\x32" + string(user) + string(service) + string(b"none"))
            client.gone()
        assert "wants what VNet does not have" in gateway.ended().error
    assert len(cluster.asked) == asked


def test_answers_to_questions_that_nobody_asked_are_not_read(cluster, tmp_path):
    """RFC 4256 section 3.4: a message of nine bytes may say that it has four billion of them."""
    with (
        RawNode(cluster) as node,
        Gateway(tmp_path, node.port, cluster) as gateway,
        RawClient(gateway.port, None) as client,
    ):
        heard = client.unimplemented()
        client.send(b"\x3d" + (3).to_bytes(4))
        heard.get(timeout=DEADLINE_SECONDS)
        client.transport.auth_publickey("root", trusted(gateway))


@pytest.mark.parametrize("payload", [b"\x34", b"\x06" + string(b"ssh-userauth")])
def test_a_login_that_is_over_is_not_done_again_for_the_node(payload, cluster, tmp_path):
    with (
        RawNode(cluster) as node,
        Gateway(tmp_path, node.port, cluster) as gateway,
        RawClient(gateway.port, trusted(gateway)) as client,
    ):
        heard = node.unimplemented()
        node.send(payload)
        heard.get(timeout=DEADLINE_SECONDS)
        node.send(b"\x60" + bytes(4))
        assert client.take() == b"\x60" + bytes(4)


def test_log_lines_say_which_connection_they_are_about(cluster, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with RawNode(cluster) as node, Gateway(tmp_path, node.port, cluster) as gateway:
        with RawClient(gateway.port, trusted(gateway)) as client:
            client.send(disconnect(BY_APPLICATION, "I am off"))
        gateway.ended()
    lines = [record for record in caplog.records if record.name.startswith("workers.proxy.ssh")]
    assert any("I am off" in record.getMessage() for record in lines)
    assert {record.connection for record in lines} == {connection_id(FLOW)}


def test_a_program_that_leaves_ends_the_question(sshd, cluster, tmp_path):
    """Ctrl-C while the second factor is asked for."""
    events = []

    async def ask(_):
        events.append("asked")
        try:
            await asyncio.Event().wait()
        finally:
            events.append("given up")

    with Gateway(tmp_path, sshd.port, ask) as gateway:
        process = subprocess.Popen([*gateway.ssh(), "true"], stderr=subprocess.DEVNULL)
        until(lambda: events == ["asked"])
        process.terminate()
        process.wait(DEADLINE_SECONDS)
        until(lambda: events == ["asked", "given up"])
        assert gateway.ended().end is RelayEnd.PROGRAM_CLOSED


def test_the_second_factor_may_take_longer_than_a_login(sshd, cluster, tmp_path):
    async def slowly(user):
        await asyncio.sleep(2.2)
        return cluster.credentials(user)

    settings = SshSettings(login_seconds=2.0, node_seconds=2.0)
    with Gateway(tmp_path, sshd.port, slowly, settings) as gateway:
        client = RawClient(gateway.port, trusted(gateway))
        assert client.transport.is_authenticated()
        client.transport.close()


def certificates(cluster, key):
    """What a node may show, and what the user reads then."""
    hosts = cluster.hosts
    names = [NODE]
    user = hosts.certificate(key, names, SSHCertificateType.USER)
    return {
        "expired": (
            hosts.host_certificate(key, names, valid_before=NOW - DAY),
            "its host certificate has expired",
        ),
        "early": (
            hosts.host_certificate(key, names, valid_after=NOW + DAY),
            "its host certificate is not valid yet; check the clock of this machine",
        ),
        "name": (
            hosts.host_certificate(key, ["node2", "node1.demo.test"]),
            "its host certificate is not for node1",
        ),
        "no names": (hosts.host_certificate(key, []), "its host certificate is not for node1"),
        "authority": (
            Authority.new().host_certificate(key, names),
            "its host certificate is signed by an authority that is not the cluster's",
        ),
        "options": (
            hosts.host_certificate(key, names, critical_options=[(b"force-command", b"x")]),
            "its host certificate has options that VNet does not know",
        ),
        "user": (user, "its certificate is one of a user, not of a host"),
    }


@pytest.mark.parametrize("case", ["expired", "early", "name", "no names", "authority", "options"])
def test_a_node_that_cannot_prove_who_it_is_learns_nothing(case, cluster, tmp_path):
    key = new_key()
    certificate, text = certificates(cluster, key)[case]
    users = [cluster.users.line]
    with (
        Sshd(
            tmp_path / "d",
            None,
            user_authority_lines=users,
            host_key=key,
            host_certificate=certificate,
            options=["LogLevel DEBUG1"],
        ) as sshd,
        Gateway(tmp_path / "g", sshd.port, cluster) as gateway,
    ):
        assert f"VNet: the node cannot be trusted: {text}\n" in ssh(gateway)
        assert gateway.ended().error == f"the node cannot be trusted: {text}"
        assert logins(sshd) == 0


def test_a_node_without_a_certificate_is_not_trusted(cluster, tmp_path):
    asked = len(cluster.asked)
    users = [cluster.users.line]
    with (
        Sshd(tmp_path / "d", None, user_authority_lines=users) as sshd,
        Gateway(tmp_path / "g", sshd.port, cluster) as gateway,
    ):
        assert "VNet: the node cannot be trusted: it shows no host certificate\n" in ssh(gateway)
    assert len(cluster.asked) == asked  # nobody was asked for a second factor in vain


def test_a_node_that_answers_before_it_was_asked_is_not_believed(cluster, tmp_path):
    asked = len(cluster.asked)
    with RawNode(cluster) as node, Gateway(tmp_path, node.port, cluster) as gateway:
        with RawClient(gateway.port, None) as client:
            until(lambda: hasattr(node, "transport") and node.transport.initial_kex_done)
            node.send(b"\x34")
            node.gone()
            with pytest.raises(paramiko.AuthenticationException):
                client.transport.auth_publickey("root", trusted(gateway))
        assert gateway.ended().error == "the node answered a login before there was one"
    assert len(cluster.asked) == asked


def test_paramiko_as_the_client(sshd, cluster, tmp_path):
    with Gateway(tmp_path, sshd.port, cluster) as gateway, paramiko.SSHClient() as client:
        client.set_missing_host_key_policy(paramiko.WarningPolicy())
        client.get_host_keys().add(
            f"[127.0.0.1]:{gateway.port}",
            "ssh-ed25519",
            paramiko.Ed25519Key(data=base64.b64decode(plain(gateway))),
        )
        client.connect(
            "127.0.0.1", gateway.port, own_user(), pkey=trusted(gateway), allow_agent=False
        )
        _, output, errors = client.exec_command("echo out; echo err >&2; exit 3")
        assert output.read() == b"out\n"
        assert errors.read().endswith(b"err\n")  # behind what this server's log level says
        assert output.channel.recv_exit_status() == 3
        with client.open_sftp() as files:
            assert files.stat("/").st_mode


def plain(gateway):
    return public_line(gateway.identity.plain_key).split()[1]


def test_asyncssh_as_the_client_with_a_hundred_channels_and_signals(sshd, cluster, tmp_path):
    async def talk(gateway):
        known = asyncssh.import_known_hosts(
            f"@cert-authority * {gateway.identity.authority.line.decode()}"
        )
        async with asyncssh.connect(
            "127.0.0.1",
            gateway.port,
            host_key_alias="node1.demo.test",
            username=own_user(),
            client_keys=[str(gateway.directory / "id_vnet")],
            known_hosts=known,
            config=None,
            agent_path=None,
        ) as connection:
            answers = await asyncio.gather(
                *(connection.run(f"echo {number}; exit {number % 7}") for number in range(100))
            )
            assert [answer.stdout for answer in answers] == [f"{n}\n" for n in range(100)]
            assert [answer.exit_status for answer in answers] == [n % 7 for n in range(100)]
            process = await connection.create_process("echo ready; read line; kill -TERM $$")
            await process.stdout.readline()
            process.send_signal("USR1")  # sshd does not pass it on in a session of root
            process.stdin.write("go on\n")
            ended = await process.wait()
            assert ended.exit_signal[0] == "TERM"

    before = len(cluster.asked)
    with Gateway(tmp_path, sshd.port, cluster) as gateway:
        asyncio.run(asyncio.wait_for(talk(gateway), 2 * DEADLINE_SECONDS))
    assert "req signal" in sshd.log.read_text()
    assert len(cluster.asked) == before + 1

"""The agent that a recording proxy asks, also by the programs of OpenSSH."""

import base64
import os
import shutil
import socket
import struct
import subprocess
import threading

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from hypothesis import given
from hypothesis import strategies as st
from ssh_keys import HOST_AUTHORITY, KINDS, SSH_KEY, certificate, line

from workers.proxy.ssh.agent import (
    MAX_MESSAGE_BYTES,
    MAX_REQUESTS,
    AgentError,
    SessionAgent,
)
from workers.proxy.teleport.ssh_credentials import SshCredentials

FAILURE = struct.pack(">IB", 1, 5)
LIST = struct.pack(">IB", 1, 11)


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def strings(data: bytes) -> list[bytes]:
    found = []
    while data:
        length = int.from_bytes(data[:4])
        assert len(data) >= 4 + length
        found.append(data[4 : 4 + length])
        data = data[4 + length :]
    return found


def blob(text: bytes) -> bytes:
    return base64.b64decode(text.split()[1])


def credentials(key, user="root") -> SshCredentials:
    made = certificate(key.public_key())
    return SshCredentials(key, made, (line(HOST_AUTHORITY),), "node1", user, "demo.test")


def offering(key=SSH_KEY, user="root") -> tuple[SessionAgent, SshCredentials]:
    agent, offered = SessionAgent(), credentials(key, user)
    agent.offer(offered)
    return agent, offered


def login(
    key: bytes, user=b"root", service=b"ssh-connection", method=b"publickey", flag=1
) -> bytes:
    """What is signed to log in, RFC 4252 section 7."""
    return (
        string(b"session")
        + bytes([50])
        + string(user)
        + string(service)
        + string(method)
        + bytes([flag])
        + string(b"algorithm")
        + string(key)
    )


def sign(key: bytes, data: bytes, flags: int = 0) -> bytes:
    return string(bytes([13]) + string(key) + string(data) + struct.pack(">I", flags))


def test_without_offer_there_is_no_key():
    agent = SessionAgent()
    assert agent(LIST) == struct.pack(">IBI", 5, 12, 0)
    assert agent(sign(b"key", b"data")) == FAILURE


def test_the_certificate_is_listed():
    agent, offered = offering()
    answer = agent(LIST)
    assert answer[4:9] == struct.pack(">BI", 12, 1)
    assert strings(answer[9:])[0] == blob(offered.certificate)


def verify(key, signature: bytes, data: bytes) -> str:
    name, value = strings(signature)
    public = key.public_key()
    match name:
        case b"ssh-ed25519":
            public.verify(value, data)
        case b"rsa-sha2-256":
            public.verify(value, data, padding.PKCS1v15(), SHA256())
        case b"rsa-sha2-512":
            public.verify(value, data, padding.PKCS1v15(), SHA512())
        case _:
            r, s = (int.from_bytes(number, signed=True) for number in strings(value))
            digest = {b"ecdsa-sha2-nistp256": SHA256(), b"ecdsa-sha2-nistp384": SHA384()}[name]
            public.verify(encode_dss_signature(r, s), data, ec.ECDSA(digest))
    return name.decode()


@pytest.mark.parametrize(
    ("kind", "flags", "algorithm"),
    [
        ("ed25519", 0, "ssh-ed25519"),
        ("ecdsa", 0, "ecdsa-sha2-nistp256"),
        ("ecdsa-384", 0, "ecdsa-sha2-nistp384"),
        ("rsa", 2, "rsa-sha2-256"),
        ("rsa", 4, "rsa-sha2-512"),
    ],
)
@pytest.mark.parametrize("is_bare", [False, True])
def test_logins_are_signed(kind, flags, algorithm, is_bare):
    agent, offered = offering(KINDS[kind])
    key = blob(line(KINDS[kind]) if is_bare else offered.certificate)
    data = login(key)
    for _ in range(20):  # numbers of all lengths
        answer = agent(sign(key, data, flags))
        assert answer[4] == 14
        [signature] = strings(answer[5:])
        assert verify(KINDS[kind], signature, data) == algorithm
        with pytest.raises(InvalidSignature):
            verify(KINDS[kind], signature, data + b"x")


def test_a_login_that_is_bound_to_the_host_is_signed():
    agent, offered = offering()
    key = blob(offered.certificate)
    data = login(key, method=b"publickey-hostbound-v00@openssh.com") + string(b"host key")
    assert agent(sign(key, data))[4] == 14


CERTIFICATE = credentials(SSH_KEY)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSHSIG",
        os.urandom(32),
        login(b"another key"),
        login(blob(line(SSH_KEY)), user=b"alice"),
        login(blob(line(SSH_KEY)), service=b"ssh-userauth"),
        login(blob(line(SSH_KEY)), method=b"hostbased"),
        login(blob(line(SSH_KEY)), flag=0),
        login(blob(line(SSH_KEY)))[:-1],
    ],
)
def test_nothing_else_is_signed(data):
    agent, _ = offering()
    assert agent(sign(blob(line(SSH_KEY)), data)) == FAILURE


@pytest.mark.parametrize(
    ("kind", "flags"), [("rsa", 0), ("rsa", 1), ("rsa", 6), ("ed25519", 2), ("ecdsa", 4)]
)
def test_weak_and_unknown_algorithms_are_refused(kind, flags):
    agent, offered = offering(KINDS[kind])
    key = blob(offered.certificate)
    assert agent(sign(key, login(key), flags)) == FAILURE


def test_other_keys_and_other_requests_fail():
    agent, _ = offering()
    assert agent(sign(b"another", login(blob(line(SSH_KEY))))) == FAILURE
    for kind in (0, 1, 9, 17, 18, 19, 20, 22, 25, 27, 255):
        assert agent(string(bytes([kind]) + b"rest")) == FAILURE
    assert agent(string(b"\x0d\0\0\0\xff")) == FAILURE  # cut


@given(st.lists(st.integers(1, 30), max_size=20))
def test_requests_in_any_pieces(cuts):
    agent, offered = offering()
    key = blob(offered.certificate)
    requests = LIST + sign(key, login(key)) + string(b"\xff") + LIST
    expected = agent(requests)
    found, position = b"", 0
    for cut in [*cuts, len(requests)]:
        found += agent(requests[position : position + cut])
        position += cut
    assert found == expected  # Ed25519 signs alike each time
    assert len(strings(found)) == 4


def test_a_proxy_that_asks_without_end_costs_little():
    agent, offered = offering()
    answer = agent(LIST)
    assert agent(LIST * (MAX_REQUESTS - 1)) == answer * (MAX_REQUESTS - 1)
    key = blob(offered.certificate)
    assert agent(LIST * 1000 + sign(key, login(key))) == FAILURE * 1001


@pytest.mark.parametrize("length", [0, MAX_MESSAGE_BYTES + 1, 2**32 - 1])
def test_requests_of_impossible_sizes_end_it(length):
    with pytest.raises(AgentError, match=f"{length} bytes"):
        SessionAgent()(length.to_bytes(4))


@pytest.mark.skipif(not shutil.which("ssh-add"), reason="OpenSSH is not installed")
def test_openssh_reads_the_list_and_its_other_wishes_fail(tmp_path):
    agent, offered = offering()
    path = str(tmp_path / "agent")

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(65536):
                    connection.sendall(agent(data))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            environment = os.environ | {"SSH_AUTH_SOCK": path}
            listed = subprocess.run(
                ["ssh-add", "-L"], env=environment, capture_output=True, check=True, timeout=20
            )
            assert listed.stdout.split()[:2] == offered.certificate.split()[:2]
            removed = subprocess.run(
                ["ssh-add", "-D"], env=environment, capture_output=True, check=False, timeout=20
            )
            assert removed.returncode != 0
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(20)

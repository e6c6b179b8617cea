"""OpenSSH, PuTTY and libraries with the files that VNet writes for them, and a server with VNet's host keys."""

import asyncio
import contextlib
import os
import shlex
import shutil
import sys
from pathlib import Path

import asyncssh
import paramiko
import pytest

from supervisor.cli.putty import write_session
from supervisor.cli.ssh_config import SshPlaces, install_include
from workers.proxy.ssh.housekeeping import SshHousekeeping
from workers.proxy.ssh.identity import LocalIdentity, private_pem

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="no OpenSSH client")
needs_putty = pytest.mark.skipif(shutil.which("plink") is None, reason="no putty-tools")

# Reaches the server while the name stays the one that was asked for.
RELAY = """
import os, select, socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as server:
    ways = {0: server.fileno(), server.fileno(): 1}
    while True:
        for source in select.select(list(ways), [], [])[0]:
            data = os.read(source, 65536)
            if not data:
                sys.exit()
            os.write(ways[source], data)
"""


class Server(asyncssh.SSHServer):
    """Takes the key that the identity trusts; the user's name does not matter."""

    def __init__(
        self, identity: LocalIdentity, connections: list[asyncssh.SSHServerConnection]
    ) -> None:
        self._identity = identity
        self._connections = connections

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connections.append(conn)

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return self._identity.is_trusted(key.public_data)


@contextlib.asynccontextmanager
async def served(identity: LocalIdentity, name: str | None):
    """A port of a server with a certificate for this name, or with the plain host key."""
    keys = identity.host_key_for(name or "")
    key = asyncssh.import_private_key(private_pem(keys.certificate_key))
    certificate = asyncssh.import_certificate(keys.certificate_line)
    plain = asyncssh.import_private_key(private_pem(keys.plain_key))
    connections: list[asyncssh.SSHServerConnection] = []
    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=lambda: Server(identity, connections),
        server_host_keys=[(key, certificate)] if name else [plain],
        process_factory=lambda process: process.exit(7),
    )
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()
        # A client may have gone before the server has heard of it.
        for connection in connections:
            connection.abort()
            await connection.wait_closed()


async def run(*command: str, home: Path) -> tuple[int | None, str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(30):
        output, _ = await process.communicate()
    return process.returncode, output.decode()


async def ssh(places: SshPlaces, port: int, host: str) -> tuple[int | None, str]:
    relay = shlex.join([sys.executable, "-IS", "-c", RELAY.replace("%", "%%"), str(port)])
    return await run(
        "ssh",
        *("-F", str(places.user_config), "-o", "BatchMode=yes", "-o", f"ProxyCommand={relay}"),
        *(f"alice@{host}", "anything"),
        home=places.user_home,
    )


@contextlib.asynccontextmanager
async def kept(home: Path):
    home.mkdir()
    keeping = SshHousekeeping(home, lambda: ["demo.test"])
    await keeping.start()
    try:
        assert keeping.problem == ""
        yield keeping.identity
    finally:
        await keeping.close(remove=True)


NAMES = [".tsh", "with a blank", "it's", 'a"b', "a#b", "$A", "caf\u00e9"]


@needs_ssh
@pytest.mark.parametrize("name", NAMES)
def test_openssh_logs_in_with_the_files_alone(tmp_path, name):
    places = SshPlaces(tmp_path, tmp_path / name)

    async def main():
        async with kept(places.teleport_home) as identity:
            install_include(places)
            for host in ("node1.demo.test", "node1.demo.test."):
                async with served(identity, "node1.demo.test") as port:
                    assert await ssh(places, port, host) == (7, "")
            # As it is for clients that know no certificates.
            async with served(identity, None) as port:
                assert await ssh(places, port, "node1.demo.test") == (7, "")

    asyncio.run(main())


@needs_ssh
@pytest.mark.parametrize("name", ["100%", "%h", "back\\slash", "a*"])
def test_with_a_path_that_cannot_be_included_the_file_still_serves(tmp_path, name):
    home = tmp_path / name

    async def main():
        async with kept(home) as identity, served(identity, "node1.demo.test") as port:
            places = SshPlaces(tmp_path, home)
            (tmp_path / ".ssh").mkdir()
            shutil.copy(places.vnet_config, places.user_config)
            assert await ssh(places, port, "node1.demo.test") == (7, "")

    asyncio.run(main())


@needs_ssh
def test_openssh_refuses_another_host_and_another_run(tmp_path):
    places = SshPlaces(tmp_path, tmp_path / ".tsh")

    async def main():
        async with kept(places.teleport_home) as identity:
            install_include(places)
            async with served(identity, "node2.demo.test") as port:
                status, said = await ssh(places, port, "node1.demo.test")
                assert (status, "Host key verification failed" in said) == (255, True)
            # The same files, but the authority and the plain key of another.
            stranger = LocalIdentity(places.teleport_home)
            for name in ("node1.demo.test", None):
                async with served(stranger, name) as port:
                    status, said = await ssh(places, port, "node1.demo.test")
                    assert (status, "Host key verification failed" in said) == (255, True)

    asyncio.run(main())


@needs_ssh
def test_another_key_is_refused(tmp_path):
    places = SshPlaces(tmp_path, tmp_path / ".tsh")

    async def main():
        async with kept(places.teleport_home) as identity:
            install_include(places)
            async with served(identity, "node1.demo.test") as port:
                other = LocalIdentity(tmp_path)
                (places.teleport_home / "id_vnet.pub").write_bytes(other.plain_line)
                status, said = await ssh(places, port, "node1.demo.test")
                assert (status, "Permission denied (publickey)" in said) == (255, True)

    asyncio.run(main())


@needs_putty
def test_putty_logs_in_with_its_session_and_knows_the_host(tmp_path):
    home = tmp_path / "t s h"

    async def main():
        async with kept(home) as identity:
            write_session(home, tmp_path, {})
            async with served(identity, None) as port:
                command = ["plink", "-batch", "-load", "VNet", "-P", str(port), "alice@127.0.0.1"]
                assert await run(*command, "anything", home=tmp_path) == (7, "")
                # A server with another key is none of ours, and nobody is asked.
                async with served(LocalIdentity(home), None) as stranger:
                    command[5] = str(stranger)
                    status, said = await run(*command, "anything", home=tmp_path)
                    assert (status, "Host key" in said) == (1, True)

    asyncio.run(main())


def test_asyncssh_as_a_client(tmp_path):
    home = tmp_path / "tsh"

    async def main():
        async with kept(home) as identity:
            for name in ("127.0.0.1", None):
                async with (
                    served(identity, name) as port,
                    asyncssh.connect(
                        "127.0.0.1",
                        port,
                        username="alice",
                        client_keys=str(home / "id_vnet"),
                        known_hosts=str(home / "vnet_known_hosts"),
                        config=None,
                    ) as connection,
                ):
                    assert (await connection.run("anything")).exit_status == 7

    asyncio.run(main())


def log_in_with_paramiko(home: Path, port: int) -> int:
    with paramiko.SSHClient() as client:
        host_key = paramiko.Ed25519Key.from_private_key_file(str(home / "vnet_host_key"))
        client.get_host_keys().add(f"[127.0.0.1]:{port}", host_key.get_name(), host_key)
        client.connect(
            "127.0.0.1",
            port,
            "alice",
            key_filename=str(home / "id_vnet"),
            allow_agent=False,
            look_for_keys=False,
        )
        _, output, _ = client.exec_command("anything")
        return output.channel.recv_exit_status()


def test_paramiko_as_a_client(tmp_path):
    home = tmp_path / "tsh"

    async def main():
        async with kept(home) as identity, served(identity, None) as port:
            assert await asyncio.to_thread(log_in_with_paramiko, home, port) == 7

    asyncio.run(main())


@needs_ssh
def test_the_fingerprint_for_clients_that_ask_for_one(tmp_path):
    home = tmp_path / "tsh"

    async def main():
        async with kept(home) as identity:
            status, said = await run(
                "ssh-keygen", "-lf", str(home / "vnet_host_key"), home=tmp_path
            )
            key = asyncssh.import_public_key(identity.plain_line.decode())
            assert (status, said.split()[1]) == (0, key.get_fingerprint())

    asyncio.run(main())

"""A client of TransportService.ProxySSH for tests: blocking, over grpclib's loop in a thread, or raw.

`ssh_stream` gives an ordinary socket whose bytes go to a node, for any SSH client.
"""

import asyncio
import contextlib
import io
import socket
from contextlib import asynccontextmanager

import paramiko
from embedded_cluster_client import VERSION, Home, TlsChannel, encoded
from grpclib.exceptions import StreamTerminatedError

from workers.proxy.teleport.pb import transport_grpc, transport_pb2

Request = transport_pb2.ProxySSHRequest
Frame = transport_pb2.Frame


@asynccontextmanager
async def transport(home: Home, *, address=None, alpn=("teleport-proxy-ssh-grpc",), **pair):
    """A stub of the transport service with the login's certificate."""
    context = home.auth_context(home.cluster, **pair)
    context.set_alpn_protocols(list(alpn))
    channel = TlsChannel(address or home.address, context, encoded(home.cluster))
    try:
        yield transport_grpc.TransportServiceStub(channel)
    finally:
        channel.close()


@asynccontextmanager
async def ssh_stream(stub, target, cluster="root.test", agent=None):
    """A socket whose bytes go to a node; `agent` answers agent frames."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    stream = await stub.ProxySSH.open(metadata=VERSION).__aenter__()
    dial_target = transport_pb2.TargetHost(host_port=target, cluster=cluster)

    async def up():
        while data := await reader.read(30_000):
            await stream.send_message(Request(ssh=Frame(payload=data)))
        await stream.end()

    async def down():
        try:
            async for reply in stream:
                if reply.agent.payload and agent is not None:
                    answer = agent(reply.agent.payload)
                    await stream.send_message(Request(agent=Frame(payload=answer)))
                writer.write(reply.ssh.payload)
                await writer.drain()
        except (StreamTerminatedError, OSError):
            pass
        writer.close()

    tasks = []
    try:
        await stream.send_message(Request(dial_target=dial_target))
        first = await stream.recv_message()
        if first is None:  # refused: the status is in the trailers
            await stream.recv_trailing_metadata()
        assert first.HasField("details")
        tasks = [asyncio.create_task(up()), asyncio.create_task(down())]
        yield ours
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(Exception):
            await stream.cancel()
        writer.transport.abort()
        ours.close()


def user_key(home: Home) -> paramiko.PKey:
    """The login's SSH key with its certificate."""
    pem = (home.keys / home.user).read_text()
    kind = paramiko.RSAKey if "BEGIN RSA" in pem else paramiko.Ed25519Key
    key = kind(file_obj=io.StringIO(pem))
    key.load_certificate((home.keys / f"{home.user}-ssh/{home.cluster}-cert.pub").read_text())
    return key


class HostKeySeen(paramiko.Transport):
    """An SSH client that remembers what the server showed."""

    def _verify_key(self, host_key, sig):
        self.shown = host_key
        super()._verify_key(host_key, sig)


def log_in(sock, home: Home, user="alice", key=None) -> HostKeySeen:
    """A client that is logged in. Raises what paramiko raises; the connection is closed then."""
    client = HostKeySeen(sock)
    client.set_log_channel("tests.ssh")
    try:
        client.start_client(timeout=20)
        client.auth_publickey(user, key or user_key(home))
    except BaseException:
        client.close()
        raise
    return client


def run_command(client, command, stdin=b""):
    """Exit status, output and errors of a command."""
    channel = client.open_session()
    channel.exec_command(command)
    channel.sendall(stdin)
    channel.shutdown_write()
    output = channel.makefile("rb").read()
    errors = channel.makefile_stderr("rb").read()
    status = channel.recv_exit_status()
    channel.close()
    return status, output, errors

"""Makes an SSH session of an accepted connection and its upstream."""

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress

from workers.proxy.admission import AskCredentials, OpenSsh
from workers.proxy.layers import LayerError
from workers.proxy.reactor import Reactor
from workers.proxy.relay import RelayOutcome
from workers.proxy.ssh.agent import SessionAgent
from workers.proxy.ssh.session import Identity, SshSession
from workers.proxy.ssh_stream import SshStream
from workers.proxy.teleport.errors import UnreachableError
from workers.proxy.teleport.ssh_credentials import SshCredentials
from workers.proxy.upstream import Upstream


def opener(identity: Identity) -> OpenSsh:
    """What `Admission` opens SSH with; `identity` is who VNet is for programs."""

    def open_session(
        reactor: Reactor,
        connection: socket.socket,
        upstream: Upstream,
        *,
        name: str,
        about: Mapping[str, str],
        credentials: AskCredentials,
        on_end: Callable[[RelayOutcome], None],
    ) -> SshSession:
        async def credentials_of(login: str) -> SshCredentials:
            found = await credentials(login)
            offer_agent(upstream, found)
            return found

        return SshSession(
            reactor,
            connection,
            upstream,
            name=name,
            about=about,
            identity=identity,
            credentials=credentials_of,
            on_end=on_end,
        )

    return open_session


def offer_agent(upstream: Upstream, credentials: SshCredentials) -> None:
    """Lets a proxy that records the session log in to the host with these credentials.

    Raises:
        UnreachableError: what it has asked for already is no request, or the connection is broken.
    """
    layer = upstream.layer
    if not isinstance(layer, SshStream):
        return
    agent = SessionAgent()
    agent.offer(credentials)
    try:
        layer.set_agent(agent)
    except LayerError as error:
        raise UnreachableError(str(error)) from error
    if answers := layer.take_records():
        with suppress(OSError):  # lost: whoever reads finds it too
            upstream.endpoint.send(answers)

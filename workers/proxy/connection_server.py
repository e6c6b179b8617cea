"""Tells `vnet connections` of this proxy's connections: see `ipc.connection_list`.

Nobody but the VNet user and root may look. Who sends nonsense, asks nothing for a while or does not read
the answer is sent away.
"""

import asyncio
import itertools
import logging
import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from ipc import connection_list as c
from workers.proxy import user_socket
from workers.proxy.connections import Ledger
from workers.proxy.teleport.errors import safe_text

log = logging.getLogger(__name__)

# Terminals in which `vnet connections` runs at the same time.
MAX_WATCHERS = 8
# A watcher looks every second, and reads at once.
PATIENCE_SECONDS = 10.0
# Lines that are made in one turn of the loop; connections are relayed between two turns.
_BATCH = 100
# A socket this old at which nobody listens is of a process that was killed.
_DEAD_SECONDS = 10.0


class ConnectionServer:
    """The socket in `directory`. `slot` is the name of this worker."""

    def __init__(
        self,
        directory: Path,
        slot: str,
        ledger: Ledger,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._directory = directory
        self._slot = slot
        self._ledger = ledger
        self._patience_seconds = patience_seconds
        self._path: Path | None = None
        self._server: asyncio.Server | None = None
        self._watchers: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Begins to listen. Without a socket, which the log tells, nobody can look."""
        path = self._directory / f"{secrets.token_hex(4)}{c.SOCKET_ENDING}"
        try:
            _remove_dead(self._directory)
            end = user_socket.listen(path, MAX_WATCHERS)
        except OSError as error:
            log.error("%s: vnet connections cannot reach this proxy: %s", path, error)
            return
        self._path = path
        self._server = await asyncio.start_unix_server(
            self._accepted, sock=end, limit=c.MAX_LOOK_BYTES
        )

    async def close(self) -> None:
        """Ends every conversation and removes the socket."""
        if self._server is None:
            return
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._server.close()
        tasks = list(self._watchers.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._server = None

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        may_look, uid = user_socket.is_users(writer)
        if not may_look:
            log.warning("user %s may not see connections", uid)
            writer.close()
        elif len(self._watchers) >= MAX_WATCHERS:
            log.debug("%d programs look at connections already", MAX_WATCHERS)
            writer.close()
        else:
            task = asyncio.get_running_loop().create_task(self._converse(reader, writer))
            self._watchers[writer] = task

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                async with asyncio.timeout(self._patience_seconds):
                    look = c.decode_look(await reader.readuntil(b"\n"))
                await self._answer(writer, look)
        except asyncio.IncompleteReadError:
            pass  # it has gone
        except TimeoutError:
            log.debug("a program that looks at connections is sent away: nothing comes of it")
            writer.transport.abort()
        except (asyncio.LimitOverrunError, msgspec.MsgspecError, OSError) as error:
            text = safe_text(str(error))
            log.warning("a program that looks at connections is sent away: %s", text)
        finally:
            del self._watchers[writer]
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, look: c.Look) -> None:
        ledger = self._ledger
        ledger.sample()
        # Before the lines: what happens while they are written is new at the next look.
        revision = ledger.revision
        if look.known == revision:
            await self._write(writer, [c.Unchanged()])
            return
        lines = ledger.lines()
        while batch := list(itertools.islice(lines, _BATCH)):
            await self._write(writer, batch)
            await asyncio.sleep(0)
        await self._write(writer, [c.Complete(slot=self._slot, revision=revision)])

    async def _write(self, writer: asyncio.StreamWriter, batch: Sequence[c.FromProxy]) -> None:
        writer.write(b"".join(map(c.encode, batch)))
        async with asyncio.timeout(self._patience_seconds):
            await writer.drain()


def _remove_dead(directory: Path) -> None:
    """Removes the sockets of processes that were killed. Raises OSError."""
    for path in directory.glob(f"*{c.SOCKET_ENDING}"):
        with suppress(OSError):
            # A younger one may be about to listen.
            if time.time() - path.stat().st_mtime > _DEAD_SECONDS and _is_dead(path):
                path.unlink(missing_ok=True)


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
        end.setblocking(False)
        try:
            end.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
    return False

"""Keeps what SSH clients need in the tsh home: keys, the host keys to trust, a configuration.

    id_vnet, id_vnet.pub    made when the public one is missing, then kept
    vnet_host_key           made when it is missing, then kept
    vnet_known_hosts        of each run
    vnet_ssh_config         of the present clusters; removed at the end

It is looked after when clusters change and every half minute. The home may be missing, full or
read-only for a while: then `problem` says so, and nothing else of VNet is affected.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from workers.proxy.ssh import config_text
from workers.proxy.ssh.config_text import UnwritablePathError
from workers.proxy.ssh.files import FileError, HomeFiles
from workers.proxy.ssh.identity import (
    MAX_PUBLIC_KEY_BYTES,
    LocalIdentity,
    parse_private_key,
    parse_public_key,
    private_pem,
    public_line,
)
from workers.proxy.teleport.errors import safe_text

logger = logging.getLogger(__name__)

REFRESH_SECONDS: Final = 30.0
# While something is wrong.
RETRY_SECONDS: Final = 5.0
# A home on a network that does not answer holds up neither start nor end for longer.
PATIENCE_SECONDS: Final = 5.0
# A key takes some hundred bytes.
MAX_PRIVATE_KEY_BYTES: Final = 10_000
# A client compares what it was shown with the file as it is a moment later: what a predecessor shows
# to its last ones counts for so long.
PREDECESSOR_SECONDS: Final = 60.0
# Two authorities and a key.
MAX_KNOWN_HOSTS_BYTES: Final = 2_000
# Shown beside what is wrong with clusters.
MAX_PROBLEM: Final = 400


class SshHousekeeping:
    """See the module. `clusters()` names all that there is a login for, roots and leaves.

    `is_successor`: another process has kept the files until now, and has connections left.
    `on_change` is called, in the event loop, when `problem` has become another one.
    """

    def __init__(
        self,
        home: Path,
        clusters: Callable[[], list[str]],
        *,
        is_successor: bool = False,
        on_change: Callable[[], None] | None = None,
        predecessor_seconds: float = PREDECESSOR_SECONDS,
        refresh_seconds: float = REFRESH_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self.identity = LocalIdentity(home)
        self.problem = ""
        seconds = predecessor_seconds if is_successor else 0.0
        self._keeper = HomeKeeper(home, self.identity, predecessor_seconds=seconds)
        self._clusters = clusters
        self._on_change = on_change
        self._refresh_seconds = refresh_seconds
        self._retry_seconds = retry_seconds
        self._patience_seconds = patience_seconds
        self._is_due = asyncio.Event()
        self._was_looked_after = asyncio.Event()
        self._is_closing = False
        self._work: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the files are there, or it is clear why not, or after a while anyway."""
        self._work = asyncio.create_task(self._look_after())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience_seconds):
                await self._was_looked_after.wait()

    def changed(self) -> None:
        """The clusters are others."""
        self._is_due.set()

    async def close(self, *, remove: bool) -> None:
        """Leaves the files alone from now on; `remove`: also takes the configuration away."""
        self._is_closing = True
        self._is_due.set()
        work, self._work = self._work, None
        if work is None:
            return
        # What is being written is finished: a successor must not be overwritten later.
        await asyncio.wait([work], timeout=self._patience_seconds)
        if not work.done():
            work.cancel()
        elif remove:
            removing = asyncio.create_task(asyncio.to_thread(self._keeper.remove))
            await asyncio.wait([removing], timeout=self._patience_seconds)

    async def _look_after(self) -> None:
        while not self._is_closing:
            self._is_due.clear()
            try:
                names = self._clusters()
                # In a thread: a home directory may be on a slow network.
                problem = await asyncio.to_thread(self._keeper.refresh, names)
            except Exception:
                logger.exception("looking after the SSH files failed")
                problem = "The SSH files cannot be kept: see vnet logs."
            self._tell(problem)
            self._was_looked_after.set()
            pause = self._retry_seconds if problem else self._refresh_seconds
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._is_due.wait()

    def _tell(self, problem: str) -> None:
        if problem == self.problem:
            return
        self.problem = problem
        if problem:
            logger.warning("%s", problem)
        else:
            logger.info("the SSH files are written again")
        if self._on_change is not None:
            self._on_change()


class HomeKeeper:
    """The files of one home; blocking."""

    def __init__(
        self, home: Path, identity: LocalIdentity, *, predecessor_seconds: float = 0.0
    ) -> None:
        self._predecessor_seconds = predecessor_seconds  # 0 once it has been looked for
        self._predecessor = b""  # its authority
        self._forget_at = 0.0
        self._home = home
        self._identity = identity
        self._files = HomeFiles(home)

    def refresh(self, clusters: Sequence[str]) -> str:
        """Has the files be as they should; the first thing that is wrong, as a sentence, or empty."""
        # Each by itself: one that is broken is no reason for the others to be missing.
        steps: list[Callable[[], None]] = [
            self._keep_identity,
            self._keep_host_key,
            self._keep_known_hosts,
            lambda: self._keep_config(clusters),
        ]
        problems = [problem for step in steps for problem in _problem_of(step)]
        return _sentence(problems[0]) if problems else ""

    def remove(self) -> None:
        """Removes the configuration."""
        try:
            self._files.remove(config_text.CLIENT_CONFIG, config_text.BANNER.encode())
        except FileError as error:
            logger.warning("%s", error)

    def _keep_identity(self) -> None:
        public = self._files.read(config_text.IDENTITY_PUBLIC, MAX_PUBLIC_KEY_BYTES)
        if public is None:
            key = Ed25519PrivateKey.generate()
            # In this order: while the public one is missing, both are made again.
            self._files.keep(config_text.IDENTITY, private_pem(key))
            self._files.keep(config_text.IDENTITY_PUBLIC, public_line(key) + b"\n")
        elif parse_public_key(public) is None:
            path = self._home / config_text.IDENTITY_PUBLIC
            raise FileError(f"{path} holds no public key: remove it, and VNet makes a new pair")
        else:
            self._files.read(config_text.IDENTITY, MAX_PRIVATE_KEY_BYTES, is_secret=True)

    def _keep_host_key(self) -> None:
        data = self._files.read(config_text.HOST_KEY, MAX_PRIVATE_KEY_BYTES, is_secret=True)
        if data is None:
            self._files.keep(config_text.HOST_KEY, private_pem(self._identity.plain_key))
            return
        key = parse_private_key(data)
        if key is None:
            path = self._home / config_text.HOST_KEY
            raise FileError(
                f"{path} is no Ed25519 key without password: remove it, and VNet makes a new one"
            )
        self._identity.plain_key = key

    def _keep_known_hosts(self) -> None:
        identity = self._identity
        if self._predecessor_seconds:
            self._forget_at = time.monotonic() + self._predecessor_seconds
            self._predecessor_seconds = 0.0
            # One that cannot be read is none of a predecessor's.
            with contextlib.suppress(FileError):
                found = self._files.read(config_text.KNOWN_HOSTS, MAX_KNOWN_HOSTS_BYTES)
                self._predecessor = config_text.authority_in(found or b"")
        if time.monotonic() > self._forget_at:
            self._predecessor = b""
        text = config_text.known_hosts(
            identity.authority_line, identity.plain_line, self._predecessor
        )
        self._files.keep(config_text.KNOWN_HOSTS, text)

    def _keep_config(self, clusters: Sequence[str]) -> None:
        text = config_text.client_config(self._home, clusters)
        self._files.keep(config_text.CLIENT_CONFIG, text.encode(errors="surrogateescape"))


def _problem_of(step: Callable[[], None]) -> Iterator[str]:
    try:
        step()
    except (FileError, UnwritablePathError) as error:
        yield str(error)


def _sentence(problem: str) -> str:
    return safe_text(f"SSH clients are not set up: {problem}.", MAX_PROBLEM)

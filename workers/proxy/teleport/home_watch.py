"""Waits for changes of the tsh home: by inotify(7) where that works, else by looking regularly.

What a login or logout consists of is many writes, so a change is told a moment after the last of
them. Folders come and go; the home itself may not exist yet, then the nearest folder above it is
watched. Changes that other machines make on a network file system raise no events here.
"""

import asyncio
import contextlib
import errno
import logging
import os
import sys
from pathlib import Path

from workers.proxy.teleport.home import folders

if sys.platform == "linux":
    from asyncinotify import Inotify, Mask, Watch

logger = logging.getLogger(__name__)

# After the last event, and at most after the first one.
QUIET_SECONDS = 0.05
LONGEST_SECONDS = 0.5
POLL_SECONDS = 1.0
# With a working watch; for what it cannot see, as when a link on the way to the home changes.
WATCHED_POLL_SECONDS = 30.0

# Types of /proc/self/mountinfo (proc_pid_mountinfo(5)); what begins with "fuse" counts as well.
# fmt: off
_NETWORK_TYPES = frozenset({
    "9p", "afs", "autofs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre",
    "ncpfs", "nfs", "nfs4", "ocfs2", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs",
})
# fmt: on
MAX_MOUNTINFO_BYTES = 4 * 1024 * 1024


def is_network_device(mountinfo: str, device: int) -> bool:
    """Whether a device number, as stat(2) gives it, is that of a network file system. Pure."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.partition(" ")[0]
        if len(fields) > 2 and fields[2] == wanted:
            return kind in _NETWORK_TYPES or kind.startswith("fuse")
    return False


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))


class HomeWatch:
    """One home. `wait` returns after a change, or when it is time to look anyway."""

    def __init__(
        self,
        directory: Path,
        *,
        poll_seconds: float = POLL_SECONDS,
        watched_poll_seconds: float = WATCHED_POLL_SECONDS,
    ) -> None:
        self._directory = directory
        self._poll_seconds = poll_seconds
        self._watched_poll_seconds = watched_poll_seconds
        self._events: _Events | None = None
        self._device: int | None = None
        self._is_network = False
        self._is_told = False

    @property
    def is_watching(self) -> bool:
        """Whether all changes are noticed at once."""
        return self._events is not None and not self._is_network

    async def start(self) -> None:
        """Begins to watch. Never fails: without a watch the home is looked at regularly.

        What changes from here on makes `wait` return.
        """
        await self._follow()

    async def wait(self, at_most_seconds: float | None = None) -> None:
        """Returns when something may have changed since the last return."""
        seconds = self._watched_poll_seconds if self.is_watching else self._poll_seconds
        if at_most_seconds is not None:
            seconds = min(seconds, at_most_seconds)
        if self._events is None:
            await asyncio.sleep(seconds)
        elif await self._events.wait(seconds):
            await self._settle(self._events)
        await self._follow()

    async def _settle(self, events: "_Events") -> None:
        end = asyncio.get_running_loop().time() + LONGEST_SECONDS
        while events.has_happened and asyncio.get_running_loop().time() < end:
            events.forget()
            # Folders that came meanwhile are followed, so that what is written there counts.
            await self._follow()
            await asyncio.sleep(QUIET_SECONDS)
        events.forget()

    async def _follow(self) -> None:
        """Watches the folders that are there now."""
        try:
            if self._events is None:
                self._events = _Events()
            # A folder may get others before it is watched, so again until none is new.
            while self._events.follow(*await asyncio.to_thread(_wanted, self._directory)):
                pass
            await asyncio.to_thread(self._look_at_device)
        except OSError as error:
            if not self._is_told:
                why = _reason(error)
                logger.info("%s is looked at every second, not watched: %s", self._directory, why)
                self._is_told = True
            await self.close()
        else:
            self._is_told = False

    def _look_at_device(self) -> None:
        device = nearest_folder(self._directory).stat().st_dev
        if device != self._device:
            with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - no file to name
                text = file.read(MAX_MOUNTINFO_BYTES)
            self._device, self._is_network = device, is_network_device(text, device)

    async def close(self) -> None:
        """Ends the watch."""
        events, self._events = self._events, None
        if events is not None:
            await events.close()


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.EMFILE:
            return "no inotify instance or descriptor is left (fs.inotify.max_user_instances)"
        case errno.ENOSPC:
            return "no watch is left (fs.inotify.max_user_watches)"
        case _:
            return error.strerror or str(error)


def _wanted(directory: Path) -> tuple[list[Path], str]:
    """The folders to watch, and the only name that matters in them (empty: every name)."""
    if directory.is_dir():
        return folders(directory), ""
    above = nearest_folder(directory)
    return [above], directory.relative_to(above).parts[0]


if sys.platform == "linux":
    _MASK = (
        Mask.CREATE
        | Mask.DELETE
        | Mask.MODIFY
        | Mask.CLOSE_WRITE
        | Mask.MOVE
        | Mask.DELETE_SELF
        | Mask.MOVE_SELF
        | Mask.ONLYDIR
    )
    # Of a folder above the home; others write there all day.
    _MASK_ABOVE = Mask.CREATE | Mask.MOVE | Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR

    class _Events:
        """Notes that something happened in the watched folders; what exactly does not matter."""

        def __init__(self) -> None:
            self._inotify = Inotify()
            self._watches: dict[int, Watch] = {}
            self._only = ""
            self._happened = asyncio.Event()
            self._pump = asyncio.ensure_future(self._read())

        @property
        def has_happened(self) -> bool:
            return self._happened.is_set()

        def forget(self) -> None:
            self._happened.clear()

        async def wait(self, seconds: float) -> bool:
            """Whether something happened within this time, or since `forget`."""
            try:
                async with asyncio.timeout(seconds):
                    await self._happened.wait()
            except TimeoutError:
                return False
            return True

        async def _read(self) -> None:
            async for event in self._inotify:
                name = "" if event.name is None else str(event.name)
                if not self._only or name in {"", self._only}:
                    self._happened.set()

        def follow(self, wanted: list[Path], only: str) -> bool:
            """Watches exactly these folders; whether one is new.

            Raises:
                OSError: they cannot be watched.
            """
            if self._pump.done():
                raise OSError(errno.EIO, "events cannot be read")
            self._only = only
            watches: dict[int, Watch] = {}
            for folder in wanted:
                # What is gone again is missing in the next list as well.
                with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                    watch = self._inotify.add_watch(folder, _MASK_ABOVE if only else _MASK)
                    watches[watch.wd] = watch
            is_new = not watches.keys() <= self._watches.keys()
            for number in self._watches.keys() - watches.keys():
                with contextlib.suppress(OSError, ValueError, KeyError):  # the kernel was first
                    self._inotify.rm_watch(self._watches[number])
            self._watches = watches
            return is_new

        async def close(self) -> None:
            # The reader is taken off the loop before the number of the descriptor is free.
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
            self._inotify.close()

else:

    class _Events:
        """Stands for inotify where there is none."""

        has_happened = False

        def __init__(self) -> None:
            raise OSError(errno.ENOSYS, "this system has no inotify")

        def forget(self) -> None: ...

        async def wait(self, seconds: float) -> bool:
            raise NotImplementedError

        def follow(self, wanted: list[Path], only: str) -> bool:
            raise NotImplementedError

        async def close(self) -> None: ...

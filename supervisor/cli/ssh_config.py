"""`vnet ssh-config`: has OpenSSH, or PuTTY, know VNet's hosts. Needs no running VNet.

OpenSSH reads `vnet_ssh_config` in the tsh home, which VNet keeps while it runs, when `~/.ssh/config`
includes it: at the top, since the first value counts and an Include below a Host line is for that
host only. Source: ssh_config(5); `lib/vnet/opensshconfig.go` of Teleport.
"""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor import settings
from supervisor.cli.teleport_access import CommandError, find_access
from supervisor.exits import ExitStatus, MisconfiguredError
from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.file_state import FileKind, FileState, look, put
from supervisor.settings import User
from supervisor.ssh_config_include import Inclusion, find_inclusion

VNET_CONFIG: Final = "vnet_ssh_config"
IDENTITY_PUBLIC: Final = "id_vnet.pub"
BACKUP_SUFFIX: Final = ".vnet-backup"
# A file of this size or more is no configuration that somebody wrote.
MAX_CONFIG_BYTES: Final = 1024 * 1024
_COMMENT: Final = "# Teleport's SSH servers through VNet; written by: vnet ssh-config --install"
# What is a pattern, a token or a variable in an Include, in one version of OpenSSH or another.
_SPECIAL_IN_INCLUDE: Final = ("*", "?", "[", "\\", "%", "${", "\n", "\r", "\0")
# File systems without locks, such as some on a network.
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class SshPlaces:
    """Where the files of one user are. `teleport_home` is a tsh home; all paths are absolute."""

    user_home: Path
    teleport_home: Path

    @property
    def user_config(self) -> Path:
        """What OpenSSH reads."""
        return self.user_home / ".ssh" / "config"

    @property
    def vnet_config(self) -> Path:
        """What VNet writes."""
        return self.teleport_home / VNET_CONFIG


def run(config: Path | None, environment: Mapping[str, str], *, install: bool, putty: bool) -> None:
    """Does what is asked for; without anything prints the line to include.

    With sudo the files are those of the user who called it, and so are the rights.

    Raises:
        CommandError: it cannot be done.
    """
    access = find_access(config, environment)
    try:
        user = settings.find_user(None, environment)
    except MisconfiguredError as error:
        raise CommandError(ExitStatus.USAGE, str(error)) from error
    places = SshPlaces(user.home, access.home.absolute())
    if putty:
        # Before rights are given up: our own files may be open to root alone.
        from supervisor.cli.putty import write_session  # noqa: PLC0415  # loads cryptography
    _become(user)
    if putty:
        for line in write_session(places.teleport_home, user.home, environment):
            print(line)
        if not install:
            return
    for note in notes(places):
        print(f"vnet: {note}", file=sys.stderr)
    print(install_include(places) if install else include_line(places.vnet_config))


def notes(places: SshPlaces) -> Iterator[str]:
    """Why there is nothing to include yet."""
    if not places.teleport_home.is_dir():
        yield f"there is no {places.teleport_home}: log in with tsh login, and start VNet"
    elif not os.path.lexists(places.teleport_home / IDENTITY_PUBLIC):
        yield f"VNet has not run yet with {places.teleport_home}: start it"
    elif not os.path.lexists(places.vnet_config):
        yield f"VNet does not run: {places.vnet_config} is there only while it does"


def include_line(vnet_config: Path) -> str:
    """The line for `~/.ssh/config`.

    Raises:
        CommandError: OpenSSH would read the path as something else.
    """
    text = str(vnet_config)
    if any(special in text for special in _SPECIAL_IN_INCLUDE):
        raise CommandError(
            ExitStatus.USAGE,
            f"OpenSSH cannot include a path like {text!r}: choose another TELEPORT_HOME",
        )
    return 'Include "{}"'.format(text.replace('"', '\\"'))


def install_include(places: SshPlaces) -> str:
    """Puts the line at the top of the user's configuration, if it is not there; says what was done.

    Raises:
        CommandError: nothing was changed.
    """
    path = places.user_config
    try:
        return _install(path, places)
    except OsConfigError as error:
        raise CommandError(ExitStatus.USAGE, str(error)) from error
    except OSError as error:
        status = ExitStatus.INTERNAL
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            status = ExitStatus.NOT_PERMITTED
        where = error.filename or path
        raise CommandError(status, f"{where} cannot be changed: {error.strerror}") from error


def _install(path: Path, places: SshPlaces) -> str:
    line = include_line(places.vnet_config)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    # Of a symbolic link the target is changed, so that the link stays.
    target = Path(os.path.realpath(path))
    with _locked(target):
        state, data = look(target)
        _check(path, state, data)
        text = data.decode(errors="surrogateescape")
        inclusion = find_inclusion(text, places.vnet_config, places.user_home)
        if inclusion is Inclusion.FOR_ALL_HOSTS:
            return f"{path} includes {places.vnet_config} already: nothing was changed."
        backup = path.with_name(path.name + BACKUP_SUFFIX)
        if state.kind is FileKind.MISSING:
            state = FileState(kind=FileKind.FILE, mode=0o600, uid=os.geteuid(), gid=os.getegid())
        elif data:
            put(backup, state, data)
        new = f"{_COMMENT}\n{line}\n\n".encode(errors="surrogateescape")
        put(target, state, new + data)
    done = f"{path} includes {places.vnet_config} now."
    return f"{done} What it was before is in {backup}." if data else done


def _check(path: Path, state: FileState, data: bytes) -> None:
    if len(data) >= MAX_CONFIG_BYTES:
        raise OsConfigError(f"{path} has {MAX_CONFIG_BYTES} bytes or more: make it shorter")
    if os.geteuid() != 0 and state.kind is FileKind.FILE and state.uid != os.geteuid():
        raise OsConfigError(f"{path} belongs to another user: make it yours")


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Holds off other programs that lock the file, or its directory while there is no file."""
    try:
        # O_NONBLOCK: a FIFO in the place of a file must not hang us.
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            os.close(descriptor)
            raise CommandError(
                ExitStatus.CONFLICT, f"another program is changing {target}: try again"
            ) from error
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        os.close(descriptor)


def _become(user: User) -> None:
    # What root writes where a user may write could end up anywhere.
    if os.geteuid() == 0 and user.uid != 0:
        os.initgroups(user.name, user.gid)
        os.setgid(user.gid)
        os.setuid(user.uid)

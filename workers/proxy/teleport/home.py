"""Reads the tsh home directory: profiles, credentials, trusted authorities. Never writes there.

    <home>/<proxy>.yaml                       profile
    <home>/keys/<proxy>/<user>.crt, .key      user certificate and its key, since v17
    <home>/keys/<proxy>/<user>-x509.pem       user certificate, until v16; the key is <user>
    <home>/keys/<proxy>/cas/<cluster>.pem     host authorities of a cluster

Source: `api/profile/profile.go`, `api/utils/keypaths/keypaths.go`, `lib/client/keystore.go`. A
login that is only half written reads as "not logged in"; the caller reads again when
`fingerprint` changes. A logout deletes everything, or of one profile the certificate and the keys.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

from ipc.messages import ClusterState
from workers.proxy.teleport.credentials import (
    MAX_PEM_BYTES,
    CredentialError,
    Credentials,
    parse_authorities,
    parse_credentials,
)
from workers.proxy.teleport.errors import HardwareKeyError, safe_text
from workers.proxy.teleport.identity import Identity
from workers.proxy.teleport.profile import MAX_PROFILE_BYTES, Profile, ProfileError, parse_profile

MAX_PROFILES = 100
MAX_AUTHORITIES = 1000

# (path, inode, size, modification time in nanoseconds) of every file that was looked at.
Fingerprint: TypeAlias = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Login:
    """One profile and what its files hold.

    `state` is OK, NO_LOGIN or HARDWARE_KEY; whether the login has expired depends on the time:
    `state_at`. `problem` is empty exactly for OK. `is_removed` tells a logout, which deletes the
    certificate and the key, from a login of which not everything has been written yet.
    """

    name: str
    profile: Profile | None
    credentials: Credentials | None
    # Cluster name to its host authorities, DER.
    authorities: Mapping[str, tuple[bytes, ...]] = field(repr=False)
    state: ClusterState
    problem: str
    is_removed: bool = False

    def state_at(self, now: datetime) -> tuple[ClusterState, str]:
        """State at this time, with a sentence that says what to do (empty for OK)."""
        if self.credentials is not None and now >= self.credentials.identity.not_after:
            moment = self.credentials.identity.not_after.strftime("%Y-%m-%d %H:%M UTC")
            where = self.profile.address if self.profile is not None else self.name
            return (
                ClusterState.LOGIN_EXPIRED,
                f"the login expired at {moment}: run tsh login --proxy={where}",
            )
        return self.state, self.problem


@dataclass(frozen=True, slots=True)
class Home:
    """All profiles, sorted by name. `problem` says why there is none, or which file is broken."""

    logins: tuple[Login, ...]
    problem: str


class UnreadableError(Exception):
    """A file cannot be read; the message names it."""


class MissingError(UnreadableError):
    """There is no such file."""


def read_home(directory: Path) -> Home:
    """Reads everything. Never raises for what the files hold: that becomes a `problem`."""
    try:
        names = _profile_names(directory)
    except OSError as error:
        return Home((), f"{directory} cannot be read ({error.strerror}): run tsh login")
    if not names:
        return Home((), f"no profile in {directory}: run tsh login --proxy=<address>")
    logins = tuple(_read_login(directory, name) for name in names[:MAX_PROFILES])
    excess = len(names) - MAX_PROFILES
    if excess <= 0:
        return Home(logins, "")
    return Home(
        logins,
        f"{directory} has {excess} profiles too many, they are ignored: run tsh logout"
        " --proxy=<address> for those that you do not need",
    )


def fingerprint(directory: Path) -> Fingerprint:
    """Changes whenever a file that `read_home` reads is replaced or written."""
    return tuple(sorted(_stamps(directory)))


def folders(directory: Path) -> list[Path]:
    """The folders in which `read_home` finds files, those that are there, the home first."""
    found = [directory]
    for folder in [directory / "keys", *_entries(directory / "keys")[:MAX_PROFILES]]:
        found += [folder, folder / "cas"]
    return [folder for folder in found if folder.is_dir()]


def _profile_names(directory: Path) -> list[str]:
    with os.scandir(directory) as entries:
        return sorted(
            entry.name.removesuffix(".yaml")
            for entry in entries
            if entry.name.endswith(".yaml") and entry.is_file(follow_symlinks=False)
        )


def _stamps(directory: Path) -> Iterator[tuple[str, int, int, int]]:
    # Only what a login consists of: the folders of app and database certificates are not entered.
    try:
        names = _profile_names(directory)
    except OSError:
        return
    for name in names[:MAX_PROFILES]:
        yield from _stamp(directory / f"{name}.yaml")
    for folder in _entries(directory / "keys")[:MAX_PROFILES]:
        for path in _entries(folder) + _entries(folder / "cas"):
            yield from _stamp(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _stamp(path: Path) -> Iterator[tuple[str, int, int, int]]:
    try:
        found = path.stat()
    except OSError:
        return
    if stat.S_ISREG(found.st_mode):
        yield str(path), found.st_ino, found.st_size, found.st_mtime_ns


def _read_login(directory: Path, name: str) -> Login:
    path = directory / f"{name}.yaml"
    try:
        profile = parse_profile(read_file(path, MAX_PROFILE_BYTES))
    except (ProfileError, UnreadableError) as error:
        problem = f"{path}: {error}: run tsh login --proxy={name}"
        return _broken(name, None, ClusterState.NO_LOGIN, problem)
    folder = directory / "keys" / profile.name
    again = f"run tsh login --proxy={profile.address}"
    try:
        certificate, key = _credential_files(folder, profile.user)
        credentials = parse_credentials(
            read_file(certificate, MAX_PEM_BYTES), read_file(key, MAX_PEM_BYTES)
        )
    except HardwareKeyError:
        problem = (
            f"{folder}: the private key is in a hardware token, which VNet cannot use: ask your "
            "administrator for a login without hardware key policy"
        )
        return _broken(profile.name, profile, ClusterState.HARDWARE_KEY, problem)
    except (CredentialError, UnreadableError) as error:
        problem = f"{folder}: {error}: {again}"
        is_removed = isinstance(error, MissingError)
        return _broken(profile.name, profile, ClusterState.NO_LOGIN, problem, is_removed=is_removed)
    if (objection := _objection(credentials.identity)) is not None:
        problem = f"{folder}: {objection}: {again}"
        return _broken(profile.name, profile, ClusterState.NO_LOGIN, problem)
    authorities = _read_authorities(folder / "cas")
    root = credentials.identity.root_cluster
    if root not in authorities:
        problem = f"{folder / 'cas'}: no host authority of cluster {root}: {again}"
        return _broken(profile.name, profile, ClusterState.NO_LOGIN, problem)
    return Login(profile.name, profile, credentials, authorities, ClusterState.OK, "")


def _broken(
    name: str,
    profile: Profile | None,
    state: ClusterState,
    problem: str,
    *,
    is_removed: bool = False,
) -> Login:
    return Login(name, profile, None, {}, state, safe_text(problem), is_removed)


def _objection(identity: Identity) -> str | None:
    """Why no certificate can be had with this one, or None."""
    if identity.usages:
        usages = ", ".join(identity.usages[:5])
        return f"the certificate is restricted to {usages}, which VNet cannot use"
    if identity.is_reissue_forbidden:
        return "the cluster issues no other certificates to the holder of this one"
    return None


def _credential_files(folder: Path, user: str) -> tuple[Path, Path]:
    try:
        if (folder / f"{user}.crt").exists():
            return folder / f"{user}.crt", folder / f"{user}.key"
        if (folder / f"{user}-x509.pem").exists():
            return folder / f"{user}-x509.pem", folder / user
    except OSError as error:
        raise UnreadableError(f"it cannot be read ({error.strerror})") from error
    raise MissingError(f"no certificate of user {safe_text(user, 100)}")


def _read_authorities(folder: Path) -> dict[str, tuple[bytes, ...]]:
    authorities: dict[str, tuple[bytes, ...]] = {}
    for path in [p for p in _entries(folder) if p.suffix == ".pem"][:MAX_AUTHORITIES]:
        try:
            authorities[path.stem] = parse_authorities(read_file(path, MAX_PEM_BYTES))
        except (CredentialError, UnreadableError):
            continue  # one cluster's broken file must not hide the others
    return authorities


def read_file(path: Path, limit: int) -> bytes:
    """The file's bytes.

    Raises:
        MissingError: there is none.
        UnreadableError: it cannot be read, is no regular file, or has more than `limit` bytes.
    """
    # O_NONBLOCK: a FIFO in the place of a file must not hang the reader.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - from a descriptor
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnreadableError(f"{path.name} is no regular file")
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path.name}") from error
    except OSError as error:
        raise UnreadableError(f"{path.name} cannot be read ({error.strerror})") from error
    if len(data) > limit:
        raise UnreadableError(f"{path.name} has more than {limit} bytes")
    return data

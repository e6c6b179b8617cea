"""Has PuTTY reach SSH servers through VNet: a saved session "VNet", and the key in PuTTY's format.

PuTTY knows a key by its own format, and host certificates not at all unless each authority is
entered; so the session names the plain host key, which stays the same. It is for Unix, where
sessions are files. Source: PuTTY's manual, appendix C (PPK) and sections 4.19 (host keys) and 4.22;
`unix/storage.c` of PuTTY.
"""

import base64
import contextlib
import hashlib
import hmac
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from supervisor.cli.teleport_access import CommandError
from supervisor.exits import ExitStatus
from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.file_state import FileKind, FileState, look, put

SESSION: Final = "VNet"
KEY_FILE: Final = "id_vnet.ppk"
IDENTITY: Final = "id_vnet"
HOST_KEY: Final = "vnet_host_key"
MAX_KEY_BYTES: Final = 10_000
_PPK_COMMENT: Final = "vnet"
_PPK_LINE: Final = 64
# What a session has besides the key, unless it says something else already.
_DEFAULTS: Final = {"Protocol": "ssh", "PortNumber": "22"}


def write_session(
    teleport_home: Path, user_home: Path, environment: Mapping[str, str]
) -> list[str]:
    """Writes session and key; returns lines that say so. Other settings of the session stay.

    Raises:
        CommandError: VNet has made no keys yet, or something cannot be written.
    """
    identity = _read_key(teleport_home / IDENTITY)
    host_key = _read_key(teleport_home / HOST_KEY)
    folder = putty_folder(user_home, environment)
    key_path, session_path = folder / KEY_FILE, folder / "sessions" / SESSION
    if "\n" in str(key_path):
        raise CommandError(ExitStatus.USAGE, f"PuTTY cannot be told of a path like {key_path!r}")
    wanted = {
        "PublicKeyFile": str(key_path),
        "SSHManualHostKeys": fingerprint(host_key.public_key()),
        # Too many keys of an agent end the connection before this one's turn.
        "TryAgent": "0",
    }
    try:
        for directory in (folder, session_path.parent):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _put(key_path, ppk(identity).encode())
        _, before = look(session_path)
        old = before.decode(errors="surrogateescape")
        new = session_text(old, wanted, _DEFAULTS)
        _put(session_path, new.encode(errors="surrogateescape"))
    except OsConfigError as error:
        raise CommandError(ExitStatus.USAGE, str(error)) from error
    except OSError as error:
        where = error.filename or folder
        raise CommandError(
            ExitStatus.NOT_PERMITTED, f"{where} cannot be written: {error.strerror}"
        ) from error
    who = "<user>@<host>.<cluster>"
    return [
        f'{session_path} is PuTTY\'s session "{SESSION}", with the key {key_path}.',
        f"Load it and enter {who} as host name, or: plink -load {SESSION} {who}",
    ]


def putty_folder(user_home: Path, environment: Mapping[str, str]) -> Path:
    """Where PuTTY keeps its files: PUTTYDIR, then a directory of XDG if there, then `~/.putty`."""
    if chosen := environment.get("PUTTYDIR"):
        return Path(chosen).absolute()
    xdg = Path(environment.get("XDG_CONFIG_HOME") or user_home / ".config") / "putty"
    return xdg if xdg.is_absolute() and xdg.is_dir() else user_home / ".putty"


def session_text(old: str, wanted: Mapping[str, str], defaults: Mapping[str, str]) -> str:
    """A session's file with these settings, `Key=value` each; other lines stay as they are. Pure."""
    lines = []
    seen = set()
    # Not splitlines: a value may have other characters that end a line elsewhere.
    for line in old.removesuffix("\n").split("\n") if old else []:
        key = line.partition("=")[0]
        seen.add(key)
        lines.append(f"{key}={wanted[key]}" if key in wanted else line)
    added = {**defaults, **wanted}
    lines += [f"{key}={value}" for key, value in added.items() if key not in seen]
    return "".join(f"{line}\n" for line in lines)


def fingerprint(key: Ed25519PublicKey) -> str:
    """`SHA256:...` as PuTTY and OpenSSH show it. Pure."""
    digest = base64.b64encode(hashlib.sha256(_public_blob(key)).digest())
    return f"SHA256:{digest.decode().rstrip('=')}"


def ppk(key: Ed25519PrivateKey) -> str:
    """An unencrypted PPK file of version 2, which every PuTTY reads. Pure."""
    algorithm, encryption = "ssh-ed25519", "none"
    public = _public_blob(key.public_key())
    private = _string(key.private_bytes_raw())
    checked = b"".join(
        _string(part)
        for part in (
            algorithm.encode(),
            encryption.encode(),
            _PPK_COMMENT.encode(),
            public,
            private,
        )
    )
    # It finds damage; without a password it cannot do more.
    mac_key = hashlib.sha1(b"putty-private-key-file-mac-key", usedforsecurity=False).digest()
    mac = hmac.new(mac_key, checked, "sha1").hexdigest()
    lines = [
        f"PuTTY-User-Key-File-2: {algorithm}",
        f"Encryption: {encryption}",
        f"Comment: {_PPK_COMMENT}",
        *_numbered("Public-Lines", public),
        *_numbered("Private-Lines", private),
        f"Private-MAC: {mac}",
    ]
    return "".join(f"{line}\n" for line in lines)


def _numbered(title: str, data: bytes) -> list[str]:
    lines = textwrap.wrap(base64.b64encode(data).decode(), _PPK_LINE)
    return [f"{title}: {len(lines)}", *lines]


def _public_blob(key: Ed25519PublicKey) -> bytes:
    """RFC 8709 section 4."""
    return _string(b"ssh-ed25519") + _string(key.public_bytes_raw())


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _read_key(path: Path) -> Ed25519PrivateKey:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_BYTES)
    except FileNotFoundError as error:
        raise CommandError(
            ExitStatus.NOT_RUNNING, f"there is no {path}: start VNet, which makes it"
        ) from error
    except OSError as error:
        raise CommandError(
            ExitStatus.NOT_PERMITTED, f"{path} cannot be read: {error.strerror}"
        ) from error
    with contextlib.suppress(Exception):  # on damaged files the library raises more than it names
        key = serialization.load_ssh_private_key(data, None)
        if isinstance(key, Ed25519PrivateKey):
            return key
    raise CommandError(ExitStatus.USAGE, f"{path} is no Ed25519 key without password: remove it")


def _put(path: Path, data: bytes) -> None:
    put(
        path,
        FileState(kind=FileKind.FILE, mode=0o600, uid=os.geteuid(), gid=os.getegid()),
        data,
    )

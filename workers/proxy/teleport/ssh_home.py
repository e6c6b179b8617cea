"""Reads what SSH needs from the tsh home directory, anew for each login. Never writes there.

The files are those of `workers.proxy.teleport.ssh_credentials`.
"""

from collections.abc import Sequence
from pathlib import Path

from workers.proxy.teleport.credentials import MAX_PEM_BYTES, CredentialError
from workers.proxy.teleport.errors import (
    HardwareKeyError,
    NoSshLoginError,
    UnreachableError,
    safe_text,
)
from workers.proxy.teleport.home import MissingError, UnreadableError, read_file
from workers.proxy.teleport.profile import Profile
from workers.proxy.teleport.ssh_credentials import (
    MAX_CERTIFICATE_BYTES,
    MAX_KNOWN_HOSTS_BYTES,
    SshPrivateKey,
    UserCertificate,
    known_authorities,
    parse_ssh_key,
    user_certificate,
)


def read_key(home: Path, profile: Profile) -> SshPrivateKey:
    """The user's SSH key; until version 16 of Teleport it is the key of everything.

    Raises:
        HardwareKeyError: it is in a hardware token.
        NoSshLoginError: there is none.
    """
    path = _folder(home, profile) / profile.user
    try:
        return parse_ssh_key(read_file(path, MAX_PEM_BYTES))
    except HardwareKeyError as error:
        raise HardwareKeyError(
            f"{path}: the SSH key is in a hardware token, which VNet cannot use: ask your "
            "administrator for a login without hardware key policy"
        ) from error
    except (CredentialError, UnreadableError) as error:
        raise _again(path, profile, error) from error


def read_certificate(
    home: Path, profile: Profile, key: SshPrivateKey, clusters: Sequence[str]
) -> UserCertificate:
    """The certificate for the first of these clusters that has one.

    Raises:
        NoSshLoginError: none has, or it cannot be used.
    """
    folder = _folder(home, profile) / f"{profile.user}-ssh"
    for cluster in clusters:
        if "/" in cluster:
            continue  # no file can have this name
        path = folder / f"{cluster}-cert.pub"
        try:
            return user_certificate(key, read_file(path, MAX_CERTIFICATE_BYTES))
        except MissingError:
            continue
        except (CredentialError, UnreadableError) as error:
            raise _again(path, profile, error) from error
    raise _again(folder, profile, f"no SSH certificate for cluster {clusters[-1]}")


def read_authorities(home: Path, cluster: str) -> tuple[bytes, ...]:
    """The host authorities of a cluster that tsh has written down; may be none.

    Raises:
        UnreachableError: the file is there and cannot be read.
    """
    path = home / "known_hosts"
    try:
        return known_authorities(read_file(path, MAX_KNOWN_HOSTS_BYTES), cluster)
    except MissingError:
        return ()
    except UnreadableError as error:
        raise UnreachableError(f"{path}: {error}") from error


def _folder(home: Path, profile: Profile) -> Path:
    return home / "keys" / profile.name


def _again(path: Path, profile: Profile, why: object) -> NoSshLoginError:
    text = safe_text(f"{path}: {why}")
    return NoSshLoginError(f"{text}: run tsh login --proxy={profile.address}")

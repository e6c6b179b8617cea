"""What VNet writes for OpenSSH clients: a configuration and the host keys to trust. Pure.

Source: `lib/vnet/opensshconfig.go` of Teleport; ssh_config(5), sshd(8) (SSH_KNOWN_HOSTS FILE FORMAT).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from workers.proxy.teleport.names import normalise

IDENTITY: Final = "id_vnet"
IDENTITY_PUBLIC: Final = "id_vnet.pub"
HOST_KEY: Final = "vnet_host_key"
KNOWN_HOSTS: Final = "vnet_known_hosts"
CLIENT_CONFIG: Final = "vnet_ssh_config"

BANNER: Final = """\
# VNet writes this file while it runs, and removes it when it stops: changes are lost.
# It is for OpenSSH clients that connect to Teleport's SSH servers through VNet. To have them
# read it: vnet ssh-config --install. To use it once: ssh -F <this file> <user>@<host>.<cluster>.
# Settings of your own for these hosts belong into ~/.ssh/config.
"""
_NOBODY: Final = "# There is no cluster: log in with tsh login.\n"
# Foreign text: a pattern has other characters, as have the words and lines of a configuration.
_CLUSTER_NAME: Final = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,252}")

_AUTHORITY: Final = re.compile(
    rb"^@cert-authority \* (ssh-ed25519 [A-Za-z0-9+/=]{16,200})$", re.MULTILINE
)


class UnwritablePathError(Exception):
    """OpenSSH has no way to write this path down."""


def client_config(home: Path, clusters: Iterable[str]) -> str:
    """`vnet_ssh_config` for a tsh home and the names of all clusters.

    Raises:
        UnwritablePathError: see there.
    """
    patterns = host_patterns(clusters)
    if not patterns:
        return f"{BANNER}\n{_NOBODY}"
    lines = [
        f"Host {' '.join(patterns)}",
        # Of these two only the first may have tokens.
        f"    IdentityFile {_quoted(home / IDENTITY).replace('%', '%%')}",
        f"    GlobalKnownHostsFile {_quoted(home / KNOWN_HOSTS)}",
        "    UserKnownHostsFile /dev/null",
        "    StrictHostKeyChecking yes",
        "    IdentitiesOnly yes",
        "",
    ]
    return f"{BANNER}\n" + "\n".join(lines)


def host_patterns(clusters: Iterable[str]) -> list[str]:
    """`*.<cluster>` for all, in order; then the same for names that end with a dot."""
    # OpenSSH compares the name as it was typed.
    names = sorted({normalise(name.strip(".")) for name in clusters})
    usable = [name for name in names if _CLUSTER_NAME.fullmatch(name)]
    return [f"*.{name}" for name in usable] + [f"*.{name}." for name in usable]


def known_hosts(authority: bytes, plain_key: bytes, predecessor: bytes = b"") -> bytes:
    """`vnet_known_hosts`: the authority of host certificates, and the key of clients that know none.

    Both are lines as OpenSSH has them for public keys, `ssh-ed25519 AAAA...`. So is `predecessor`, an
    authority that counts beside the other one.
    """
    own = b"@cert-authority * %s\n* %s\n" % (authority, plain_key)
    return own + b"@cert-authority * %s\n" % predecessor if predecessor else own


def authority_in(known_hosts: bytes) -> bytes:
    """The first authority of a `vnet_known_hosts`; empty if it has none."""
    found = _AUTHORITY.search(known_hosts)
    return found[1] if found else b""


def _quoted(path: Path) -> str:
    text = str(path)
    # OpenSSH takes ${NAME} for a variable, and what ends a line for its end; neither can be escaped.
    if "${" in text or any(letter in text for letter in "\n\r\0"):
        raise UnwritablePathError(
            f"OpenSSH cannot be told of a path like {text!r}: choose another TELEPORT_HOME"
        )
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

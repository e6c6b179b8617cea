"""`/etc/resolv.conf` (resolv.conf(5)). Pure."""

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

# resolv.conf(5): MAXNS is 3 for the C library; VNet asks all that are named, within reason.
MAX_SERVERS = 8
MAX_SERVERS_OF_LIBC: Final = 3
# Where systemd-resolved answers for all (systemd-resolved.service(8)).
STUBS: Final = frozenset({"127.0.0.53", "127.0.0.54"})
MARK: Final = (
    "# VNet asks for you while it runs; the file that was here comes back when it stops.\n"
)


def nameservers(text: str) -> list[tuple[str, str]]:
    """(address, interface of a link-local address or "") of each valid nameserver line."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        server = _server(line)
        if server is not None and server not in found:
            found.append(server)
    return found[:MAX_SERVERS]


def compose(before: str, own: Sequence[str], others: Sequence[tuple[str, str]]) -> str:
    """A file that has VNet asked first; search, options and the like stay as in `before`.

    `own` are VNet's addresses, IPv4 first. `others` are asked when VNet does not answer, so that
    names go on to be found should it die: then one address of VNet's is enough, since the C
    library knows only three. Where it would ask them in turn (`options rotate`) they are left out.
    """
    if rotates(before) or not others:
        servers = list(own)
    else:
        servers = [*own[:1], *(f"{host}%{scope}" if scope else host for host, scope in others)]
    lines = [MARK, *(f"nameserver {server}\n" for server in servers[:MAX_SERVERS_OF_LIBC])]
    for line in before.splitlines():
        words = line.split()
        if words and words[0] != "nameserver" and words[0][0] not in "#;":
            lines.append(f"{line}\n")
    return "".join(lines)


def rotates(text: str) -> bool:
    """Whether all nameservers are asked in turn."""
    lines = (line.split() for line in text.splitlines())
    return any(words[:1] == ["options"] and "rotate" in words for words in lines)


def without_vnet(text: str, own: Sequence[str]) -> str:
    """The file without VNet's lines: what another program has made of one of ours."""
    kept = []
    for line in text.splitlines(keepends=True):
        server = _server(line)
        if line.strip() != MARK.strip() and (server is None or server[0] not in own):
            kept.append(line)
    return "".join(kept)


def _server(line: str) -> tuple[str, str] | None:
    words = line.partition("#")[0].partition(";")[0].split()
    if len(words) < 2 or words[0] != "nameserver":
        return None
    host, _, scope = words[1].partition("%")
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return None if address.is_unspecified else (str(address), scope)

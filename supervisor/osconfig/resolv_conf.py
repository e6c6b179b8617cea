"""`/etc/resolv.conf` (resolv.conf(5)). Pure."""

from ipaddress import ip_address

# resolv.conf(5): MAXNS is 3 for the C library; VNet asks all that are named, within reason.
MAX_SERVERS = 8


def nameservers(text: str) -> list[tuple[str, str]]:
    """(address, interface of a link-local address or "") of each valid nameserver line."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        words = line.split("#")[0].split(";")[0].split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        host, _, scope = words[1].partition("%")
        try:
            address = ip_address(host)
        except ValueError:
            continue
        if not address.is_unspecified and (str(address), scope) not in found:
            found.append((str(address), scope))
    return found[:MAX_SERVERS]

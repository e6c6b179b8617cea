"""What `security.http_hosts` and `security.http_origins` may hold. Pure."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address

ANYTHING = "*"
# Both tables go to each proxy in one message, beside the users who may connect.
MAX_RULES_BYTES = 64 * 1024

_NAME = r"(?=.{1,253}(?:[:/]|$))[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*"
_IS_NAME = re.compile(_NAME)
_IS_ORIGIN = re.compile(
    rf"([a-z][a-z0-9+.-]*)://(?:{_NAME}|\[[0-9a-f:.]+\])(?::([1-9][0-9]{{0,4}}))?"
)
_IS_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# An origin does not have the port that its scheme has anyway: RFC 6454, section 6.2.
_DEFAULT_PORTS = {"http": "80", "ws": "80", "https": "443", "wss": "443"}

Rules = Mapping[str, Sequence[str]]
Check = tuple[str, object, Callable[[str], bool], str]


def checks(hosts: Rules, origins: Rules) -> Iterator[Check]:
    """For each name and value: its key, itself, whether it can be, and what it must be."""
    for section, rules, is_right, hint in (
        (
            "http_hosts",
            hosts,
            is_host,
            "must be a host as requests name it ('name', '192.0.2.1' or '[2001:db8::1]'), or '*'",
        ),
        (
            "http_origins",
            origins,
            is_origin,
            "must be an origin as browsers send it ('https://name' or 'https://name:8443'), or '*'",
        ),
    ):
        for name, values in rules.items():
            key = f"security.{section}"
            yield key, name, is_name, "must be by the full DNS name of an app in lower case"
            for index, value in enumerate(values):
                yield f"{key}.{name!r}[{index}]", value, is_right, hint
    if size_of(hosts) + size_of(origins) > MAX_RULES_BYTES:
        why = f"must have at most {MAX_RULES_BYTES} bytes together with http_origins"
        yield "security.http_hosts", f"{len(hosts)} names", lambda _: False, why


def is_name(text: str) -> bool:
    """Whether it can be the DNS name of an app: lower case, no final dot, no address."""
    return _IS_NAME.fullmatch(text) is not None and not _ends_in_number(text)


def is_host(text: str) -> bool:
    """Whether it can be the host of a request that is right: a name, an address, or anything."""
    return text == ANYTHING or is_name(text) or _is_address(text)


def is_origin(text: str) -> bool:
    """Whether a browser can send this as Origin (RFC 6454, section 6.2), or it is anything.

    "null" is none: every page can have that one, so allowing it is allowing anything.
    """
    if text == ANYTHING:
        return True
    found = _IS_ORIGIN.fullmatch(text)
    if found is None:
        return False
    scheme, port = found.groups()
    return port is None or (int(port) < 65536 and port != _DEFAULT_PORTS.get(scheme))


def size_of(rules: Rules) -> int:
    """At least its bytes in a message."""
    lengths = (len(text.encode()) + 5 for name, values in rules.items() for text in (name, *values))
    return sum(lengths) + 5 * len(rules)


def _is_address(text: str) -> bool:
    """As browsers write it: IPv6 in brackets and in its shortest form."""
    try:
        address = ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return text == (f"[{address}]" if address.version == 6 else str(address))


def _ends_in_number(name: str) -> bool:
    """Whether it is an IPv4 address to a browser (URL standard, "ends in a number")."""
    return _IS_NUMBER.fullmatch(name.rpartition(".")[2]) is not None

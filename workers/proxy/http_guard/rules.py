"""What a request has to name, and which other sites may make one. Pure.

Sources: RFC 9110 sections 4.2.3, 7.2 and 7.4; RFC 6454 section 7 (Origin); W3C Fetch Metadata
(Sec-Fetch-Site, Sec-Fetch-Mode); WICG Private Network Access (the fields of its preflight).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ipc.messages import HttpRules
from workers.proxy.http_guard.refusal import RequestRefusedError

ANYTHING: Final = "*"

# Fields of a request that count here, beside those of its framing.
CHECKED_FIELDS: Final = frozenset(
    (
        b"host",
        b"origin",
        b"sec-fetch-site",
        b"sec-fetch-mode",
        b"access-control-request-private-network",
        b"access-control-request-local-network",
    )
)
_PRIVATE_NETWORK: Final = (
    b"access-control-request-private-network",
    b"access-control-request-local-network",
)

_AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z._-]{1,255})(?::([0-9]{0,5}))?")
_ORIGIN = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]{0,31}://([^/?#@\s]{1,300})")
_MAX_PORT: Final = 65535
_FROM_NOWHERE: Final = "its page does not say its site (Origin: null)"
_DEFAULT_PORTS: Final = (("http://", ":80"), ("https://", ":443"))

Fields = Mapping[bytes, list[bytes]]


@dataclass(frozen=True, slots=True)
class Rules:
    """For the requests to one app. Texts are in lower case; names have no final dot."""

    names: frozenset[bytes]
    origins: frozenset[bytes]  # of other sites: scheme://host[:port], or "null"
    any_origin: bool


def rules_for(name: str, http: HttpRules) -> Rules | None:
    """The rules for the app of this DNS name; None when nothing of it is to be checked."""
    key = _plain(name)
    hosts = http.hosts.get(key, [])
    if not http.is_checked or ANYTHING in hosts:
        return None
    origins = http.origins.get(key, [])
    return Rules(
        names=frozenset(_plain(host).encode() for host in (key, *hosts) if _plain(host)),
        origins=frozenset(_plain_origin(origin).encode() for origin in origins),
        any_origin=ANYTHING in origins,
    )


def check_request(rules: Rules, method: bytes, authority: bytes | None, fields: Fields) -> None:
    """Whether this request is meant for the app. `authority` is that of the target, if it has one.

    Raises:
        RequestRefusedError: it is not, or that cannot be told for sure.
    """
    hosts = fields.get(b"host", [])
    if len(hosts) > 1:
        raise RequestRefusedError(400, "it has more than one Host")
    named = hosts if authority is None else [authority, *hosts]
    if not named:
        raise RequestRefusedError(421, "it has no Host")
    names = [name_in(value) for value in named]
    for value, name in zip(named, names, strict=True):
        if name not in rules.names:
            raise RequestRefusedError(421, "the Host is not a name of the app", host=value)
    if names[0] != names[-1]:
        raise RequestRefusedError(400, "its target and its Host do not agree", host=hosts[0])
    _check_site(rules, method, named[-1], fields)


def _check_site(rules: Rules, method: bytes, host: bytes, fields: Fields) -> None:
    origins = fields.get(b"origin", [])
    if len(origins) > 1:
        raise RequestRefusedError(400, "it has more than one Origin", host=host)
    is_allowed = rules.any_origin or any(origin.lower() in rules.origins for origin in origins)
    if is_allowed:
        return
    if origins and name_in_origin(origins[0]) not in rules.names:
        is_null = origins[0] == b"null"  # of a sandboxed frame, or without a referrer
        raise RequestRefusedError(
            403, _FROM_NOWHERE if is_null else "a page of another site makes it", host=host
        )
    sites = fields.get(b"sec-fetch-site", [])
    if any(site.lower() == b"cross-site" for site in sites):
        modes = fields.get(b"sec-fetch-mode", [])
        # A link to the app is no harm: the page that has it learns nothing of the answer.
        if [mode.lower() for mode in modes] != [b"navigate"]:
            raise RequestRefusedError(403, "a page of another site makes it", host=host)
    if method == b"OPTIONS" and any(name in fields for name in _PRIVATE_NETWORK):
        raise RequestRefusedError(403, "a page of a public site asks for this network", host=host)


def name_in(authority: bytes) -> bytes | None:
    """The host of `host[:port]` in lower case, without its final dot; None if it is none.

    The port may be empty (RFC 3986 section 3.2.3), and its number does not matter.
    """
    matched = _AUTHORITY.fullmatch(authority)
    if matched is None or int(matched[2] or 0) > _MAX_PORT:
        return None
    return matched[1].lower().removesuffix(b".")


def name_in_origin(origin: bytes) -> bytes | None:
    """The host of `scheme://host[:port]`, as `name_in` has it; None if it is none."""
    matched = _ORIGIN.fullmatch(origin)
    return None if matched is None else name_in(matched[1])


def _plain(name: str) -> str:
    return name.lower().removesuffix(".")


def _plain_origin(origin: str) -> str:
    """As browsers write it, without the default port."""
    plain = origin.lower().removesuffix("/")
    for scheme, port in _DEFAULT_PORTS:
        if plain.startswith(scheme):
            return plain.removesuffix(port)
    return plain

"""Forward proxies: which one the environment names for a host, and the talk with it. Pure.

    HTTPS_PROXY, else HTTP_PROXY    http://[user:password@]host[:port], https://..., or host:port
    NO_PROXY                        name, .name, *.name, address, network (10.0.0.0/8), or *; each
                                    but * with :port if wanted; between commas

Upper case is read before lower case. A name stands for its sub-domains too, with a dot in front for
these alone. This machine itself (localhost, 127.0.0.0/8, ::1) is never reached through a proxy.

Source: RFC 9110 sections 9.3.6 and 11.7; Go, golang.org/x/net/http/httpproxy; Teleport,
api/utils/proxy.go (a host and port without scheme are tried as https, then as http).
"""

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes, urlsplit

from workers.proxy.http_head import USER_AGENT, HttpHead, HttpHeadError, authority, describe
from workers.proxy.layers import LayerError

_DEFAULT_PORTS = {"http": 80, "https": 443}
# Some forward proxies (tinyproxy) say 401 to a wrong password.
_AUTHENTICATION_REQUIRED = frozenset({401, 407})

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class ForwardProxyError(LayerError):
    """The forward proxy cannot be used, or did not agree. The text does not say which it is."""


def proxy_for(host: str, port: int, environment: Mapping[str, str]) -> str:
    """The URL of the forward proxy for connections to `host` (name or address), or empty."""
    url = _first(environment, "HTTPS_PROXY")
    if not url and "REQUEST_METHOD" not in environment:  # CGI: a request could have set HTTP_PROXY
        url = _first(environment, "HTTP_PROXY")
    if not url or _is_excepted(host.lower(), port, _first(environment, "NO_PROXY")):
        return ""
    return url if "://" in url else f"http://{url}"


def _first(environment: Mapping[str, str], name: str) -> str:
    return (environment.get(name) or environment.get(name.lower()) or "").strip()


def _is_excepted(host: str, port: int, no_proxy: str) -> bool:
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    return any(
        _covers(entry, host, address, port)
        for entry in (part.strip().lower() for part in no_proxy.split(","))
        if entry
    )


def _covers(entry: str, host: str, address: _Address | None, port: int) -> bool:
    """Whether one entry of NO_PROXY is about this host; malformed ones are about none."""
    if entry == "*":
        return True
    if "/" in entry:
        try:
            network = ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
        return address is not None and address in network
    name, entry_port = _split_port(entry)
    if entry_port and entry_port != str(port):
        return False
    if (excepted := _address(name)) is not None:
        return excepted == address
    name = name.removeprefix("*")
    if name.startswith("."):
        return host.endswith(name)
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _split_port(entry: str) -> tuple[str, str]:
    """Name or address and port of `name:port` and `[address]:port`; the port may be missing."""
    name, separator, port = entry.rpartition(":")
    if not separator or entry.endswith("]") or (":" in name and not name.endswith("]")):
        name, port = entry, ""  # without port: a name or an IPv6 address
    return name.removeprefix("[").removesuffix("]"), port


def _address(text: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


@dataclass(frozen=True, slots=True)
class ForwardProxy:
    """One forward proxy. `str` of it names it without user and password."""

    host: str
    port: int
    is_tls: bool  # between us and the forward proxy
    authorization: str = field(default="", repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}"


def parse_proxy(url: str) -> ForwardProxy:
    """Takes the URL of a forward proxy apart.

    Raises:
        ForwardProxyError: it is none, or of a kind that cannot be used.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ForwardProxyError("HTTPS_PROXY is no URL of a forward proxy") from error
    if parts.scheme not in _DEFAULT_PORTS:
        raise ForwardProxyError("HTTPS_PROXY is of a kind that cannot be used: set an http:// URL")
    if not host:
        raise ForwardProxyError("HTTPS_PROXY names no host")
    credentials = ""
    if parts.username is not None or parts.password is not None:
        user, password = (unquote_to_bytes(part or "") for part in (parts.username, parts.password))
        credentials = "Basic " + base64.b64encode(user + b":" + password).decode()
    return ForwardProxy(
        host, port or _DEFAULT_PORTS[parts.scheme], parts.scheme == "https", credentials
    )


class ProxyConnect:
    """One CONNECT and its answer. Send `request`, then `feed` what comes."""

    __slots__ = ("_head", "request")

    def __init__(self, host: str, port: int, authorization: str = "") -> None:
        """`host` and `port` are where the forward proxy shall connect to.

        Raises:
            ForwardProxyError: this is no host.
        """
        self._head = HttpHead()
        try:
            where = authority(host, port)
        except HttpHeadError as error:
            raise ForwardProxyError(str(error)) from error
        lines = [f"CONNECT {where} HTTP/1.1", f"Host: {where}", f"User-Agent: {USER_AGENT}"]
        if authorization:
            lines.append(f"Proxy-Authorization: {authorization}")
        self.request = "\r\n".join([*lines, "", ""]).encode("ascii")

    def feed(self, data: bytes | memoryview) -> bytes | None:
        """The first bytes from the host (may be none) once connected; None until then.

        Raises:
            ForwardProxyError: the forward proxy did not connect, or this is no answer.
        """
        try:
            rest = self._head.feed(data)
        except HttpHeadError as error:
            raise ForwardProxyError(str(error)) from error
        if rest is not None:
            self._check(self._head.status)
        return rest

    def _check(self, status: int) -> None:
        if status in _AUTHENTICATION_REQUIRED:
            raise ForwardProxyError(
                "the forward proxy wants a user name and password, or others: set HTTPS_PROXY to"
                " http://user:password@host:port"
            )
        if not 200 <= status < 300:
            raise ForwardProxyError(f"the forward proxy answered {describe(status)}")

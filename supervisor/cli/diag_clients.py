"""What `vnet diag` finds out with the Teleport client: logins, and the way to their proxies.

As the caller, with the caller's environment. The client is imported when it is needed.
"""

import asyncio
import email.utils
import os
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from supervisor.diag.facts import HomeFacts, LoginFacts, ProxyFacts
from supervisor.diag.parallel import Failed, run_all
from supervisor.diag.proxy_check import NO_ANSWER

if TYPE_CHECKING:
    from workers.proxy.teleport.home import Login

LOOKUP_SECONDS: Final = 5.0
CONNECT_SECONDS: Final = 4.0
TALK_SECONDS: Final = 8.0
MAX_PROXIES: Final = 16
MAX_ADDRESSES: Final = 8
MAX_HEAD_BYTES: Final = 16 * 1024


def read_home_facts(directory: Path) -> HomeFacts:
    """The logins of a tsh home, without any key."""
    from workers.proxy.teleport.home import read_home  # noqa: PLC0415  # the client; see test_imports

    home = read_home(directory)
    now = datetime.now(UTC)
    return HomeFacts(
        str(directory), home.problem, tuple(_facts(login, now) for login in home.logins)
    )


def _facts(login: "Login", now: datetime) -> LoginFacts:
    state, problem = login.state_at(now)
    identity = None if login.credentials is None else login.credentials.identity
    return LoginFacts(
        profile=login.name,
        user="" if login.profile is None else login.profile.user,
        state=state.value,
        problem=problem,
        not_before=None if identity is None else identity.not_before,
        not_after=None if identity is None else identity.not_after,
    )


def probe_proxies(
    directory: Path, ca_file: str, *, insecure: bool, environment: Mapping[str, str]
) -> tuple[ProxyFacts, ...]:
    """The proxies of all logins, at the same time."""
    import uvloop  # noqa: PLC0415  # with the client

    from workers.proxy.teleport.home import read_home  # noqa: PLC0415  # see read_home_facts

    found = [login for login in read_home(directory).logins if login.credentials is not None]
    logins = found[:MAX_PROXIES]
    urls = [_forward_proxy(login, environment) for login in logins]
    # Not by the event loop, which could not end before the C library does. Who is behind a forward
    # proxy may know no names of the outside.
    lookups = run_all(
        {
            login.name: partial(_look_up, login)
            for login, url in zip(logins, urls, strict=True)
            if not url
        },
        LOOKUP_SECONDS,
    )

    async def probe_all() -> tuple[ProxyFacts, ...]:
        probes = [
            _Probe(login, ca_file, insecure, environment, url).run(lookups.get(login.name))
            for login, url in zip(logins, urls, strict=True)
        ]
        return tuple(await asyncio.gather(*probes))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(probe_all())


def _forward_proxy(login: "Login", environment: Mapping[str, str]) -> str:
    """The URL of a forward proxy, which may hold a password, or empty."""
    from workers.proxy.http_proxy import proxy_for  # noqa: PLC0415  # see read_home_facts

    assert login.profile is not None
    return proxy_for(login.profile.web_host, login.profile.web_port, environment)


def _look_up(login: "Login") -> list[str]:
    """The addresses of a proxy, as programs get them. Raises OSError, UnicodeError."""
    assert login.profile is not None
    host, port = login.profile.web_host, login.profile.web_port
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))[:MAX_ADDRESSES]


@dataclass(frozen=True, slots=True)
class _Web:
    """What the web port said."""

    error: str = ""
    is_untrusted: bool = False
    skew_seconds: float | None = None
    skew_error_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Probe:
    login: "Login"
    ca_file: str
    insecure: bool
    environment: Mapping[str, str] = field(repr=False)
    # Of the forward proxy; may hold a password.
    url: str = field(repr=False)

    async def run(self, lookup: list[str] | Failed[list[str]] | None) -> ProxyFacts:
        from workers.proxy.http_proxy import (  # noqa: PLC0415  # see read_home_facts
            ForwardProxyError,
            parse_proxy,
        )

        profile, credentials = self.login.profile, self.login.credentials
        assert profile is not None
        assert credentials is not None
        host, port = profile.web_host, profile.web_port
        addresses = lookup if isinstance(lookup, list) else []
        error = ""
        if isinstance(lookup, Failed):
            error = str(getattr(lookup.error, "strerror", "") or lookup.error)
        forward_proxy = ""
        if self.url:
            try:
                forward_proxy = str(parse_proxy(self.url))
            except ForwardProxyError as failure:
                forward_proxy = f"a forward proxy that cannot be used ({failure})"
        connects: list[tuple[str, str]] = []
        web, auth = _Web(), ("", "")
        if not error:
            connects, web, auth = await asyncio.gather(
                _connect_all(addresses, port), self._ask_web(host, port), self._ask_auth()
            )
        return ProxyFacts(
            profile=self.login.name,
            address=profile.address,
            cluster=credentials.identity.root_cluster,
            lookup_error=error,
            forward_proxy=forward_proxy,
            connects=tuple(connects),
            web_error=web.error,
            is_untrusted=web.is_untrusted,
            auth_error=auth[1],
            server_version=auth[0],
            skew_seconds=web.skew_seconds,
            skew_error_seconds=web.skew_error_seconds,
        )

    async def _ask_web(self, host: str, port: int) -> _Web:
        from workers.proxy.dial import DialError, connect_tcp  # noqa: PLC0415  # see read_home_facts
        from workers.proxy.teleport.contexts import upgrade_context  # noqa: PLC0415
        from workers.proxy.teleport.errors import MisconfiguredError  # noqa: PLC0415

        try:
            # The same trust as for apps; what is spoken is HTTP.
            context = upgrade_context(ca_file=self.ca_file, insecure=self.insecure)
            context.set_alpn_protocols(["http/1.1"])
            async with asyncio.timeout(TALK_SECONDS):
                sock = await connect_tcp(host, port, http_proxy=self.url)
                reader, writer = await asyncio.open_connection(
                    sock=sock, ssl=context, server_hostname=host
                )
                try:
                    began = time.monotonic()
                    writer.write(_request(host))
                    head = await reader.readuntil(b"\r\n\r\n")
                    took = time.monotonic() - began
                finally:
                    writer.close()
        except ssl.SSLCertVerificationError as error:
            return _Web(str(error.verify_message), is_untrusted=True)
        except TimeoutError:
            return _Web(f"no answer within {TALK_SECONDS:g} s")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return _Web("it answers with something that is no HTTP")
        except (DialError, MisconfiguredError) as error:
            return _Web(str(error))
        except OSError as error:
            return _Web(error.strerror or str(error))
        date = date_of(head)
        return _Web() if date is None else _Web("", False, *skew_of(date, datetime.now(UTC), took))

    async def _ask_auth(self) -> tuple[str, str]:
        """(version of the server, error)."""
        from workers.proxy.teleport.auth_client import Connector  # noqa: PLC0415  # as above
        from workers.proxy.teleport.errors import TeleportError, safe_text  # noqa: PLC0415

        state, _ = self.login.state_at(datetime.now(UTC))
        if state.value != "ok":
            return "", ""  # it would refuse, and the login is told elsewhere
        try:
            connector = Connector(
                ca_file=self.ca_file,
                insecure=self.insecure,
                environment=self.environment,
                timeout_seconds=TALK_SECONDS,
            )
            client = connector(self.login)
            try:
                answer = await client.ping()
            finally:
                client.close()
        except TeleportError as error:
            return "", str(error)
        return safe_text(answer.ServerVersion, 40) or "of an unknown version", ""


def _request(host: str) -> bytes:
    shown = f"[{host}]" if ":" in host else host
    lines = ["GET /webapi/ping HTTP/1.1", f"Host: {shown}", "Accept: application/json"]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode()


def date_of(head: bytes) -> datetime | None:
    """The Date of the head of an HTTP response (RFC 9110 section 6.6.1). Pure."""
    for line in head[:MAX_HEAD_BYTES].split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"date":
            try:
                found = email.utils.parsedate_to_datetime(value.strip().decode("ascii"))
            except (ValueError, UnicodeError):
                return None
            return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return None


def skew_of(date: datetime, now: datetime, took: float) -> tuple[float, float]:
    """How many seconds the server's clock is ahead of ours, and how far that may be wrong. Pure.

    `now` is when the answer was there, `took` seconds after the question was sent.
    """
    # The date has whole seconds, and was written at some moment of the exchange.
    skew = date.timestamp() + 0.5 - (now.timestamp() - took / 2)
    return skew, 0.5 + took / 2


async def _connect_all(addresses: list[str], port: int) -> list[tuple[str, str]]:
    errors = await asyncio.gather(*(_connect(address, port) for address in addresses))
    return list(zip(addresses, errors, strict=True))


async def _connect(address: str, port: int) -> str:
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(address, port)
    except TimeoutError:
        return f"{NO_ANSWER} within {CONNECT_SECONDS:g} s"
    except OSError as error:
        # asyncio puts words of its own into strerror.
        return os.strerror(error.errno) if error.errno else str(error)
    writer.close()
    return ""

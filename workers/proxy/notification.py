"""Tells the user's desktop that a second factor is wanted. Best effort: without one nothing happens.

Source: https://specifications.freedesktop.org/notification-spec/ (org.freedesktop.Notifications)
and the D-Bus specification's session bus.
"""

import asyncio
import html
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import inf
from pathlib import Path

from jeepney import (  # type: ignore[import-untyped]  # it has no type hints
    AuthenticationError,
    DBusAddress,
    HeaderFields,
    Message,
    MessageType,
    message_bus,
    new_method_call,
)
from jeepney.auth import BEGIN, Authenticator  # type: ignore[import-untyped]  # see above
from jeepney.bus import get_connectable_addresses  # type: ignore[import-untyped]  # see above
from jeepney.io.asyncio import DBusConnection  # type: ignore[import-untyped]  # see above

from workers.proxy.teleport.errors import safe_text
from workers.proxy.teleport.mfa import MfaQuestion

log = logging.getLogger(__name__)

# A desktop that has not answered by then will not be waited for.
TIMEOUT_SECONDS = 2.0
# A program that opens many connections must not cover the screen.
PAUSE_SECONDS = 5.0
_NOTIFICATIONS = DBusAddress(
    "/org/freedesktop/Notifications",
    bus_name="org.freedesktop.Notifications",
    interface="org.freedesktop.Notifications",
)
_NORMAL_URGENCY = ("y", 1)
_MAX_TEXT = 200


class DesktopNotifier:
    """Called with a question, shows it on the desktop, unless it has shown one just now."""

    def __init__(
        self, environment: Mapping[str, str] = os.environ, user_dir: Path | None = None
    ) -> None:
        self._environment = environment
        self._user_dir = user_dir or Path(f"/run/user/{os.getuid()}")
        self._shown_at = -inf
        self._task: asyncio.Task[None] | None = None

    def __call__(self, question: MfaQuestion) -> None:
        """Returns at once; what fails is logged at level debug."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._shown_at < PAUSE_SECONDS:
            return
        self._shown_at = loop.time()
        # The pause is longer than the timeout, so an earlier one has ended.
        self._task = loop.create_task(self._show(notification(question)))

    async def close(self) -> None:
        """Ends what runs."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _show(self, message: Message) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                for address in self._addresses():
                    if await _is_shown(address, message):
                        return
        except TimeoutError:
            log.debug("the desktop did not answer within %g s", TIMEOUT_SECONDS)

    def _addresses(self) -> Iterator[str]:
        """Paths of session buses; an abstract socket begins with a zero character."""
        configured = self._environment.get("DBUS_SESSION_BUS_ADDRESS", "")
        if configured:
            # The library says ValueError and RuntimeError to an address that it does not know.
            with suppress(ValueError, RuntimeError):
                yield from get_connectable_addresses(configured)
        yield str(self._user_dir / "bus")


def notification(question: MfaQuestion) -> Message:
    """The call that shows a question. Pure.

    The body may hold markup, so what the cluster says is escaped.
    """
    where = html.escape(safe_text(f"{question.target} in {question.cluster}", _MAX_TEXT))
    return new_method_call(
        _NOTIFICATIONS,
        "Notify",
        "susssasa{sv}i",
        (
            "VNet",
            0,
            "dialog-password",
            "VNet waits for a second factor",
            f"{where}: run vnet mfa",
            [],
            {"urgency": _NORMAL_URGENCY},
            int(question.seconds * 1000),
        ),
    )


async def _is_shown(address: str, message: Message) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(address)
    except OSError as error:
        log.debug("no desktop at %s: %s", address, error)
        return False
    try:
        return await _call(reader, writer, message)
    except (OSError, EOFError, AuthenticationError, ValueError) as error:
        log.debug("the desktop at %s: %s", address, error)
        return False
    finally:
        writer.close()


async def _call(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: Message
) -> bool:
    authenticator = Authenticator()
    for data in authenticator:
        writer.write(data)
        answer = await reader.read(1024)
        if not answer:
            raise EOFError("it does not want this user")
        authenticator.feed(answer)
    writer.write(BEGIN)
    connection = DBusConnection(reader, writer)
    await connection.send(message_bus.Hello(), serial=1)
    await connection.send(message, serial=2)
    while True:
        reply = await connection.receive()
        if reply.header.fields.get(HeaderFields.reply_serial) == 2:
            break
    if reply.header.message_type is MessageType.error:
        log.debug("the desktop shows nothing: %s", safe_text(str(reply.body), _MAX_TEXT))
        return False
    return True

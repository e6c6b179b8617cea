"""Calls over the system bus, each with a time limit. For one thread.

Source: the D-Bus specification (message bus, names, errors). Services are never started by a call: what
does not run has been left out on purpose. jeepney is imported with the first call, so that what only
looks at names of this module needs none.
"""

import itertools
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

if TYPE_CHECKING:
    import socket

# For everything that belongs together, such as all settings of one link.
LIMIT_SECONDS: Final = 2.0
# The answers wanted here have a few kilobytes.
MAX_ANSWER: Final = 1024 * 1024
_READ_SIZE: Final = 64 * 1024
_MAX_TEXT: Final = 200
_DEFAULT_ADDRESS: Final = "unix:path=/var/run/dbus/system_bus_socket"
_BUS: Final = "org.freedesktop.DBus"
_ERRORS: Final = f"{_BUS}.Error"
_NO_OWNER: Final = (f"{_ERRORS}.NameHasNoOwner", f"{_ERRORS}.ServiceUnknown")
UNKNOWN_METHOD: Final = f"{_ERRORS}.UnknownMethod"

T = TypeVar("T")


class BusError(Exception):
    """A call failed; the text is a clause without a full stop."""


class NoBusError(BusError):
    """There is no system bus, or it does not answer."""


class NoServiceError(BusError):
    """Nobody has the name that was called."""


class NoAnswerError(BusError):
    """The service has the name, but does not answer."""


class RefusedError(BusError):
    """The service answered with an error; `name` is the error's D-Bus name."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{text or name} ({name})" if text else name)
        self.name = name


@dataclass(frozen=True, slots=True)
class Call:
    """A method call.

    `body` has the values for `signature`: lists for arrays, tuples for structures, bytes for "ay",
    (signature, value) for variants.
    """

    service: str
    path: str
    interface: str
    member: str
    signature: str = ""
    body: tuple[object, ...] = ()


def get_properties(service: str, path: str, interface: str) -> Call:
    """The call that asks for all properties of an interface."""
    return Call(service, path, f"{_BUS}.Properties", "GetAll", "s", (interface,))


def set_property(
    service: str, path: str, interface: str, name: str, signature: str, value: object
) -> Call:
    """The call that sets one property."""
    body = (interface, name, (signature, value))
    return Call(service, path, f"{_BUS}.Properties", "Set", "ssv", body)


def bus_call(member: str, name: str) -> Call:
    """A call of the bus itself that takes one name."""
    return Call(_BUS, "/org/freedesktop/DBus", _BUS, member, "s", (name,))


class SystemBus:
    """The system bus: DBUS_SYSTEM_BUS_ADDRESS, or where it is by default.

    It is connected to with the first call, and anew after the bus was restarted.
    """

    def __init__(
        self, environment: Mapping[str, str] = os.environ, processes: Path = Path("/proc")
    ) -> None:
        self._address = environment.get("DBUS_SYSTEM_BUS_ADDRESS") or _DEFAULT_ADDRESS
        self._processes = processes
        self._connection: _Connection | None = None

    def within(self, seconds: float = LIMIT_SECONDS) -> "Calls":
        """For calls that together take no longer than this."""
        return Calls(self, time.monotonic() + seconds)

    def close(self) -> None:
        """Ends the connection; a later call makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def ask(self, call: Call, deadline: float) -> tuple[Any, ...]:
        """The values of the answer. Raises BusError. See `Calls.ask`."""
        while True:
            if time.monotonic() >= deadline:
                raise NoAnswerError(f"{call.service} does not answer in time")
            connection = self._connection
            is_fresh = connection is None
            if connection is None:
                connection = self._connect(deadline)
            # Kept only if it comes out of this in order.
            self._connection = None
            try:
                answer = connection.ask(call, deadline)
            except TimeoutError as error:
                connection.close()
                raise NoAnswerError(f"{call.service} does not answer") from error
            except OSError as error:
                connection.close()
                if is_fresh:
                    raise NoBusError(f"the system bus ends the connection ({error})") from error
                # The bus was restarted since the last call. All calls here may be made twice.
                continue
            except BusError:
                connection.close()
                raise
            self._connection = connection
            return _values(answer, call.service)

    def is_here(self, pid: int) -> bool:
        """Whether this process has our network namespace; of a bus elsewhere, no process has.

        The kernel makes the files of /proc/PID/net once for each network namespace, and lets
        everybody look at them, other than at /proc/PID/ns (proc(5)).
        """
        with suppress(OSError):
            found = (self._processes / str(pid) / "net/dev").stat()
            own = (self._processes / "self/net/dev").stat()
            return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)
        return False

    def _connect(self, deadline: float) -> "_Connection":
        problem = "no address of it is known"
        for address in _connectable(self._address):
            connection = None
            try:
                connection = _Connection(address, _left(deadline))
                _values(connection.ask(_HELLO, deadline), _BUS)
            # The library says ValueError when the bus does not want this user.
            except (OSError, ValueError, BusError) as error:
                if connection is not None:
                    connection.close()
                problem = _short(str(error)) or type(error).__name__
            else:
                return connection
        raise NoBusError(f"the system bus cannot be reached ({problem})")


class Calls:
    """Calls that share one time limit. All methods raise BusError."""

    def __init__(self, bus: SystemBus, deadline: float) -> None:
        self._bus = bus
        self._deadline = deadline

    def do(self, call: Call) -> None:
        """Makes a call of which only success matters."""
        self._bus.ask(call, self._deadline)

    def ask(self, call: Call, kind: type[T]) -> T:
        """The answer's values, which must be of this kind: a tuple."""
        try:
            return msgspec.convert(self._bus.ask(call, self._deadline), kind)
        except msgspec.ValidationError as error:
            raise BusError(f"{call.service} answers {call.member} in an unknown way") from error

    def properties(self, service: str, path: str, interface: str) -> dict[str, Any]:
        """All properties of an interface, by name."""
        call = get_properties(service, path, interface)
        (found,) = self.ask(call, tuple[dict[str, tuple[str, Any]]])
        return {name: value for name, (_, value) in found.items()}

    def owner(self, service: str) -> str:
        """The unique name of who has this name now, "" if nobody has."""
        try:
            return self.ask(bus_call("GetNameOwner", service), tuple[str])[0]
        except NoServiceError:
            return ""

    def is_here(self, service: str) -> bool:
        """Whether the service sees our network interfaces, which it does not from a container."""
        try:
            (pid,) = self.ask(bus_call("GetConnectionUnixProcessID", service), tuple[int])
        except NoServiceError:
            return False
        return self._bus.is_here(pid)


_HELLO: Final = Call(_BUS, "/org/freedesktop/DBus", _BUS, "Hello")


class _Connection:
    """One connection to the bus. Errors: OSError, TimeoutError, BusError; then it is useless."""

    def __init__(self, address: str, seconds: float) -> None:
        from jeepney import (  # type: ignore[import-untyped]  # noqa: PLC0415  # see above
            Parser,
        )
        from jeepney.io.blocking import (  # type: ignore[import-untyped]  # noqa: PLC0415  # see above
            prep_socket,
        )

        self._socket: socket.socket = prep_socket(address, timeout=seconds)
        self._parser: Any = Parser()
        self._serials = itertools.count(1)

    def close(self) -> None:
        self._socket.close()

    def ask(self, call: Call, deadline: float) -> Any:
        """The message that answers the call."""
        from jeepney import HeaderFields  # noqa: PLC0415  # see above

        serial = next(self._serials)
        data = _message(call).serialise(serial=serial)
        self._socket.settimeout(_left(deadline))
        self._socket.sendall(data)
        while True:
            message = self._next_message()
            if message is None:
                self._read_more(deadline)
            elif message.header.fields.get(HeaderFields.reply_serial) == serial:
                return message

    def _read_more(self, deadline: float) -> None:
        self._socket.settimeout(_left(deadline))
        data = self._socket.recv(_READ_SIZE)
        if not data:
            raise ConnectionResetError("it was closed")
        self._parser.add_data(data)

    def _next_message(self) -> Any:
        try:
            message = self._parser.get_next_message()
            if message is None and self._parser.bytes_desired() > MAX_ANSWER:
                raise BusError("the system bus sends too large a message")
        except (ValueError, LookupError, AssertionError, struct.error) as error:
            raise BusError("the system bus sends what is no message") from error
        return message


def load_library() -> None:
    """Imports jeepney now, in a process that forks while another thread would import it later.

    In the child it would stay half imported.
    """
    import jeepney.bus  # type: ignore[import-untyped]  # noqa: PLC0415  # see above
    import jeepney.io.blocking  # type: ignore[import-untyped]  # noqa: PLC0415, F401  # see above


def _message(call: Call) -> Any:
    from jeepney import (  # noqa: PLC0415  # see above
        DBusAddress,
        MessageFlag,
        new_method_call,
    )

    address = DBusAddress(call.path, bus_name=call.service, interface=call.interface)
    message = new_method_call(address, call.member, call.signature or None, call.body)
    message.header.flags |= MessageFlag.no_auto_start
    return message


def _values(answer: Any, service: str) -> tuple[Any, ...]:
    from jeepney import HeaderFields, MessageType  # noqa: PLC0415  # see above

    if answer.header.message_type is not MessageType.error:
        return tuple(answer.body)
    name = answer.header.fields.get(HeaderFields.error_name, "")
    if name in _NO_OWNER:
        raise NoServiceError(f"nobody has the name {service} on the system bus")
    if name in (f"{_ERRORS}.NoReply", f"{_ERRORS}.Disconnected"):
        raise NoAnswerError(f"{service} went away without an answer")
    text = answer.body[0] if answer.body and isinstance(answer.body[0], str) else ""
    raise RefusedError(_short(name), _short(text).rstrip("."))


def _connectable(addresses: str) -> Iterator[str]:
    """Paths of sockets in a D-Bus address; an abstract one begins with a zero character."""
    from jeepney.bus import (  # noqa: PLC0415  # see above
        get_connectable_addresses,
    )

    # The library says ValueError and RuntimeError to an address that it does not know.
    with suppress(ValueError, RuntimeError):
        yield from get_connectable_addresses(addresses)


def _left(deadline: float) -> float:
    """Seconds that remain. Raises TimeoutError if none do."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("it does not answer in time")
    return left


def _short(text: str) -> str:
    plain = "".join(letter if letter.isprintable() else " " for letter in text[:_MAX_TEXT])
    return " ".join(plain.split())

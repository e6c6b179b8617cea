"""How long it takes until DNS answers, packets move and connects succeed again."""

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable

import dnslib
from chaos_processes import state_of

ASK_SECONDS = 0.02
GIVE_UP_SECONDS = 20.0
_ECHO, _ECHO_REPLY = 8, 0  # RFC 792


class Recovery:
    """Asks every 20 ms, from the moment at which a process has died. Times count from `began`."""

    def __init__(
        self, server: str, name: str, address: str, dial: tuple[str, int] | None = None
    ) -> None:
        """DNS is asked for `name` at `server`, `address` is pinged, and `dial` connected to."""
        self.dns: float | None = None
        self.tun: float | None = None
        self.connect: float | None = None
        self.began = time.monotonic()
        self._dial_address = dial
        self._query = dnslib.DNSRecord.question(name).pack()
        self._address = address
        self._numbers: set[int] = set()
        self._next_ask = 0.0
        self._is_down: Callable[[], bool] | None = lambda: True
        self._closing = contextlib.ExitStack()
        self._dns = self._closing.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        self._dns.connect((server, 53))
        self._icmp = self._closing.enter_context(
            socket.socket(type=socket.SOCK_RAW, proto=socket.IPPROTO_ICMP)
        )
        self._tcp: socket.socket | None = None
        for end in (self._dns, self._icmp):
            end.setblocking(False)

    def begin(self, pid: int, *, dies: bool) -> None:
        """The signal has just been sent; nothing is asked while a killed process may still answer."""
        self.began = time.monotonic()
        self._is_down = (lambda: state_of(pid) in ("", "Z", "X")) if dies else (lambda: True)

    @property
    def is_over(self) -> bool:
        """Everything works again, or never will."""
        is_back = self.dns is not None and self.tun is not None
        if self._dial_address:
            is_back = is_back and self.connect is not None
        return is_back or time.monotonic() - self.began > GIVE_UP_SECONDS

    def close(self) -> None:
        self._closing.close()

    def tick(self) -> None:
        """Asks when it is time to, and takes the answers."""
        if self._is_down is not None:
            if not self._is_down():
                return
            self._is_down = None
            self._dial()
        now = time.monotonic()
        if now >= self._next_ask:
            self._next_ask = now + ASK_SECONDS
            self._ask()
        self._take_answers()

    def _ask(self) -> None:
        number = len(self._numbers) + 1
        self._numbers.add(number)
        # A full buffer is asked again.
        with contextlib.suppress(OSError):
            self._dns.send(number.to_bytes(2, "big") + self._query[2:])
        with contextlib.suppress(OSError):
            self._icmp.sendto(_echo_request(os.getpid() & 0xFFFF, number), (self._address, 0))

    def _take_answers(self) -> None:
        passed = time.monotonic() - self.began
        with contextlib.suppress(OSError):
            while True:
                answer = self._dns.recv(4096)
                is_right = (
                    int.from_bytes(answer[:2], "big") in self._numbers and answer[3] & 15 == 0
                )
                if self.dns is None and is_right:
                    self.dns = passed
        with contextlib.suppress(OSError):
            while True:
                packet = self._icmp.recv(4096)
                kind, number = packet[20], int.from_bytes(packet[24:26], "big")
                if self.tun is None and kind == _ECHO_REPLY and number == os.getpid() & 0xFFFF:
                    self.tun = passed
        if self._tcp is not None and self.connect is None:
            assert self._dial_address is not None
            error = self._tcp.connect_ex(self._dial_address)
            if error in (0, errno.EISCONN):
                self.connect = passed
                self._tcp.close()
            elif error not in (errno.EALREADY, errno.EINPROGRESS):
                # Refused: a new attempt.
                self._tcp.close()
                self._dial()

    def _dial(self) -> None:
        if self._dial_address:
            self._tcp = self._closing.enter_context(socket.socket())
            self._tcp.setblocking(False)
            self._tcp.connect_ex(self._dial_address)


def _echo_request(identifier: int, number: int) -> bytes:
    head = struct.pack("!BBHHH", _ECHO, 0, 0, identifier, number & 0xFFFF)
    return head[:2] + checksum(head).to_bytes(2, "big") + head[4:]


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) // 2 * 2]))
    if len(data) % 2:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

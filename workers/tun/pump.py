"""Moves packets between TUN devices. With `framing` the only module here that touches them.

    outer device --read--> [fast path | inspect] --write--> inner device
    inner device --read--> [fast path | inspect] --write--> outer device

or, where packets are rewritten, from the outer device back to itself.

One wake of the event loop moves at most `batch` packets of one direction, so that the other
direction and the bus get their turn. Nothing is queued here: a packet the other device does not
take is dropped and counted, and TCP mends it. The kernel's own queue of the device (500 packets)
is the only buffer. Waiting for writability would gain nothing: a TUN device takes a packet through
the whole receiving stack inside `write`, and none was refused in any measurement.

A TUN device reads and writes exactly one packet per system call. Most of the time goes into the two
copies in the kernel; one thread per direction moved no more than this loop, for more CPU.
"""

import asyncio
import errno
import logging
from collections.abc import Callable
from typing import Final

from workers.tun import framing
from workers.tun.framing import Buffer

log = logging.getLogger(__name__)

# The largest IP packet there is, and room so that the fast path may look at fixed offsets.
_BUFFER_BYTES: Final = 65535 + 128
# Throughput is the same for 8 to 128 packets per wake (tests/workers/tun/pump_bench.py); 32 of the
# largest keep the bus waiting for about a millisecond.
DEFAULT_BATCH: Final = 32
# A device that reports errors is looked at again after this time, not in a busy loop.
_RETRY_SECONDS: Final = 1.0
# The interface is down (EIO), or was deleted while its descriptor lives on (EBADFD).
_DEVICE_DOWN: Final = frozenset({errno.EIO, errno.EBADFD, errno.ENODEV, errno.ENXIO})
# The kernel is out of room for this packet now.
_DEVICE_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})


class Device:
    """One end of the pump: a TUN descriptor, non-blocking.

    `read` and `put` move one packet; see `workers.tun.framing`.
    Counts in `counters` what it took (`packets_to_<name>`, `bytes_to_<name>`) and did not take
    (`dropped_device_full`, `dropped_device_down`, `dropped_device_refused`).
    """

    def __init__(
        self,
        name: str,
        descriptor: int,
        counters: dict[str, int],
        *,
        has_family_header: bool = False,
    ) -> None:
        self.name: Final = name
        self.descriptor: Final = descriptor
        frame = framing.with_family if has_family_header else framing.plain
        self.read, self.put = frame(descriptor)
        self._counters: Final = counters
        self._reported = False
        counters[f"packets_to_{name}"] = counters[f"bytes_to_{name}"] = 0
        for reason in ("full", "down", "refused"):
            counters.setdefault(f"dropped_device_{reason}", 0)

    def write(self, packet: Buffer) -> None:
        """Writes one packet outside the stream, a held SYN or a reset; drops it on failure."""
        try:
            self.put(packet)
        except OSError as error:
            self.count_dropped(error)
        else:
            self.count_written(1, len(packet))

    def count_written(self, packets: int, length_bytes: int) -> None:
        """So much went out."""
        self._counters[f"packets_to_{self.name}"] += packets
        self._counters[f"bytes_to_{self.name}"] += length_bytes
        self._reported = False

    def count_dropped(self, error: OSError) -> None:
        """A write failed and its packet is lost."""
        if error.errno in _DEVICE_FULL:
            self._counters["dropped_device_full"] += 1
            return
        reason = "down" if error.errno in _DEVICE_DOWN else "refused"
        self._counters[f"dropped_device_{reason}"] += 1
        self.report(error)

    def report(self, error: OSError) -> None:
        """Logs trouble with the device once, until it works again."""
        if not self._reported:
            self._reported = True
            log.warning("the %s TUN device does not take packets: %s", self.name, error)


class Direction:
    """Moves packets from `source` to `sink` whenever the event loop says there are some.

    `is_ordinary(buffer, length)` passes the common packet unparsed, and may rewrite it in place; any other
    goes as bytes to `inspect`, which returns what is to be written, or None.
    """

    def __init__(
        self,
        source: Device,
        sink: Device,
        is_ordinary: Callable[[bytearray, int], bool],
        inspect: Callable[[bytes], Buffer | None],
        *,
        batch: int = DEFAULT_BATCH,
    ) -> None:
        self._source: Final = source
        self._sink: Final = sink
        self._is_ordinary: Final = is_ordinary
        self._inspect: Final = inspect
        self._batch: Final = batch
        self._buffer: Final = bytearray(_BUFFER_BYTES)
        self._view: Final = memoryview(self._buffer)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._retry: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Reads from now on."""
        self._loop = loop
        loop.add_reader(self._source.descriptor, self._move_batch)

    def stop(self) -> None:
        """Reads no more; the descriptors stay open, they are borrowed."""
        if self._loop is None:
            return
        self._loop.remove_reader(self._source.descriptor)
        if self._retry is not None:
            self._retry.cancel()
        self._loop = self._retry = None

    def _move_batch(self) -> None:
        read, write = self._source.read, self._sink.put
        buffer, view, buffers = self._buffer, self._view, (self._buffer,)
        is_ordinary = self._is_ordinary
        packet: Buffer | None
        packets = length_bytes = 0
        for _ in range(self._batch):
            try:
                length = read(buffers)
            except BlockingIOError:
                break
            except OSError as error:
                self._pause(error)
                break
            if is_ordinary(buffer, length):
                packet = view[:length]
            elif (packet := self._inspect(bytes(view[:length]))) is None:
                continue
            try:
                write(packet)
            except OSError as error:
                self._sink.count_dropped(error)
            else:
                packets += 1
                length_bytes += length
        if packets:
            self._sink.count_written(packets, length_bytes)

    def _pause(self, error: OSError) -> None:
        assert self._loop is not None, "called by the loop"
        self._source.report(error)
        self._loop.remove_reader(self._source.descriptor)
        self._retry = self._loop.call_later(_RETRY_SECONDS, self.start, self._loop)

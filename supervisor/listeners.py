"""Listening sockets on virtual addresses: opened on request, kept over a proxy's death."""

import socket
from collections import Counter
from collections.abc import Iterator, Mapping

from ipc.addresses import as_text, owner_of_address
from ipc.messages import Network
from supervisor.dataplane import DataPlane
from supervisor.network import is_virtual


class ListenerRefusedError(Exception):
    """This listener is not opened; the text says why."""


class Listeners:
    """Every open listener, by (packed address, port).

    `limit` bounds descriptors and memory. Each proxy has an equal share of it, so that none takes
    from the others what they need.
    """

    def __init__(self, data_plane: DataPlane, proxies: int, limit: int) -> None:
        self._data_plane = data_plane
        self._proxies = proxies
        self._share = max(1, limit // proxies)
        self._numbers: Counter[str] = Counter()
        self._open: dict[tuple[bytes, int], socket.socket] = {}

    def open(self, slot: str, network: Network, address: bytes, port: int) -> int:
        """Descriptor of the listener, for the proxy that owns the address.

        Raises:
            ListenerRefusedError: not that proxy's, not a virtual address, or no room.
        """
        if not is_virtual(network, address) or port == 0:
            raise ListenerRefusedError("it is no virtual address")
        if self._owner(address) != slot:
            raise ListenerRefusedError(f"{as_text(address)} belongs to {self._owner(address)}")
        listener = self._open.get((address, port))
        if listener is None:
            if self._numbers[slot] >= self._share:
                raise ListenerRefusedError(f"{slot} has {self._share} listeners already")
            try:
                listener = self._data_plane.open_listener(address, port)
            except OSError as error:
                raise ListenerRefusedError(str(error)) from error
            self._open[address, port] = listener
            self._numbers[slot] += 1
        return listener.fileno()

    def close(self, slot: str, address: bytes, port: int) -> None:
        """Closes a listener of this proxy, if there is one."""
        if self._owner(address) == slot:
            listener = self._open.pop((address, port), None)
            if listener is not None:
                self._numbers[slot] -= 1
                listener.close()

    def of(self, slot: str) -> Iterator[tuple[bytes, int, int]]:
        """(address, port, descriptor) of each listener of one proxy."""
        for (address, port), listener in self._open.items():
            if self._owner(address) == slot:
                yield address, port, listener.fileno()

    def keep(self) -> dict[tuple[bytes, int], int]:
        """Descriptor of every open listener, by (address, port)."""
        return {key: listener.fileno() for key, listener in self._open.items()}

    def adopt(self, kept: Mapping[tuple[bytes, int], int]) -> None:
        """Goes on with the listeners of an earlier program of this process."""
        for (address, port), descriptor in kept.items():
            self._open[address, port] = socket.socket(fileno=descriptor)
            self._numbers[self._owner(address)] += 1

    def close_all(self) -> None:
        for listener in self._open.values():
            listener.close()
        self._open.clear()
        self._numbers.clear()

    def _owner(self, address: bytes) -> str:
        return f"proxy-{owner_of_address(address, self._proxies)}"

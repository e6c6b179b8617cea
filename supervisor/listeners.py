"""Listening sockets on virtual addresses: opened on request, kept over a proxy's death.

Where packets are rewritten, a connection needs the port of its listener for as long as it lives, and the
kernel might give a closed one to somebody else. So a listener that no proxy uses any more stays, idle,
until its proxy needs the room.
"""

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from ipc.addresses import as_text
from ipc.messages import DataPlaneKind, Network, Redirect
from ipc.slots import of_proxies, owner_of_connection
from supervisor.dataplane import DataPlane
from supervisor.handover import KeptListener
from supervisor.network import is_virtual


class ListenerRefusedError(Exception):
    """This listener is not opened; the text says why."""


class Listeners:
    """Every open listener, by (packed address, port).

    `limit` bounds descriptors and memory. Each proxy has an equal `share` of it, so that none takes
    from the others what they need. `tell(redirects)` has tun know where packets go from now on, before
    anybody can be told of the listener.
    """

    def __init__(
        self,
        data_plane: DataPlane,
        proxies: int,
        limit: int,
        tell: Callable[[list[Redirect]], None] = lambda _redirects: None,
    ) -> None:
        self._data_plane = data_plane
        self._is_redirected = data_plane.kind is DataPlaneKind.REWRITING
        self._tell = tell
        self._proxies = proxies
        self.share = max(1, limit // len(of_proxies(proxies)))
        self._numbers: Counter[str] = Counter()
        self._open: dict[tuple[bytes, int], socket.socket] = {}
        # In the order in which they were given up.
        self._idle: dict[tuple[bytes, int], socket.socket] = {}

    def open(self, slot: str, network: Network, address: bytes, port: int) -> int:
        """Descriptor of the listener, for the proxy that owns the address.

        Raises:
            ListenerRefusedError: not that proxy's, not a virtual address, or no room.
        """
        if not is_virtual(network, address) or port == 0:
            raise ListenerRefusedError("it is no virtual address")
        if (owner := self._owner(address, port)) != slot:
            raise ListenerRefusedError(f"port {port} of {as_text(address)} belongs to {owner}")
        listener = self._open.get((address, port)) or self._idle.pop((address, port), None)
        if listener is None:
            if self._numbers[slot] >= self.share:
                self._drop_idle(slot)
            try:
                listener = self._data_plane.open_listener(address, port)
            except OSError as error:
                raise ListenerRefusedError(str(error)) from error
            self._numbers[slot] += 1
            if self._is_redirected:
                self._tell([_redirect(address, port, listener)])
        self._open[address, port] = listener
        return listener.fileno()

    def _drop_idle(self, slot: str) -> None:
        """Makes room for one; the connections through an idle listener end. Raises ListenerRefusedError."""
        oldest = next((key for key in self._idle if self._owner(*key) == slot), None)
        if oldest is None:
            raise ListenerRefusedError(f"{slot} has {self.share} listeners already")
        self._idle.pop(oldest).close()
        self._numbers[slot] -= 1
        self._tell([Redirect(address=oldest[0], port=oldest[1], local_port=0)])

    def close(self, slot: str, address: bytes, port: int) -> None:
        """This proxy needs the listener no more, if there is one."""
        if self._owner(address, port) != slot:
            return
        listener = self._open.pop((address, port), None)
        if listener is None:
            return
        if self._is_redirected:
            self._idle[address, port] = listener
        else:
            self._numbers[slot] -= 1
            listener.close()

    def of(self, slot: str) -> Iterator[tuple[bytes, int, int]]:
        """(address, port, descriptor) of each listener of one proxy."""
        for (address, port), listener in self._open.items():
            if self._owner(address, port) == slot:
                yield address, port, listener.fileno()

    def redirects(self) -> list[Redirect]:
        """Where packets go, of every listener; none where they are not rewritten."""
        if not self._is_redirected:
            return []
        return [_redirect(*key, end) for key, end in (self._open | self._idle).items()]

    def keep(self) -> list[KeptListener]:
        """All, as descriptors, for another program of this process."""
        return [
            KeptListener(
                address=address,
                port=port,
                descriptor=listener.fileno(),
                is_idle=table is self._idle,
            )
            for table in (self._open, self._idle)
            for (address, port), listener in table.items()
        ]

    def adopt(self, handed: Iterable[KeptListener]) -> None:
        """Goes on with the listeners of an earlier program of this process."""
        for kept in handed:
            table = self._idle if kept.is_idle else self._open
            table[kept.address, kept.port] = socket.socket(fileno=kept.descriptor)
            self._numbers[self._owner(kept.address, kept.port)] += 1

    def close_all(self) -> None:
        for listener in (*self._open.values(), *self._idle.values()):
            listener.close()
        self._open.clear()
        self._idle.clear()
        self._numbers.clear()

    def _owner(self, address: bytes, port: int) -> str:
        return owner_of_connection(address, port, self._proxies)


def _redirect(address: bytes, port: int, listener: socket.socket) -> Redirect:
    return Redirect(address=address, port=port, local_port=listener.getsockname()[1])

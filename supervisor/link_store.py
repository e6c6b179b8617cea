"""The link in the service manager's descriptor store, so that it outlives a supervisor that dies.

    vnet-outer  vnet-inner  vnet-namespace  vnet-dns (each socket)  vnet-plan (sealed memory: Network)

Where packets are rewritten there is neither vnet-inner nor vnet-namespace.
Its successor is given all of it and goes on while the interface stays up. Without a service manager, or
with one that stores nothing (FileDescriptorStoreMax=0), nothing ever comes back and each start makes
everything anew.
"""

import logging
import os
from collections.abc import Mapping
from typing import Final

import msgspec

from ipc.messages import DataPlaneKind, Network
from supervisor import devices, sealed
from supervisor.dataplane import KeptLink
from supervisor.devices import TunDevice
from supervisor.notify import Notifier

log = logging.getLogger(__name__)

OUTER: Final = "vnet-outer"
INNER: Final = "vnet-inner"
NAMESPACE: Final = "vnet-namespace"
DNS: Final = "vnet-dns"
PLAN: Final = "vnet-plan"
NAMES: Final = (OUTER, INNER, NAMESPACE, DNS, PLAN)
_MAX_PLAN_BYTES: Final = 64 * 1024

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Network)


class LinkStore:
    """`stored` is what the service manager has kept (`supervisor.notify.take_stored`); it is owned."""

    def __init__(self, notifier: Notifier, stored: Mapping[str, list[int]] | None = None) -> None:
        self._notifier = notifier
        self._stored = {name: list(found) for name, found in (stored or {}).items()}
        # Whether the service manager has a link of this or an earlier process.
        self._is_holding = False

    @property
    def is_used(self) -> bool:
        """Whether there is a service manager that may keep something."""
        return self._notifier.is_heard

    @property
    def has_link(self) -> bool:
        """Whether something was kept that `take` has not looked at yet."""
        return bool(self._stored)

    def take(self, plan: Network, wish: DataPlaneKind | None = None) -> KeptLink | None:
        """The stored link if it is what `plan` asks for, of this kind; otherwise it is taken down.

        Its ranges are those that were routed last. Without a wish either kind will do.
        """
        for name in self._stored.keys() - set(NAMES):
            log.warning("the service manager kept %r, which is not VNet's; it is dropped", name)
            self._drop(name)
        if not self._stored:
            return None
        problem, ranges = self._judge(plan, wish)
        if problem:
            log.warning("the link that the service manager kept is made anew: %s", problem)
            self._take_down()
            return None
        self._is_holding = True
        self._close(PLAN)
        [outer] = self._stored.pop(OUTER)
        [inner], [namespace] = (self._stored.pop(name, [None]) for name in (INNER, NAMESPACE))
        return KeptLink(
            network=msgspec.structs.replace(plan, ranges=ranges),
            outer=outer,
            inner=inner,
            namespace=namespace,
            dns=tuple(self._stored.pop(DNS, ())),
        )

    def keep(self, link: KeptLink) -> None:
        """Has a new link kept, in place of whatever was kept before."""
        if self._is_holding:
            self.clear()
        self._is_holding = True
        for name, descriptors in (
            (OUTER, [link.outer]),
            (INNER, [] if link.inner is None else [link.inner]),
            (NAMESPACE, [] if link.namespace is None else [link.namespace]),
            (DNS, link.dns),
        ):
            if descriptors:
                self._notifier.store(name, descriptors)
        self._store_plan(link.network)

    def keep_plan(self, network: Network) -> None:
        """The ranges have changed."""
        self._notifier.remove(PLAN)
        self._store_plan(network)

    def clear(self) -> None:
        """Has nothing kept any more: the link ends with this process, or was never of use."""
        for name in NAMES:
            self._notifier.remove(name)

    def _store_plan(self, network: Network) -> None:
        if not self._notifier.is_heard:
            return
        try:
            descriptor = sealed.seal(PLAN, _encoder.encode(network))
        except OSError as error:
            # Without a plan the rest is made anew by a successor: no worse than without a store.
            log.warning("the plan of the network cannot be kept: %s", error)
            return
        try:
            self._notifier.store(PLAN, [descriptor])
        finally:
            os.close(descriptor)

    def _judge(self, plan: Network, wish: DataPlaneKind | None) -> tuple[str, list[str]]:
        """Why the stored link does not fit, or "" and its ranges."""
        has_inner = INNER in self._stored or NAMESPACE in self._stored
        needed = (OUTER, INNER, NAMESPACE, PLAN) if has_inner else (OUTER, PLAN)
        if any(len(self._stored.get(name, ())) != 1 for name in needed):
            return "it is not complete", []
        kind = DataPlaneKind.NAMESPACE if has_inner else DataPlaneKind.REWRITING
        if wish not in (None, kind):
            return f"it is made for packets that are treated otherwise ({kind})", []
        try:
            stored = _decoder.decode(sealed.unseal(self._stored[PLAN][0], _MAX_PLAN_BYTES))
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            return f"its plan cannot be read ({error})", []
        # Another MTU is set while it is up.
        comparable = msgspec.structs.replace(stored, ranges=stored.ranges[:1], mtu=plan.mtu)
        if comparable != msgspec.structs.replace(plan, ranges=plan.ranges[:1]):
            return "the configuration of the network has changed", []
        return "", stored.ranges

    def _take_down(self) -> None:
        # The service manager closes its copies in its own time, but the name is needed now.
        for descriptor in self._stored.get(OUTER, ()):
            devices.delete_interface(TunDevice(descriptor))
        self.clear()
        for name in list(self._stored):
            self._close(name)

    def _drop(self, name: str) -> None:
        self._notifier.remove(name)
        self._close(name)

    def _close(self, name: str) -> None:
        for descriptor in self._stored.pop(name, ()):
            os.close(descriptor)

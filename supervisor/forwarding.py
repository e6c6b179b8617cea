"""Networks whose packets this host may forward to VNet: those of containers and virtual machines.

`security.allow_forwarded_from` lists them. VNet's own address in the list stands for what the host masquerades.
The checks are pure.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TypeAlias

import msgspec

from ipc.addresses import as_text
from ipc.messages import DataPlaneKind, Network
from supervisor.dataplane import DataPlane

log = logging.getLogger(__name__)

_Block: TypeAlias = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Choice:
    """`networks` are in force; `warnings` says which are not, and what to do."""

    networks: list[str]
    warnings: list[str]


def choose(listed: Sequence[str], network: Network, kind: DataPlaneKind) -> Choice:
    """What of the list can be in force beside the ranges of `network`.

    IPv6 networks wait without a word for as long as IPv6 is off.
    """
    own = _own(network)
    ranges: list[_Block] = [ip_network(text) for text in network.ranges]
    if network.ipv6_prefix is not None:
        ranges.append(IPv6Network((network.ipv6_prefix, 64)))
    networks: dict[str, None] = {}
    warnings: dict[str, None] = {}
    for block in map(ip_network, listed):
        if block.version == 6 and network.ipv6_prefix is None:
            continue
        own_one = next(one for one in own if one.version == block.version)
        taken = next((taken for taken in ranges if _overlap(taken, block)), None)
        if block in own:
            networks[str(block)] = None
        elif taken is not None:
            warnings[
                _not_in_force(
                    block,
                    f"it overlaps the virtual range {taken}: give one of them other addresses"
                    f" (VNet's own address alone may be listed: {own_one})",
                )
            ] = None
        elif kind is DataPlaneKind.REWRITING:
            warnings[
                _not_in_force(
                    block,
                    "packets are rewritten here, which does not keep their source: have this host"
                    f" masquerade what goes to {network.interface}, and list {own_one} instead",
                )
            ] = None
        else:
            networks[str(block)] = None
    return Choice(list(networks), list(warnings))


class ForwardedNetworks:
    """Those that are in force. `warnings` are sentences for `vnet status`."""

    def __init__(self, data_plane: DataPlane) -> None:
        self.warnings: list[str] = []
        self._in_force: list[str] = []
        self._data_plane = data_plane

    def put_into_force(self, listed: Sequence[str], network: Network) -> Network:
        """The way back is routed for what can be in force; `network` with exactly that."""
        choice = choose(listed, network, self._data_plane.kind)
        try:
            failed = self._data_plane.set_forwarded(choice.networks)
        except OSError as error:
            failed = dict.fromkeys(choice.networks, error)
        warnings = [
            *choice.warnings,
            *(
                _not_in_force(ip_network(text), f"it cannot be routed ({error.strerror})")
                for text, error in failed.items()
            ),
        ]
        for warning in warnings:
            if warning not in self.warnings:
                log.warning("%s", warning)
        self.warnings = warnings
        networks = [text for text in choice.networks if text not in failed]
        if networks != self._in_force:
            log.info("forwarded networks: %s", ", ".join(networks) or "none")
        self._in_force = networks
        return msgspec.structs.replace(network, forwarded_from=networks)


def _own(network: Network) -> list[_Block]:
    addresses = (network.tun_ipv4, network.tun_ipv6)
    return [ip_network(as_text(address)) for address in addresses if address is not None]


def _not_in_force(block: _Block, why: str) -> str:
    return f"{block} in security.allow_forwarded_from is not in force, because {why}."


def _overlap(one: _Block, other: _Block) -> bool:
    return one.version == other.version and one.overlaps(other)

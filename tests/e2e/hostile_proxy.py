"""A proxy worker that attacks when it is asked for a name that begins with `vnet-attack-`.

The label after it is the attack, with `-` for `_`, and the next one the process id, in its own namespace, of
the worker that is meant: dns asks another proxy, or a successor, if one is killed before it answers.
"""

import os
from collections.abc import Callable

import hostile_trigger
from msgspec import structs

from ipc import messages as m
from ipc.bus import Sender
from ipc.messages import AnyMessage, ConfigureProxy
from ipc.slots import owner_of_connection
from workers.proxy import worker as real
from workers.runtime import Runtime

PREFIX = "vnet-attack-"


class Attacker:
    """The channel and the bus of one proxy."""

    def __init__(self, runtime: Runtime[ConfigureProxy], worker: real.ProxyWorker) -> None:
        self.runtime = runtime
        self.worker = worker
        self.slot = runtime.config.common.slot
        self.proxies = runtime.config.common.proxies


def listeners(attacker: Attacker) -> None:
    """As many as it may say at once, on addresses that are its own."""
    said = 0
    # From the third address on: VNet's own are refused for another reason, and once a second one is told.
    for number in range(3, 1 << 20):
        address = (0x64400000 + number).to_bytes(4, "big")
        if owner_of_connection(address, 81, attacker.proxies) == attacker.slot:
            attacker.runtime.send(m.OpenListener(address=address, port=81))
            said += 1
        if said == 9000:
            return


def claims(attacker: Attacker) -> None:
    """Clusters that want the addresses of the nameserver, of the host, and of everything."""
    [cluster] = attacker.worker._teleport.states()[:1]
    ranges = ["127.0.0.0/8", "0.0.0.0/1", "128.0.0.0/1", "224.0.0.0/4", "10.66.0.0/16", "x y"]
    zones = ["", "com", "/etc/passwd", "..", "a b.test", "x" * 200]
    zones = [zone or "." for zone in zones]
    greedy = structs.replace(cluster, ranges=ranges, zones=[*cluster.zones, *zones])
    attacker.runtime.send(m.ClustersReported(clusters=[greedy]))


def accusations(attacker: Attacker) -> None:
    for _ in range(100):
        attacker.runtime.send(m.PeerMisbehaved(slot="tun", reason="\x1b[31mit is\nevil"))


def verdicts(attacker: Attacker) -> None:
    """On connections of everybody, asked or not."""
    for flow_id in range(3000):
        attacker.worker._answer_tun(m.DialVerdict(flow_id=flow_id))


ATTACKS: dict[str, Callable[[Attacker], None]] = {
    attack.__name__: attack for attack in (listeners, claims, accusations, verdicts)
}


async def main(runtime: Runtime[ConfigureProxy]) -> None:
    hear = real.ProxyWorker._hear_dns

    def hear_dns(self: real.ProxyWorker, sender: Sender, message: AnyMessage) -> None:
        if isinstance(message, m.ResolveName) and message.name.startswith(PREFIX):
            _, label, pid, *_ = message.name.split(".")
            name = label.replace("-", "_")
            if int(pid) == os.getpid():
                hostile_trigger.run(name, ATTACKS[name], Attacker(runtime, self))
        hear(self, sender, message)

    real.ProxyWorker._hear_dns = hear_dns  # type: ignore[method-assign]
    await real.main(runtime)

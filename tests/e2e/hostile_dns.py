"""A dns worker that attacks when a question begins with TRIGGER."""

import threading

import hostile_bus
import hostile_trigger

from ipc.messages import ConfigureDns
from workers.dns import udp
from workers.dns import worker as real
from workers.dns.askers import End
from workers.runtime import Runtime

# At tun's socket it has no business; its key is not on the list there.
_ON_TUN = {"at_tun": hostile_bus.replay}


async def main(runtime: Runtime[ConfigureDns]) -> None:
    common = runtime.config.common
    proxies = [f"proxy-{index}" for index in range(common.proxies)]
    answer = udp.UdpServer._take

    def take(self: udp.UdpServer, data: bytes, peer: End, now: float) -> bool:
        if not data.startswith(hostile_trigger.TRIGGER):
            return answer(self, data, peer, now)
        name = hostile_trigger.name_in(data)
        if not name:
            return False
        attack = hostile_bus.ATTACKS.get(name) or _ON_TUN[name]
        attacker = hostile_bus.Attacker(common, ["tun"] if name in _ON_TUN else proxies)
        threading.Thread(target=hostile_trigger.run, args=(name, attack, attacker)).start()
        return False

    udp.UdpServer._take = take
    await real.main(runtime)

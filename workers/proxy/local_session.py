"""From a name and a listening socket to an app that is served there: the whole of `vnet proxy`."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workers.proxy.dial_plan import DialPlan
from workers.proxy.find_by_name import Found, find_by_name
from workers.proxy.local_peers import make_local_peers
from workers.proxy.local_proxy import LocalProxy, choose_port, http_rules
from workers.proxy.teleport.client import Teleport
from workers.proxy.teleport.contexts import upgrade_context
from workers.proxy.teleport.settings import Settings
from workers.proxy.teleport.targets import AppTarget, Owner

# The root has just been asked for its leaves; the client asks once more.
LEAVES_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user wants. `cluster` is empty and the ports are None if not said.

    With `any_host` HTTP requests are not looked at.
    """

    name: str
    cluster: str = ""
    target_port: int | None = None
    local_port: int | None = None
    any_host: bool = False


async def serve_by_name(
    home: Path,
    settings: Settings,
    wish: Wish,
    listener: socket.socket,
    *,
    ready: Callable[[str], None],
    tell: Callable[[str], None],
) -> None:
    """Serves one app or database until it is cancelled. Owns the listening socket.

    `ready` is called with the address when a certificate is there; `tell` takes sentences for the
    user.

    Raises:
        TeleportError: the cluster gives no certificate.
        DialError: the proxy is not reached, or not trusted.
        PortError, and what `find_by_name` raises: there is no such app.
    """
    try:
        found = await find_by_name(
            home, settings.connect, settings.wall_clock(), wish.name, cluster=wish.cluster
        )
        port, note = choose_port(found.target, wish.target_port, wish.local_port)
        if note:
            tell(note)
    except BaseException:
        listener.close()
        raise
    changed = asyncio.Event()
    teleport = Teleport(home, settings, on_change=changed.set)

    async def plan() -> DialPlan:
        return await teleport.plan(found.target, port)

    peers = make_local_peers()
    if not peers.is_checked:
        tell("this system does not say who connects: every user of this machine may use this port")
    is_looked_at = isinstance(found.target, AppTarget) and not wish.any_host
    rules = http_rules(found.address) if is_looked_at else None
    proxy = LocalProxy(listener, plan, tell, peers=peers, rules=rules)

    def on_owner_gone(owner: Owner) -> None:
        if owner.profile == found.target.profile:
            tell(f"the login of {owner.user} at {owner.profile} is gone: connections are reset")
            proxy.reset_all()

    teleport.on_owner_gone = on_owner_gone
    try:
        await teleport.start()
        await _until_known(teleport, found, changed)
        web_context = await asyncio.to_thread(
            upgrade_context, ca_file=settings.ca_file, insecure=settings.insecure
        )
        await proxy.check_way(await plan(), web_context)
        ready(found.address)
        await proxy.serve()
    finally:
        await proxy.close()
        await teleport.close()


async def _until_known(teleport: Teleport, found: Found, changed: asyncio.Event) -> None:
    """Waits until the client knows the target's leaf; what it says afterwards is the truth."""
    if not found.target.leaf:
        return
    wanted = (found.target.profile, found.target.leaf)
    try:
        async with asyncio.timeout(LEAVES_SECONDS):
            while wanted not in {(state.profile, state.name) for state in teleport.states()}:
                changed.clear()
                await changed.wait()
    except TimeoutError:
        return

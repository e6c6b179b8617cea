"""Which directories a worker is let into. Pure; the rest is in `landlock_rules`."""

from pathlib import Path

from ipc.permits import Role, role_of
from ipc.slots import SSH
from supervisor import configure
from supervisor.configure import Surroundings
from supervisor.confinement.landlock_rules import (
    KEEP_FILES,
    KEEP_SOCKETS,
    READ,
    FileRule,
    Reach,
)
from supervisor.settings import Settings


def reach_of(slot: str, settings: Settings, around: Surroundings) -> Reach:
    """What this slot needs: a proxy the tsh home and its state directory, the others nothing."""
    match role_of(slot):
        case Role.TUN:
            return Reach(around.bus_dir)
        case Role.DNS | Role.METRICS:
            # dns joins the proxies, metrics nobody; nobody joins them.
            return Reach()
        case _:
            home = settings.teleport_home
            rules = [
                # Among the user's logins `ssh` keeps what SSH clients are to find.
                FileRule(home, KEEP_FILES if slot == SSH else READ, is_awaited=True),
                FileRule(around.book_path.parent, KEEP_FILES),
                FileRule(around.prompts_dir, KEEP_SOCKETS),
            ]
            ca_file = configure.expand(settings.config.teleport.ca_file, settings.user.home)
            if ca_file and home not in Path(ca_file).parents:
                rules.append(FileRule(Path(ca_file), READ, is_awaited=True))
            return Reach(around.bus_dir, tuple(rules))

"""The systemd unit that undoes, when the machine starts, what a VNet left when it stopped. Pure.

A supervisor that is started does the same; the unit is for machines where none is.
"""

from typing import Final

from supervisor.osconfig.journal import JOURNAL
from supervisor.osconfig.systemd_unit import Programs

FILE_NAME: Final = "vnet-repair.service"

_UNIT: Final = """\
[Unit]
Description=Undo what a VNet that did not end well left in the resolver's settings
ConditionPathExists=@STATE@/@JOURNAL@
DefaultDependencies=no
After=local-fs.target systemd-tmpfiles-setup.service
Before=network-pre.target nss-lookup.target shutdown.target
Wants=network-pre.target
Conflicts=shutdown.target

[Service]
Type=oneshot
ExecStart=@VNET@ repair --state-dir @STATE@
TimeoutStartSec=60

[Install]
WantedBy=multi-user.target
"""


def repair_unit(programs: Programs, state_dir: str = "/var/lib/vnet") -> str:
    """The text of the unit; the programs' paths are checked where the template unit is made."""
    return (
        _UNIT.replace("@VNET@", str(programs.vnet))
        .replace("@STATE@", state_dir)
        .replace("@JOURNAL@", JOURNAL)
    )

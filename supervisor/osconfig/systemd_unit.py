r"""The systemd unit `vnet@.service`, one instance for each user (systemd.service(5), systemd.exec(5)). Pure.

The instance's name is the user's name as it is, not escaped: systemd.unit(5) allows letters, digits and
`:_.\@-` in it, and `%i` passes it on unchanged. Of other names there is no instance.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TEMPLATE: Final = "vnet@.service"
# Variables for the service, where the administrator has set some.
ENVIRONMENT: Final = Path("/etc/vnet/environment")
# systemd.unit(5): a unit's name has 255 characters.
_MAX_NAME: Final = 255
_INSTANCE: Final = re.compile(r"[A-Za-z0-9:_.\\@-]+")
# Nothing that systemd would read as a specifier, a variable, a quote or an escape.
_PLAIN_PATH: Final = re.compile(r"/[A-Za-z0-9/._+@,=:~-]+")


@dataclass(frozen=True, slots=True)
class Programs:
    """Where VNet's programs lie."""

    supervisor: Path
    vnet: Path


# As the Debian package installs them.
PACKAGED: Final = Programs(Path("/usr/bin/vnet-supervisor"), Path("/usr/bin/vnet"))


def instance(user: str) -> str:
    """The unit of this user. Raises ValueError for a name that no unit can have."""
    name = f"vnet@{user}.service"
    if not _INSTANCE.fullmatch(user) or user.startswith("-") or len(name) > _MAX_NAME:
        raise ValueError(
            f"user {user!r} cannot be the name of a systemd unit: start vnet-supervisor yourself"
        )
    return name


def unit(programs: Programs) -> str:
    """The text of the template unit.

    Raises:
        ValueError: a program lies where a unit cannot name it.
    """
    for program in (programs.supervisor, programs.vnet):
        if not _PLAIN_PATH.fullmatch(str(program)):
            raise ValueError(
                f"{str(program)!r} cannot stand in a systemd unit: install VNet at a path of plain"
                " letters and digits"
            )
    return (
        _UNIT.replace("@SUPERVISOR@", str(programs.supervisor))
        .replace("@VNET@", str(programs.vnet))
        .replace("@ENVIRONMENT@", str(ENVIRONMENT))
    )


def usual_tsh_home(user: str) -> Path:
    """The tsh home that the unit lets its service write to."""
    return Path("/home", user, ".tsh")


def drop_in(programs: Programs, user: str, tsh_home: Path, *, is_root: bool) -> str:
    """What one user's instance needs beside the unit, or "".

    Root, whom the unit itself does not serve, needs another command; who has the tsh home at another place
    the right to write there.

    Raises:
        ValueError: the tsh home lies where a unit cannot name it.
    """
    lines = []
    if is_root:
        lines += ["ExecStart=", f"ExecStart={programs.supervisor} --user=%i"]
    if tsh_home != usual_tsh_home(user):
        lines += [f"ReadWritePaths={_quoted_path(tsh_home)}"]
    return "".join(f"{line}\n" for line in ("[Service]", *lines)) if lines else ""


def _quoted_path(path: Path) -> str:
    """As a word of a unit that need not be there (systemd.syntax(7), systemd.exec(5))."""
    text = str(path)
    if not path.is_absolute() or not text.isprintable():
        raise ValueError(f"the tsh home {text!r} cannot stand in a systemd unit: choose another")
    for special, written in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%")):
        text = text.replace(special, written)
    return f'"-{text}"'


_UNIT: Final = """\
[Unit]
Description=VNet for %i
After=network.target nss-user-lookup.target dbus.service systemd-resolved.service NetworkManager.service
# One that fails at once is given up after the twentieth time.
StartLimitIntervalSec=60
StartLimitBurst=20

[Service]
Type=notify
NotifyAccess=main
ExecStart=@SUPERVISOR@ --user=%i --not-root
ExecReload=@VNET@ reload
# TELEPORT_HOME, HTTPS_PROXY and the like.
EnvironmentFile=-@ENVIRONMENT@
TimeoutStartSec=60
TimeoutStopSec=15
WatchdogSec=20
# The link stays up while a supervisor that died is replaced.
FileDescriptorStoreMax=64
Restart=on-failure
RestartSec=100ms
# Wrong configuration, missing right, or another VNet runs: trying again does not help. For a range, an
# interface name or an address that another program has it waits without ending.
RestartPreventExitStatus=2 4 6
KillMode=mixed
# Listening sockets and connections.
LimitNOFILE=524288
LimitCORE=0
TasksMax=512
OOMPolicy=continue
StateDirectory=vnet

# NET_ADMIN: interfaces, routes. SYS_ADMIN: the inner network namespace. NET_BIND_SERVICE: port 53 there.
# SETUID, SETGID, SETPCAP: the workers become other users. KILL: they are signalled nevertheless.
# CHOWN, FSETID, DAC_OVERRIDE: directories for them, and the user's own that only the user may enter.
CapabilityBoundingSet=CAP_NET_ADMIN CAP_SYS_ADMIN CAP_NET_BIND_SERVICE CAP_SETUID CAP_SETGID CAP_SETPCAP \
CAP_KILL CAP_CHOWN CAP_FSETID CAP_DAC_OVERRIDE
NoNewPrivileges=yes
# /etc and /run: resolver files are replaced in place, and /run/vnet is shared by all instances.
ProtectSystem=strict
ReadWritePaths=/etc /run
ProtectHome=read-only
# The tsh home, where keys and settings for SSH programs are put; a drop-in names one elsewhere.
ReadWritePaths=-/home/%i/.tsh
PrivateTmp=yes
DevicePolicy=closed
DeviceAllow=/dev/net/tun rw
ProtectKernelTunables=yes
# Settings of VNet's own interfaces.
ReadWritePaths=/proc/sys/net
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictNamespaces=net
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictRealtime=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
# Beyond the first three: the workers confine themselves further.
SystemCallFilter=@system-service @setuid @chown seccomp landlock_create_ruleset \
landlock_add_rule landlock_restrict_self
SystemCallErrorNumber=EPERM
# Not RestrictSUIDSGID: the workers' common directory has a set-group-id bit.
# Not ProtectProc, PrivateUsers: the supervisor looks at processes and users of this machine.

[Install]
WantedBy=multi-user.target
"""

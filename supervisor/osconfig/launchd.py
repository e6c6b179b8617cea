"""The launchd job of VNet on macOS (launchd.plist(5), launchctl(1)). Pure; not tried on a real machine."""

from pathlib import Path
from typing import Final

from supervisor.osconfig.systemd_unit import Programs

LABEL: Final = "vnet.supervisor"
PLIST: Final = Path(f"/Library/LaunchDaemons/{LABEL}.plist")
LOG: Final = "/var/log/vnet.log"


def plist(programs: Programs, user: str, *, refuses_root: bool = True) -> str:
    """The job of one user: started with the system, and again when it fails."""
    arguments = [str(programs.supervisor), f"--user={user}"]
    if refuses_root:
        arguments.append("--not-root")
    import plistlib  # noqa: PLC0415  # an XML parser, which `vnet status` does not need

    job = {
        "Label": LABEL,
        "ProgramArguments": arguments,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 1,
        "ExitTimeOut": 15,
        "ProcessType": "Interactive",
        "StandardErrorPath": LOG,
        "SoftResourceLimits": {"NumberOfFiles": 65536},
        "HardResourceLimits": {"NumberOfFiles": 65536, "Core": 0},
    }
    return plistlib.dumps(job, sort_keys=False).decode()


def start_commands() -> list[list[str]]:
    """What starts the job once its file is there."""
    return [["launchctl", "bootstrap", "system", str(PLIST)]]


def stop_commands() -> list[list[str]]:
    """What ends it and has launchd forget it."""
    return [["launchctl", "bootout", f"system/{LABEL}"]]

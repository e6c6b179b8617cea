"""Boots a Debian with systemd-nspawn: its own processes, network, file system, systemd and D-Bus.

    pytest ── unshare (mounts, processes) ── systemd-nspawn ── systemd, process 1 of the booted system

Each dies with the one before it. All mounts are made in a mount namespace of the boot, on a tmpfs, so
nothing is left when the test ends or is killed.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from debian_tree import USERS
from private_bed import Bed, descendants, inner_pid, is_running, live, wait_until

BOOT_SECONDS = 60.0
STOP_SECONDS = 10.0
_numbers = itertools.count()

# Only what nspawn leaves out by itself: the workers' Landlock rules are part of what is tested.
_SYSTEM_CALLS = "landlock_create_ruleset landlock_add_rule landlock_restrict_self"

# $1 the tree, $2 an empty directory, $3 control groups, the rest is the command.
_IN_OWN_MOUNTS = """
set -e
tree=$1; here=$2; groups=$3; shift 3
for group in $groups; do echo 0 >"$group/cgroup.procs"; done
mount -t tmpfs -o mode=0755,size=2g vnet-test "$here"
mkdir "$here/upper" "$here/work" "$here/root"
mount -t overlay -o "lowerdir=$tree,upperdir=$here/upper,workdir=$here/work" overlay "$here/root"
# What nspawn notes about running systems is nobody else's.
mkdir -p /run/systemd
mount -t tmpfs -o mode=0755 vnet-test /run/systemd
exec "$@"
"""


class BootedBed(Bed):
    """A booted system. Programs run in it as root, or as one of its users."""

    def command(self, *arguments: str, user: str = "") -> list[str]:
        kinds = ["--net", "--mount", "--pid", "--uts", "--ipc", "--cgroup"]
        options = ["--pdeathsig=KILL"]
        if user:
            options += [f"--reuid={user}", f"--regid={user}", "--init-groups", "--reset-env"]
        return ["nsenter", f"--target={self.init}", *kinds, "--", "setpriv", *options, *arguments]

    def systemctl(self, *arguments: str) -> str:
        """Output of systemctl, which must succeed."""
        return self.output("systemctl", "--no-pager", *arguments)

    def property_of(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", "--property", name, "--value", unit).strip()

    def journal(self, unit: str = "", *options: str) -> str:
        """What the journal has, of one unit or of all."""
        chosen = [f"--unit={unit}"] if unit else []
        shown = self.run("journalctl", "--no-pager", "--output=short-precise", *chosen, *options)
        return shown.stdout.decode(errors="replace")

    def log(self) -> str:
        """The whole journal, shown when a test fails."""
        try:
            return self.journal()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    def start_program(self, unit: str, *arguments: str, user: str = "root") -> None:
        """Runs a program beside the tests, as a transient unit of this name."""
        self.output("systemd-run", "--quiet", f"--unit={unit}", f"--uid={user}", *arguments)

    def files(self, *excluded: str) -> dict[str, tuple[int, int, int, str]]:
        """Mode, owner, group and content (size, or target of a link) of each file.

        `excluded` are paths below which nothing is listed; mounts are left out.
        """
        pruned = [word for path in excluded for word in ("-path", path, "-o")]
        listed = self.output(
            *("find", "/", "-xdev", "(", *pruned, "-false", ")", "-prune", "-o"),
            *("-printf", r"%p\t%m\t%U\t%G\t%y%l\t%s\0"),
        )
        found = {}
        for entry in filter(None, listed.split("\0")):
            path, mode, uid, gid, kind, size = entry.split("\t")
            content = kind if kind.startswith(("d", "l")) else f"{kind}{size}"
            found[path] = (int(mode, 8), int(uid), int(gid), content)
        return found


@contextlib.contextmanager
def booted(tree: Path) -> Iterator[BootedBed]:
    """A system booted from a throw-away copy of `tree`, up when the block begins."""
    with (
        tempfile.TemporaryDirectory(prefix="vnet-system-") as name,
        _own_control_groups() as groups,
    ):
        directory = Path(name)
        here = directory / "machine"
        here.mkdir()
        log = directory / "boot.log"
        nspawn = [
            *("systemd-nspawn", "--quiet", "--boot", f"--directory={here}/root"),
            # There may be no machined here, and no unit to be in.
            *("--machine=vnet-test", "--register=no", "--keep-unit"),
            *("--private-network", "--capability=CAP_NET_ADMIN", "--bind=/dev/net/tun"),
            *("--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe"),
            f"--system-call-filter={_SYSTEM_CALLS}",
        ]
        # In a process namespace of its own: what systemd-nspawn starts would outlive it otherwise.
        outer = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--propagation=private"]
        outer += ["--pid", "--fork", "--kill-child", "--mount-proc"]
        inner = ["sh", "-c", _IN_OWN_MOUNTS, "sh", str(tree), str(here), " ".join(groups)]
        with (
            log.open("wb") as sink,
            subprocess.Popen(
                [*outer, *inner, *nspawn],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            ) as process,
        ):
            try:
                bed = BootedBed(_wait_for_boot(process, log), directory, _environment())
                with live(bed):
                    yield bed
            finally:
                _end(process)


def _environment() -> dict[str, str]:
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/root",
        "TERM": "dumb",
        "VNET_RUN_DIR": "/run/vnet",
        "TELEPORT_HOME": f"/home/{USERS[0]}/.tsh",
    }


def _wait_for_boot(process: subprocess.Popen[bytes], log: Path) -> int:
    """Waits until systemd says that it is up; our id of it."""

    def find_init() -> int:
        assert process.poll() is None, f"no boot: {log.read_text(errors='replace')}"
        for candidate in descendants(process.pid):
            with contextlib.suppress(OSError):
                entry = Path(f"/proc/{candidate}")
                # The bus of systemd is there once the system's own files are.
                if inner_pid(entry) == 1 and (entry / "root/run/systemd/private").exists():
                    return candidate
        return 0

    init = wait_until(find_init, "the system begins to boot", BOOT_SECONDS)
    probe = BootedBed(init, log.parent, _environment())
    try:
        state = probe.run("systemctl", "is-system-running", "--wait", timeout=BOOT_SECONDS)
        if state.stdout.strip() != b"running":
            failed = probe.run("systemctl", "--failed", "--no-pager").stdout.decode()
            raise AssertionError(f"the system is {state.stdout.decode().strip()}\n{failed}")
    finally:
        probe.close()
    return init


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the system at once; what is left of it is gone when this returns."""
    below = descendants(process.pid)
    process.kill()
    process.wait(STOP_SECONDS)
    wait_until(lambda: not any(map(is_running, below)), "the system has ended", STOP_SECONDS)


@contextlib.contextmanager
def _own_control_groups() -> Iterator[list[str]]:
    """A control group for one boot in each hierarchy that systemd would use, gone afterwards.

    Two systems that are booted in the same group would be in each other's way.
    """
    made: list[Path] = []
    name = f"vnet-test-{os.getpid()}-{next(_numbers)}"
    for root in _hierarchies():
        _remove_abandoned(root)
        with contextlib.suppress(OSError):
            (root / name).mkdir()
            made.append(root / name)
    try:
        yield list(map(str, made))
    finally:
        for group in made:
            wait_until(lambda group=group: _remove_group(group), f"{group} is empty", STOP_SECONDS)


def _remove_abandoned(root: Path) -> None:
    """Removes the groups of test runs that were killed."""
    for group in root.glob("vnet-test-*-*"):
        owner = group.name.split("-")[2]
        if owner.isdecimal() and not is_running(int(owner)):
            _remove_group(group)


def _hierarchies() -> list[Path]:
    """Where this process's groups are in the unified hierarchy and in systemd's own, if mounted."""
    mounts = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, options, *_ = line.split()
        if kind == "cgroup2":
            mounts[""] = target
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            mounts["name=systemd"] = target
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in mounts:
            found.append(Path(mounts[controllers] + path))
    return found


def _remove_group(group: Path) -> bool:
    for path, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            Path(path).rmdir()
    return not group.exists()


def can_boot() -> str:
    """Why nothing can be booted here, or ""."""
    if shutil.which("systemd-nspawn") is None:
        return "systemd-nspawn is not installed: run scripts/setup --dev as root"
    return ""

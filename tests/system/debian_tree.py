"""The file system of the Debian that is booted: made by debootstrap once, then kept.

It lies in the user's cache directory, named after what it is made from, and is never written to: each
boot works on an overlay. Mirror and proxies are those of this machine's own apt.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "systemd-resolved", "libnss-resolve", "libpam-systemd"),
    *("polkitd", "python3", "libseccomp2", "ca-certificates", "iproute2", "curl", "procps"),
    *("login", "passwd", "util-linux"),
)
USERS = ("alice", "bob")
# Another number makes new trees.
RECIPE = 1
# What only costs time at boot, or asks questions on the console.
MASKED = (
    *("console-getty.service", "getty.target", "apt-daily.timer", "apt-daily-upgrade.timer"),
    *("dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer", "systemd-firstboot.service"),
)
DEBOOTSTRAP_SECONDS = 900


class NoTreeError(Exception):
    """The tree cannot be made here; the text says why."""


def cache_directory() -> Path:
    """Where what is expensive to make is kept between runs, outside of the checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vnet-tests"


def suite() -> str:
    """The name of the Debian release that this machine runs; the package is built for its Python."""
    found = platform.freedesktop_os_release()
    if "debian" not in (found.get("ID"), *found.get("ID_LIKE", "").split()):
        raise NoTreeError("this machine does not run Debian")
    if not (name := found.get("VERSION_CODENAME", "")):
        raise NoTreeError("this machine runs a Debian without a name")
    return name


def mirror(release: str) -> str:
    """The archive of this release that this machine's apt asks."""
    listed = _output(
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
    )
    for line in listed.splitlines():
        address, _, rest = line.partition(" ")
        if rest.split() == [release, "main"]:
            return address
    raise NoTreeError(f"this machine's apt names no archive for {release} main")


def proxies(address: str) -> dict[str, str]:
    """The environment with which debootstrap asks the proxy that apt would ask."""
    parts = urllib.parse.urlsplit(address)
    found = {}
    for scheme in ("http", "https"):
        # A proxy for one host comes before the one for all (apt.conf(5)).
        for key in (f"Acquire::{scheme}::Proxy::{parts.hostname}", f"Acquire::{scheme}::Proxy"):
            value = _output("apt-config", "shell", "X", key).strip()
            chosen = value.partition("=")[2].strip("'\"")
            if chosen:
                if chosen != "DIRECT":
                    found[f"{scheme}_proxy"] = chosen
                break
    return found


def tree(*more: str) -> Path:
    """The tree, or one with more packages, made if it is not there. Raises NoTreeError."""
    release = suite()
    packages = PACKAGES + more
    made_from = {"packages": packages, "users": USERS, "masked": MASKED, "recipe": RECIPE}
    made_from |= {"suite": release, "machine": platform.machine()}
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    made = directory / f"debian-{release}-{digest}"
    with made.with_name(f"{made.name}.lock").open("w") as lock:
        # Another run may be making it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            _make(made, release, packages)
    return made


def unpacked(package: str, directory: Path) -> None:
    """Unpacks one package of this machine's release, kept once it was fetched. Raises NoTreeError."""
    kept = cache_directory() / f"packages-{suite()}"
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (found := sorted(kept.glob(f"{package}_*.deb"))):
            _run(["apt-get", "download", package], where=kept)
            found = sorted(kept.glob(f"{package}_*.deb"))
    _run(["dpkg-deb", "--extract", str(found[-1]), str(directory)])


def _make(made: Path, release: str, packages: tuple[str, ...]) -> None:
    if shutil.which("debootstrap") is None:
        raise NoTreeError("debootstrap is not installed: run scripts/setup --dev as root")
    address = mirror(release)
    unfinished = made.with_name(f"{made.name}.unfinished")
    _run(["rm", "-rf", "--one-file-system", str(unfinished)])
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}"]
    # In namespaces of its own, so that no mount and no process is left of one that is cut short.
    alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    _run([*alone, *command, release, str(unfinished), address], proxies(address))
    _run(["systemctl", f"--root={unfinished}", "mask", "--quiet", *MASKED])
    for user in USERS:
        _run(["chroot", str(unfinished), "useradd", "-m", "-s", "/bin/bash", user])
        (unfinished / "home" / user).chmod(0o700)
    for archive in (unfinished / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()
    (unfinished / "etc/machine-id").write_text(f"{'5' * 32}\n")
    (unfinished / "etc/hostname").write_text("vnet-test\n")
    unfinished.rename(made)


def _run(
    command: list[str], environment: Mapping[str, str] | None = None, where: Path | None = None
) -> None:
    done = subprocess.run(
        command,
        cwd=where,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=DEBOOTSTRAP_SECONDS,
        check=False,
        env=os.environ | {"LC_ALL": "C.UTF-8"} | dict(environment or {}),
    )
    if done.returncode != 0:
        last = "\n".join(done.stdout.splitlines()[-15:])
        raise NoTreeError(f"{command[0]}: status {done.returncode}\n{last}")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

"""For a private mount namespace with an `/etc` and `/run` of its own: kills VNet's changes at each step.

    killed_settings.py KIND...

For each kind (of `/etc/resolv.conf`, or of a system) and each step a process sets up the resolver and takes it
back, and is killed with SIGKILL at that step; another repairs. Prints JSON: by kind, the steps and what
differs. For the kind "resolvconf" the program of that name is to be there.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from fault_steps import dying, is_os_thread, kill_self, tree

from supervisor.cli.repair import repair
from supervisor.osconfig.choose import Facts
from supervisor.osconfig.macos_resolver import DIRECTORY as RESOLVER
from supervisor.osconfig.os_settings import OsSettings, find_facts
from supervisor.osconfig.resolv_conf_backend import RESOLV_CONF
from supervisor.osconfig.wish import ResolverWish

WISH = ResolverWish("vnet0", 7, ("corp.test", "demo.test"), (bytes([100, 64, 0, 2]),))
BEFORE = b"# by hand\nnameserver 192.0.2.1\nsearch corp.test\n" + b"# more\n" * 50
MAX_STEPS = 100
# Where resolvconf keeps what it composes the file from.
RECORDS = Path("/run/resolvconf")


def backend_of(kind: str) -> str:
    if kind.startswith("macos"):
        return "macos"
    return "resolvconf" if kind == "resolvconf" else "resolv.conf"


def resolvconf(*arguments: str, stdin: str = "") -> None:
    subprocess.run(["resolvconf", *arguments], input=stdin.encode(), check=True)


def prepare(kind: str, directory: Path) -> None:
    if f" {RESOLV_CONF} " in Path("/proc/self/mounts").read_text():
        subprocess.run(["umount", str(RESOLV_CONF)], check=True)
    RESOLV_CONF.unlink(missing_ok=True)
    for gone in (RESOLVER, RECORDS):
        shutil.rmtree(gone, ignore_errors=True)
    target = directory / "target"
    target.write_bytes(BEFORE)
    match kind:
        case "file" | "mount":
            RESOLV_CONF.write_bytes(BEFORE)
            RESOLV_CONF.chmod(0o640)
            os.chown(RESOLV_CONF, 4711, 4712)
            if kind == "mount":
                subprocess.run(["mount", "--bind", str(target), str(RESOLV_CONF)], check=True)
        case "link":
            RESOLV_CONF.symlink_to(target)
        case "macos-others":
            RESOLVER.mkdir()
            (RESOLVER / "vpn.test").write_bytes(BEFORE)
            (RESOLVER / "link.test").symlink_to(target)
        case "resolvconf":
            if Path("/etc/resolvconf").is_dir():
                # Debian's: the link that its installation makes.
                (RECORDS / "interface").mkdir(parents=True)
                RESOLV_CONF.symlink_to(RECORDS / "resolv.conf")
                resolvconf("--enable-updates")
            resolvconf("-a", "eth0.dhclient", stdin="nameserver 192.0.2.1\nsearch corp.test\n")
            assert "nameserver 192.0.2.1\n" in RESOLV_CONF.read_text()


def applied(kind: str) -> bytes:
    """What the system's resolver reads."""
    if kind.startswith("macos"):
        return b"".join((RESOLVER / zone).read_bytes() for zone in WISH.zones)
    return RESOLV_CONF.read_bytes()


def everything() -> dict[str, object]:
    records = tree(RECORDS)
    return {**tree(RESOLV_CONF.parent), **{f"{RECORDS}/{name}": of for name, of in records.items()}}


def live(kind: str, step: int, state: Path, report: Path) -> None:
    look = (lambda _journal: Facts(platform="darwin")) if "macos" in kind else find_facts
    with dying(step, is_os_thread, kill_self) as done:
        settings = OsSettings(backend_of(kind), state, look=look)
        settings.want(WISH)
        while settings.problems and not any("cannot" in text for text in settings.problems):
            time.sleep(0.001)
        is_applied = b"nameserver 100.64.0.2\n" in applied(kind)
        settings.close()
    report.write_text(json.dumps({"steps": done, "is_applied": is_applied}))


def try_step(kind: str, step: int, directory: Path) -> tuple[bool, list[str]]:
    """Whether it lived to the end, and what is wrong then."""
    state, report = directory / "state", directory / "report"
    for gone in (state, report):
        shutil.rmtree(gone, ignore_errors=True)
    report.unlink(missing_ok=True)
    state.mkdir()
    prepare(kind, directory)
    before = everything()
    if (pid := os.fork()) == 0:
        try:
            live(kind, step, state, report)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    wrong = []
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = repair(state)
    if status != 0:
        wrong.append(f"step {step}: {said.getvalue()}")
    after = everything()
    wrong += [
        f"step {step}: {name}: {before.get(name)} -> {after.get(name)}"
        for name in {*before, *after}
        if before.get(name) != after.get(name)
    ]
    left = sorted(path.name for path in state.iterdir())
    if left != ["os-lock"]:
        wrong.append(f"step {step}: left {left}")
    if report.exists() and not json.loads(report.read_text())["is_applied"]:
        wrong.append("it was never applied")
    return report.exists(), wrong


def main() -> None:
    directory = Path("/run/killed")
    directory.mkdir()
    results = {}
    for kind in sys.argv[1:]:
        wrong: list[str] = []
        for step in range(MAX_STEPS):
            is_over, found = try_step(kind, step, directory)
            wrong += found
            if is_over:
                break
        results[kind] = {"steps": step, "wrong": wrong}
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""For a private mount namespace with an `/etc` and `/run` of its own: kills VNet's changes at each step.

For each kind of `/etc/resolv.conf` and each step a process sets up the resolver and takes it back, and is
killed with SIGKILL at that step; another repairs. Prints JSON: by kind, the steps and what differs.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from fault_steps import dying, is_os_thread, kill_self, tree

from supervisor.cli.repair import repair
from supervisor.osconfig.os_settings import OsSettings
from supervisor.osconfig.resolv_conf_backend import RESOLV_CONF
from supervisor.osconfig.wish import ResolverWish

WISH = ResolverWish("vnet0", 7, ("demo.test",), (bytes([100, 64, 0, 2]),))
BEFORE = b"# by hand\nnameserver 192.0.2.1\nsearch corp.test\n" + b"# more\n" * 50
MAX_STEPS = 100


def prepare(kind: str, directory: Path) -> None:
    if f" {RESOLV_CONF} " in Path("/proc/self/mounts").read_text():
        subprocess.run(["umount", str(RESOLV_CONF)], check=True)
    RESOLV_CONF.unlink(missing_ok=True)
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


def live(step: int, state: Path, report: Path) -> None:
    with dying(step, is_os_thread, kill_self) as done:
        settings = OsSettings("resolv.conf", state)
        settings.want(WISH)
        while settings.problems and not any("cannot" in text for text in settings.problems):
            time.sleep(0.001)
        applied = RESOLV_CONF.read_text()
        settings.close()
    report.write_text(json.dumps({"steps": len(done), "applied": applied}))


def try_step(kind: str, step: int, directory: Path) -> tuple[bool, list[str]]:
    """Whether it lived to the end, and what is wrong then."""
    state, report = directory / "state", directory / "report"
    for gone in (state, report):
        shutil.rmtree(gone, ignore_errors=True)
    report.unlink(missing_ok=True)
    state.mkdir()
    prepare(kind, directory)
    before = tree(RESOLV_CONF.parent)
    if (pid := os.fork()) == 0:
        try:
            live(step, state, report)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    wrong = []
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = repair(state)
    if status != 0:
        wrong.append(f"step {step}: {said.getvalue()}")
    after = tree(RESOLV_CONF.parent)
    wrong += [
        f"step {step}: {name}: {before.get(name)} -> {after.get(name)}"
        for name in {*before, *after}
        if before.get(name) != after.get(name)
    ]
    left = sorted(path.name for path in state.iterdir())
    if left != ["os-lock"]:
        wrong.append(f"step {step}: left {left}")
    if report.exists() and "nameserver 100.64.0.2\n" not in report.read_text().replace("\\n", "\n"):
        wrong.append("it was never applied")
    return report.exists(), wrong


def main() -> None:
    directory = Path("/run/killed")
    directory.mkdir()
    results = {}
    for kind in ("file", "mount", "link", "missing"):
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

"""Makes private networks: a running `vnet demo`, or an empty one for parts of VNet started alone."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from private_bed import Bed, children, descendants, inner_pid, live, wait_until

VNET = str(Path(sys.executable).with_name("vnet"))
SUPERVISOR = str(Path(sys.executable).with_name("vnet-supervisor"))


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory that other users may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="vnet-e2e-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


# What the demo's COMMAND does: says what it was given, then waits for the end of its input.
REPORT_AND_WAIT = (
    "import json, os, sys; print(json.dumps(dict(os.environ)), flush=True); sys.stdin.read()"
)


@contextlib.contextmanager
def demo_bed(
    cluster: str = "",
    config: str = "",
    *,
    program: Sequence[str] = (VNET,),
    env: Mapping[str, str] | None = None,
) -> Iterator[Bed]:
    """A running `vnet demo`; `cluster` and `config` are the texts of the two files."""
    with contextlib.ExitStack() as closing:
        directory = closing.enter_context(scratch_directory())
        arguments = [*program, "demo"]
        for option, text in (("cluster", cluster), ("config", config)):
            if text:
                path = directory / f"{option}.toml"
                path.write_text(text)
                arguments += [f"--{option}", str(path)]
        errors = closing.enter_context((directory / "demo.err").open("w+b"))
        process = closing.enter_context(
            subprocess.Popen(
                [*arguments, "--", sys.executable, "-c", REPORT_AND_WAIT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | dict(env or {}),
            )
        )
        try:
            environment = _first_line(process, directory / "demo.err")
            directory_in = Path(environment["VNET_RUN_DIR"]).parent
            bed = Bed(_init_below(process.pid), directory, environment)
            bed.logs.append(directory_in / "vnet.log")
            with live(bed):
                yield bed
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(20) == 0, "the demo did not end well"
        finally:
            process.kill()


def _first_line(process: subprocess.Popen[bytes], errors: Path) -> dict[str, str]:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 60)
    line = process.stdout.readline() if ready else b""
    assert line, f"the demo does not start: {errors.read_text()}"
    return dict(json.loads(line))


def _init_below(pid: int) -> int:
    """The process below `pid` that is the first of a pid namespace."""
    for candidate in descendants(pid):
        with contextlib.suppress(OSError):  # one that has just ended
            if inner_pid(Path(f"/proc/{candidate}")) == 1:
                return candidate
    raise AssertionError(f"no init below {pid}")


@contextlib.contextmanager
def bare_bed() -> Iterator[Bed]:
    """A private network with nothing in it but its loopback interface."""
    flags = ["--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with (
        scratch_directory() as directory,
        subprocess.Popen(
            ["unshare", *flags, "sh", "-c", "echo up; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            paths = {"VNET_RUN_DIR": f"{directory}/run", "TELEPORT_HOME": f"{directory}/tsh"}
            programs = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
            environment = dict(os.environ) | paths | {"PATH": programs}
            bed = Bed(_init_below(process.pid), directory, environment)
            bed.output("ip", "link", "set", "lo", "up")
            with live(bed):
                yield bed
        finally:
            process.kill()


@contextlib.contextmanager
def supervisor_in(
    bed: Bed,
    *arguments: str,
    config: str = "",
    name: str = "vnet",
    run_dir: str = "run",
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A `vnet-supervisor` in a bare bed, ended with SIGTERM at the latest when the block ends."""
    path = bed.directory / f"{name}.toml"
    path.write_text(config or '[dns]\nupstream = ["127.0.0.54"]\nos_integration = "none"\n')
    log = bed.directory / f"{name}.log"
    if log not in bed.logs:
        bed.logs.append(log)
    run_path, state_path = bed.directory / run_dir, bed.directory / f"{name}-state"
    options = ["--config", str(path), "--run-dir", str(run_path), "--state-dir", str(state_path)]
    with bed.running(SUPERVISOR, *options, *arguments, log_name=name, env=env) as process:
        try:
            yield process
        finally:
            stop(process)


def supervisor_pid(process: subprocess.Popen[bytes]) -> int:
    """Our id of the program that `Bed.running` has started (its parent is nsenter)."""
    return wait_until(lambda: children(process.pid), "the program runs")[0]


def stop(process: subprocess.Popen[bytes], seconds: float = 15) -> int:
    """Ends a program of `Bed.running` with SIGTERM; its exit status."""
    for pid in children(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return process.wait(seconds)

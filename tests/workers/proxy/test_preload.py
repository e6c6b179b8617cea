"""No library imports anything when it is first used: a confined worker may not be able to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from teleport_fakes import LONG_AFTER, user_certificate, write_home

ROOT = Path(__file__).parent.parent.parent.parent
SCRIPT = Path(__file__).with_name("confined_script.py")


@pytest.fixture
def session_bus(tmp_path):
    """A real D-Bus session bus on which nobody shows notifications; "" where there is none."""
    program = shutil.which("dbus-daemon")
    if program is None:
        yield ""
        return
    command = [
        program,
        "--session",
        "--nofork",
        "--print-address",
        f"--address=unix:path={tmp_path}/bus",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as daemon:
        assert daemon.stdout is not None
        yield daemon.stdout.readline().strip()
        daemon.terminate()


def test_nothing_is_imported_late(tmp_path, session_bus):
    write_home(tmp_path / "tsh", user_certificate(LONG_AFTER), proxy="localhost")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DBUS_SESSION_BUS_ADDRESS": session_bus},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_the_worker_of_ssh_starts_without_what_paramiko_has_for_others():
    program = (
        "import sys, workers.runtime, workers.proxy.ssh.opening, paramiko.config\n"
        "print(paramiko.config.invoke, sys.modules['invoke'])"
    )
    output = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    assert output.split() == ["None", "None"]

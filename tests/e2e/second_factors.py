"""The user's side of second factors in private networks: `vnet mfa` with lines, a terminal or a key."""

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from private_bed import PATIENCE_SECONDS, Bed, wait_until

from demo.cluster.totp import totp_code

# Codes that were given, by cluster: each takes a code once.
_given: set[tuple[str, str]] = set()
_STEP_SECONDS = 30

# `vnet`, with a security key that signs at once in the place of what is at USB.
WITH_KEY = """
import base64, json, os, sys
sys.path.insert(0, os.environ["KEY_DIRECTORY"])
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from software_key import SoftwareKey
from supervisor.cli import app, security_key
with open(os.path.join(os.environ["TELEPORT_HOME"], "webauthn-credential.json")) as file:
    found = json.load(file)
key = SoftwareKey(
    rp_id=os.environ["KEY_SITE"],
    credential_id=base64.b64decode(found["credential_id"]),
    user_handle=base64.b64decode(found["user_handle"]),
    private_key=load_pem_private_key(found["private_key"].encode(), None),
)
key.touched.set()
security_key.find_keys = lambda: iter([("/dev/key", lambda: key)])
app.main()
"""
# What `vnet mfa` runs, as another user, who may not be able to read the program where it lies.
MFA_AS_USER = """
import os, pwd, sys
from pathlib import Path
from supervisor.cli import mfa, security_key
from supervisor.cli.control_client import AskError
entry = pwd.getpwnam(os.environ["AS_USER"])
os.setgroups([])
os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
try:
    status = mfa.run(Path(os.environ["VNET_RUN_DIR"]), watch=False)
except AskError as error:
    status = error.status
    print(error, file=sys.stderr)
raise SystemExit(int(status))
"""


def fresh_code(bed: Bed, cluster: str) -> str:
    """A one-time password that this cluster takes now."""
    secret = (bed.path(bed.environment["TELEPORT_HOME"]) / "totp-secret").read_text().strip()

    def find() -> str:
        # In this order: it must be good until it has been typed.
        codes = (totp_code(secret, time.time() + step * _STEP_SECONDS) for step in (0, 1))
        return next((code for code in codes if (cluster, code) not in _given), "")

    code = wait_until(find, f"{cluster} takes another code", 2 * _STEP_SECONDS)
    _given.add((cluster, code))
    return code


class Waiting:
    """A program that connects and is made to wait."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    def result(self, seconds: float = PATIENCE_SECONDS) -> tuple[int, str]:
        """Exit status and output, of both kinds."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output.decode(errors="replace")


@contextlib.contextmanager
def started(bed: Bed, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Waiting]:
    """A program beside the test, killed at the latest when the block ends."""
    with subprocess.Popen(
        bed.command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=bed.environment | (env or {}),
    ) as process:
        try:
            yield Waiting(process)
        finally:
            process.kill()


def mfa(bed: Bed, *lines: str, timeout: float = 60) -> tuple[int, str]:
    """`vnet mfa` with these lines on standard input; exit status and output, of both kinds."""
    done = bed.run(
        "vnet", "mfa", stdin="".join(f"{line}\n" for line in lines).encode(), timeout=timeout
    )
    return done.returncode, (done.stdout + done.stderr).decode()


def key_environment(site: str) -> dict[str, str]:
    """For `WITH_KEY`; `site` is the host of the proxy."""
    directory = Path(__file__).parent.parent / "supervisor"
    return {"KEY_DIRECTORY": str(directory), "KEY_SITE": site}


def program(text: str, *arguments: str) -> tuple[str, ...]:
    """The command line of one of the programs above."""
    return (sys.executable, "-c", text, *arguments)


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, master: int) -> None:
        self.text = ""
        self._master = master
        self._seen = 0

    def expect(self, text: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Waits for the text behind what was expected before."""
        deadline = time.monotonic() + seconds
        while (found := self.text.find(text, self._seen)) < 0:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._master], [], [], left)[0]
            piece = self._read() if ready else b""
            assert piece, f"{text!r} does not come: {self.text[self._seen :]!r}"
            self.text += piece.decode(errors="replace")
        self._seen = found + len(text)

    def _read(self) -> bytes:
        try:
            return os.read(self._master, 4096)
        except OSError:  # nobody has the other end any more
            return b""

    def type(self, text: str) -> None:
        """Presses keys."""
        os.write(self._master, text.encode())


@contextlib.contextmanager
def terminal(bed: Bed, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Terminal]:
    """A program in a terminal, which has to end well: by itself, or with Ctrl-C if it watches."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        bed.command("setsid", "--ctty", *arguments),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=bed.environment | (env or {}),
    ) as process:
        os.close(slave)
        try:
            yield Terminal(master)
            if "--watch" in arguments:
                os.write(master, b"\x03")
            assert process.wait(PATIENCE_SECONDS) == 0
        finally:
            process.kill()
            os.close(master)

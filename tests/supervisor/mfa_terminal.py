"""`vnet mfa` in a terminal of its own, with or without a security key at hand."""

import asyncio
import contextlib
import os
import pty
import sys
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

VNET = "from supervisor.cli.app import main; main()"
ROOT = Path(__file__).parent.parent.parent
# The first terminal that the leader of a session opens is its own, so that Ctrl-C reaches it.
TAKE_TERMINAL = "import os; os.close(os.open(os.ttyname(0), os.O_RDWR))\n"
DEADLINE_SECONDS = 60.0
EXPECT_SECONDS = 30.0
# Signs at once, in the place of what is at USB.
WITH_KEY = """
import os, sys
sys.path.insert(0, os.environ["TEST_DIRECTORY"])
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from software_key import SoftwareKey
from supervisor.cli import security_key
private_key = load_pem_private_key(os.environ["TEST_KEY"].encode(), None)
key = SoftwareKey(private_key=private_key, pin=os.environ.get("TEST_PIN", ""))
key.rp_id = os.environ["TEST_RP_ID"]
key.credential_id = bytes.fromhex(os.environ["TEST_CREDENTIAL"])
key.user_handle = bytes.fromhex(os.environ["TEST_USER"])
if "TEST_UNTOUCHED" not in os.environ:
    key.touched.set()
def open_key():
    key.is_closed = False
    return key
security_key.find_keys = lambda: iter([("/dev/key", open_key)])
"""


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, process, master):
        self.process = process
        self.text = ""
        self._master = master
        self._seen = 0
        self._is_over = False  # nobody has the other end any more
        self._more = asyncio.Event()
        asyncio.get_running_loop().add_reader(master, self._read)

    @classmethod
    async def start(cls, run_dir, *arguments, program=VNET, **environment):
        master, slave = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", TAKE_TERMINAL + program, "mfa", *arguments),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=os.environ | {"VNET_RUN_DIR": str(run_dir)} | environment,
            start_new_session=True,
        )
        os.close(slave)
        return cls(process, master)

    def _read(self):
        try:
            piece = os.read(self._master, 4096)
        except OSError:
            piece = b""
        if not piece:
            self._is_over = True
            asyncio.get_running_loop().remove_reader(self._master)
        self.text += piece.decode(errors="replace")
        self._more.set()

    async def expect(self, text):
        """Waits for the text behind what was expected before."""
        deadline = asyncio.get_running_loop().time() + EXPECT_SECONDS
        while (found := self.text.find(text, self._seen)) < 0:
            is_in_time = asyncio.get_running_loop().time() < deadline
            assert is_in_time, f"{text!r} is not in {self.text}"
            assert self.process.returncode is None, f"it ended without {text!r}: {self.text}"
            self._more.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._more.wait(), 1.0)
        self._seen = found + len(text)

    def type(self, text):
        os.write(self._master, text.encode())

    async def end(self):
        """Waits for the end; returns the exit status."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            status = await self.process.wait()
            while not self._is_over:
                self._more.clear()
                await self._more.wait()
        return status

    def close(self):
        asyncio.get_running_loop().remove_reader(self._master)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        os.close(self._master)


def key_environment(key):
    """For a program that begins with WITH_KEY."""
    pem = key.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return {
        "TEST_DIRECTORY": str(Path(__file__).parent),
        "TEST_KEY": pem.decode(),
        "TEST_RP_ID": key.rp_id,
        "TEST_CREDENTIAL": key.credential_id.hex(),
        "TEST_USER": key.user_handle.hex(),
    }

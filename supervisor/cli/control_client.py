"""Asks a running supervisor over its control socket."""

import socket
import time
from pathlib import Path

import msgspec

from supervisor.control_messages import Answer, Request, encode
from supervisor.exits import ExitStatus
from supervisor.status import Status

# The contract: a command never hangs longer than this.
TIMEOUT_SECONDS = 2.0
MAX_ANSWER_BYTES = 4 << 20


class AskError(Exception):
    """No answer; the text says why and what to do."""

    def __init__(self, status: ExitStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


def ask(run_dir: Path, request: Request, seconds: float = TIMEOUT_SECONDS) -> bytes:
    """The answer to one request, one JSON object, within `seconds`.

    Raises:
        AskError: VNet does not run, does not answer, or may not be asked.
    """
    path = run_dir / "control.sock"
    data = b""
    deadline = time.monotonic() + seconds
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.settimeout(seconds)
            end.connect(str(path))
            end.sendall(encode(request) + b"\n")
            while not data.endswith(b"\n"):
                # Anew each time: an answer that comes in drops must not stretch it.
                end.settimeout(max(deadline - time.monotonic(), 0.001))
                piece = end.recv(65536)
                if not piece or len(data) > MAX_ANSWER_BYTES:
                    raise AskError(ExitStatus.INTERNAL, "VNet closed the connection unanswered")
                data += piece
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
        raise AskError(
            ExitStatus.NOT_RUNNING,
            f"VNet is not running (no answer at {path}): start it with sudo vnet-supervisor, or"
            " name another with VNET_RUN_DIR",
        ) from error
    except TimeoutError as error:
        raise AskError(
            ExitStatus.INTERNAL, f"VNet did not answer within {seconds:g} s: see its log"
        ) from error
    except PermissionError as error:
        raise AskError(
            ExitStatus.NOT_PERMITTED, f"{path} may not be opened: run as root or as the VNet user"
        ) from error
    except OSError as error:
        raise AskError(ExitStatus.INTERNAL, f"{path}: {error}") from error
    return data


def ask_status(run_dir: Path, request: Request) -> tuple[Status, bytes]:
    """The status, decoded and as it came. Raises AskError."""
    data = ask(run_dir, request)
    try:
        return msgspec.json.decode(data, type=Status), data
    except msgspec.MsgspecError as error:
        raise AskError(ExitStatus.INTERNAL, f"VNet's answer is not understood: {error}") from error


def order(run_dir: Path, request: Request, seconds: float = TIMEOUT_SECONDS) -> Answer:
    """Carries out a command. Raises AskError, also when VNet refuses."""
    data = ask(run_dir, request, seconds)
    try:
        answer = msgspec.json.decode(data, type=Answer)
    except msgspec.MsgspecError as error:
        raise AskError(ExitStatus.INTERNAL, f"VNet's answer is not understood: {error}") from error
    if answer.status != ExitStatus.OK:
        raise AskError(ExitStatus(answer.status), answer.text)
    return answer

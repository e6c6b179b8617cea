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
                    raise AskError(
                        ExitStatus.INTERNAL,
                        "VNet closed the connection unanswered: try again, and see its log",
                    )
                data += piece
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
        raise AskError(
            ExitStatus.NOT_RUNNING,
            f"VNet is not running (no answer at {path}): start it with sudo vnet-supervisor, or"
            " name another with VNET_RUN_DIR",
        ) from error
    except (TimeoutError, BlockingIOError) as error:
        # The latter where so many have asked in vain that no more may wait.
        raise AskError(
            ExitStatus.INTERNAL,
            f"VNet did not answer within {seconds:.2g} s: its supervisor is stopped or hangs; see its log,"
            " and start it anew if it goes on",
        ) from error
    except PermissionError as error:
        raise AskError(
            ExitStatus.NOT_PERMITTED, f"{path} may not be opened: run as root or as the VNet user"
        ) from error
    except OSError as error:
        raise AskError(
            ExitStatus.INTERNAL,
            f"{path} cannot be used ({error.strerror or error}): name another directory with VNET_RUN_DIR,"
            " or see VNet's log",
        ) from error
    return data


def not_understood(error: Exception) -> str:
    """What to say of an answer that is none."""
    return (
        f"VNet's answer is not understood ({error}): it may be of another version than this command;"
        " restart it"
    )


def ask_status(
    run_dir: Path, request: Request, seconds: float = TIMEOUT_SECONDS
) -> tuple[Status, bytes]:
    """The status, decoded and as it came. Raises AskError."""
    data = ask(run_dir, request, seconds)
    try:
        return msgspec.json.decode(data, type=Status), data
    except msgspec.MsgspecError as error:
        raise AskError(ExitStatus.INTERNAL, not_understood(error)) from error


def order(run_dir: Path, request: Request, seconds: float = TIMEOUT_SECONDS) -> Answer:
    """Carries out a command. Raises AskError, also when VNet refuses."""
    try:
        data = ask(run_dir, request, seconds)
    except AskError as error:
        if error.status is ExitStatus.INTERNAL:
            text = f"{error}; it may still do what was asked for"
            raise AskError(error.status, text) from error
        raise
    try:
        answer = msgspec.json.decode(data, type=Answer)
    except msgspec.MsgspecError as error:
        raise AskError(ExitStatus.INTERNAL, not_understood(error)) from error
    if answer.status != ExitStatus.OK:
        raise AskError(ExitStatus(answer.status), answer.text)
    return answer

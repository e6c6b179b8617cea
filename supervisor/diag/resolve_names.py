"""Asks the system's resolver, in a process of its own that can be ended: the C library cannot be.

Runs alone, without the rest of VNet:

    python -I resolve_names.py SECONDS      input: JSON [[name, "A" or "AAAA"], ...]
                                            output: a line [number, outcome, [address, ...], error] each

A question without a line had no answer in time.
"""

import json
import os
import socket
import sys
import threading
import time

# At the same time; more wait for their turn.
MAX_THREADS = 64
# The C library says "try again" when no server answered in time, and for a server's failure. No
# resolver waits less than this.
LEAST_WAIT_SECONDS = 0.9

_FAMILIES = {"A": socket.AF_INET, "AAAA": socket.AF_INET6}
_NOT_FOUND = {
    getattr(socket, name)
    for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY")
    if hasattr(socket, name)
}


def resolve(name: str, kind: str) -> tuple[str, list[str], str]:
    """(outcome, addresses, error) of one name, as programs of this machine would get them."""
    began = time.monotonic()
    try:
        # The final dot keeps the search list out.
        found = socket.getaddrinfo(f"{name}.", None, _FAMILIES[kind], socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in _NOT_FOUND:
            return "not found", [], ""
        has_waited = time.monotonic() - began >= LEAST_WAIT_SECONDS
        is_late = error.errno == socket.EAI_AGAIN and has_waited
        return ("timeout" if is_late else "error"), [], str(error.strerror)
    except (OSError, UnicodeError) as error:
        return "error", [], str(error)
    return "found", [str(info[4][0]) for info in found], ""


def main(arguments: list[str]) -> None:
    """See the module."""
    seconds, questions = float(arguments[1]), json.load(sys.stdin)
    room = threading.Semaphore(MAX_THREADS)
    writing = threading.Lock()

    def answer(number: int, name: str, kind: str) -> None:
        with room:
            result = resolve(name, kind)
        with writing:
            sys.stdout.write(json.dumps([number, *result]) + "\n")

    threads = [
        threading.Thread(target=answer, args=(number, name, kind), daemon=True)
        for number, (name, kind) in enumerate(questions)
    ]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    with writing:
        sys.stdout.flush()
        # Not the ordinary end, which waits for the C library.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv)

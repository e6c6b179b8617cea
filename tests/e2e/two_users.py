"""Connections of several users of one machine, made by processes that are theirs.

The program is started as root, from the test's own Python, and its children become others: what they need is
loaded by then, for they may not be able to read it.
"""

import json
import socket
import sys
from collections.abc import Sequence
from typing import Any

from private_bed import Bed

# Words that `attempt` answers with; "cut" and "error" are followed by more.
CONNECTED, REFUSED, LEFT = "connected", "refused", "left"

_PROGRAM = r"""
import errno, json, os, socket, struct, sys, threading, time

RESET = struct.pack("ii", 1, 0)
DATA = b"a piece of data"

def bound(wanted):
    family = socket.AF_INET6 if wanted.get("v6") or ":" in wanted["address"] else socket.AF_INET
    end = socket.socket(family)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    end.settimeout(wanted.get("seconds", 20))
    if wanted.get("device"):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, wanted["device"].encode())
    if "source" in wanted:
        for attempts in range(2000):
            try:
                end.bind((wanted["source"], wanted.get("source_port", 0)))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or attempts == 1999:
                    raise
                time.sleep(0.001)
    return end

def attempt(wanted):
    end = bound(wanted)
    address = "::ffff:" + wanted["address"] if wanted.get("v6") else wanted["address"]
    place = (address, wanted["port"])
    if wanted.get("leaves"):
        # The SYN goes out, and nobody is there any more.
        end.setblocking(False)
        # Should it be answered before: nothing of it waits afterwards.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        end.connect_ex(place)
        end.close()
        return "left"
    try:
        end.connect(place)
    except ConnectionRefusedError:
        end.close()
        return "refused"
    except OSError as error:
        end.close()
        return f"error {error}"
    try:
        if wanted.get("reads"):
            data = end.recv(4)
            return "connected" if data == wanted["reads"].encode() else f"cut {data}"
        end.sendall(DATA)
        received = b""
        while len(received) < len(DATA):
            piece = end.recv(100)
            if not piece:
                return f"cut after {received}"
            received += piece
        return "connected"
    except OSError as error:
        return f"cut {error}"
    finally:
        if not wanted.get("waits"):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        end.close()

class Child:
    def __init__(self, uid, gid):
        self.ours, theirs = socket.socketpair()
        if os.fork() == 0:
            status = 1
            try:
                self.ours.close()
                os.setgroups([])
                os.setgid(gid)
                os.setuid(uid)
                stream = theirs.makefile("rw")
                for line in stream:
                    began = time.monotonic()
                    result = attempt(json.loads(line))
                    stream.write(json.dumps([result, time.monotonic() - began]) + "\n")
                    stream.flush()
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        self.stream = self.ours.makefile("rw")

    def __call__(self, wanted):
        self.stream.write(json.dumps(wanted) + "\n")
        self.stream.flush()
        return json.loads(self.stream.readline())

def run(steps, children, results):
    for who, wanted in steps:
        results.append([who, *children[who](wanted)])

job = json.load(sys.stdin)
# Every process before the first thread.
crews = [{who: Child(uid, uid) for who, uid in job["users"].items()} for _ in job["lanes"]]
lanes = [[] for _ in job["lanes"]]
threads = [
    threading.Thread(target=run, args=(steps, crew, results))
    for steps, crew, results in zip(job["lanes"], crews, lanes)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(lanes))
"""

# Whose attempt, and what it is.
Step = tuple[str, dict[str, Any]]
Result = tuple[str, str, float]  # whose, outcome, seconds


def attempts(
    bed: Bed, users: dict[str, int], lanes: Sequence[Sequence[Step]], timeout: float = 120
) -> list[list[Result]]:
    """Makes the attempts of each lane one after the other, and the lanes at the same time.

    An attempt has `address` and `port`, and perhaps: `source` and `source_port`; `v6`, to reach an IPv4
    address by an IPv6 socket; `device`, to be bound to it; `leaves`, to be gone when the SYN is out;
    `waits`, to end it in order; `reads`, the first four bytes of a server; `seconds`.
    """
    job = json.dumps({"users": users, "lanes": lanes})
    text = bed.output(sys.executable, "-c", _PROGRAM, stdin=job.encode(), timeout=timeout)
    return [
        [(who, outcome, seconds) for who, outcome, seconds in lane] for lane in json.loads(text)
    ]


def one_after_the_other(bed: Bed, users: dict[str, int], *steps: Step) -> list[str]:
    """The outcomes of the attempts."""
    [lane] = attempts(bed, users, [steps])
    return [outcome for _, outcome, _ in lane]


def own_address(bed: Bed, address: str) -> str:
    """The address from which the private network's programs reach another one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with bed.open_socket(family, socket.SOCK_DGRAM) as end:
        end.connect((address, 9))
        return str(end.getsockname()[0])

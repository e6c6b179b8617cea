"""Asks for probe names: VNet's DNS addresses directly, and the system's resolver. As the caller.

The times and what is tried again are those of lib/vnet/diag/dns.go of Teleport.
"""

import functools
import json
import secrets
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from supervisor.diag.dns_check import DIRECT_ZONE, PROBE_RANDOM_BYTES, expected_of, probe_name
from supervisor.diag.facts import DnsFacts, Outcome, RecordFacts, ServerFacts
from supervisor.diag.parallel import Failed, run_all

QUERY_SECONDS: Final = 2.0
TRIES: Final = 3
PAUSE_SECONDS: Final = 0.5
DNS_PORT: Final = 53
# For all questions to the system's resolver together; it is asked a second time at most.
RESOLVER_SECONDS: Final = 4.0
# To start the process that asks, and to end it.
PROCESS_SECONDS: Final = 2.0
MAX_ZONES: Final = 100
_MAX_OUTPUT: Final = 1 << 20
_HEADER: Final = struct.Struct(">6H")
_NUMBERS: Final = {"A": 1, "AAAA": 28}
_IN: Final = 1
_NXDOMAIN: Final = 3
_RECURSION_DESIRED: Final = 0x0100
_ANSWER: Final = 0x8000
_RCODE: Final = 0x000F
# A packed message that one record of an address fits in, with room.
_RECEIVE_BYTES: Final = 4096


def probe_dns(addresses: Sequence[str], zones: Sequence[str]) -> DnsFacts:
    """`addresses` are VNet's own; takes 17 s where everything is lost."""
    asked = {address: functools.partial(ask_server, address) for address in addresses}
    found = run_all(asked, TRIES * (QUERY_SECONDS + PAUSE_SECONDS) + 1)
    servers = tuple(
        ServerFacts(address, error=str(result.error)) if isinstance(result, Failed) else result
        for address, result in found.items()
    )
    expected = expected_of(servers)
    chosen = list(zones)[:MAX_ZONES]
    records = resolve_zones(chosen, list(expected)) if expected else ()
    return DnsFacts(servers, expected, tuple(records), len(zones) - len(chosen))


def ask_server(address: str, port: int = DNS_PORT) -> ServerFacts:
    """Asks until there is an address, three times at most."""
    facts = ServerFacts(address, error="not asked")
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE_SECONDS)
        facts = _ask_once(address, port)
        if facts.is_reachable:
            break
    return facts


def _ask_once(address: str, port: int) -> ServerFacts:
    found = run_all(
        {kind: functools.partial(_query, address, port, kind) for kind in _NUMBERS},
        QUERY_SECONDS + 1,
    )
    texts = {kind: result for kind, result in found.items() if isinstance(result, str)}
    errors = [f"{k}: {r.error}" for k, r in found.items() if isinstance(r, Failed)]
    if any(texts.values()):
        errors = []
    elif not errors:
        errors = ["it answers without records"]
    return ServerFacts(address, texts.get("A", ""), texts.get("AAAA", ""), "; ".join(errors))


def _query(address: str, port: int, kind: str) -> str:
    """The first address of a probe name, empty if there is none. Raises OSError, ValueError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    query_id, name = (
        secrets.randbits(16),
        probe_name(secrets.token_bytes(PROBE_RANDOM_BYTES), DIRECT_ZONE),
    )
    question = pack_question(query_id, name, kind)
    deadline = time.monotonic() + QUERY_SECONDS
    with socket.socket(family, socket.SOCK_DGRAM) as end:
        end.settimeout(QUERY_SECONDS)
        try:
            end.connect((address, port))
            end.send(question)
            while (left := deadline - time.monotonic()) > 0:
                end.settimeout(left)
                reply = end.recv(_RECEIVE_BYTES)
                # What answers another question is none of ours.
                if reply[:2] == question[:2]:
                    return read_answer(reply, question, kind)
        except TimeoutError:
            pass
        except OSError as error:
            raise OSError(error.strerror or str(error)) from error
    raise TimeoutError(f"no answer within {QUERY_SECONDS:g} s")


def pack_question(query_id: int, name: str, kind: str) -> bytes:
    """A question in the form of RFC 1035 section 4."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    header = _HEADER.pack(query_id, _RECURSION_DESIRED, 1, 0, 0, 0)
    return header + labels + b"\0" + struct.pack(">HH", _NUMBERS[kind], _IN)


def read_answer(reply: bytes, question: bytes, kind: str) -> str:
    """The first address of this kind in an answer, empty for "there is none". Pure.

    Raises:
        ValueError: this is no answer to the question, or one of failure.
    """
    if (
        len(reply) < len(question)
        or reply[_HEADER.size : len(question)] != question[_HEADER.size :]
    ):
        raise ValueError("the answer is to another question")
    _, flags, _, answers, _, _ = _HEADER.unpack_from(reply)
    code = flags & _RCODE
    if not flags & _ANSWER or code not in (0, _NXDOMAIN):
        raise ValueError(f"it answers with failure (code {code})")
    at = len(question)
    for _ in range(min(answers, 64)):
        at = _after_name(reply, at)
        try:
            number, _, _, length = struct.unpack_from(">HHIH", reply, at)
        except struct.error as error:
            raise ValueError("the answer is cut") from error
        at += 10
        data = reply[at : at + length]
        if number == _NUMBERS[kind] and len(data) == length == (4 if kind == "A" else 16):
            return str(ip_address(data))
        at += length
    return ""


def _after_name(message: bytes, at: int) -> int:
    while at < len(message):
        length = message[at]
        if length >= 0xC0:
            return at + 2
        at += 1 + length
        if not length:
            return at
    raise ValueError("the answer is cut")


# -- the system's resolver --


def resolve_zones(zones: Sequence[str], kinds: Sequence[str]) -> Iterator[RecordFacts]:
    """Every zone and kind; what is not found is asked for a second time."""
    pairs = [(zone, kind) for zone in zones for kind in kinds]
    found = _resolve(pairs)
    again = [number for number, fact in enumerate(found) if fact.outcome is Outcome.NOT_FOUND]
    if again:
        time.sleep(PAUSE_SECONDS)
        for number, fact in zip(again, _resolve([pairs[n] for n in again]), strict=True):
            found[number] = fact
    yield from found


def _resolve(pairs: Sequence[tuple[str, str]]) -> list[RecordFacts]:
    if not pairs:
        return []
    names = [
        (probe_name(secrets.token_bytes(PROBE_RANDOM_BYTES), zone), kind) for zone, kind in pairs
    ]
    program = str(Path(__file__).with_name("resolve_names.py"))
    late = f"no answer within {RESOLVER_SECONDS:g} s"
    found = [RecordFacts(zone, kind, Outcome.TIMEOUT, error=late) for zone, kind in pairs]
    try:
        done = subprocess.run(
            [sys.executable, "-I", program, str(RESOLVER_SECONDS)],
            input=json.dumps(names).encode(),
            capture_output=True,
            timeout=RESOLVER_SECONDS + PROCESS_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return found
    for line in done.stdout[:_MAX_OUTPUT].splitlines():
        try:
            number, outcome, addresses, error = json.loads(line)
            zone, kind = pairs[number]
            found[number] = RecordFacts(zone, kind, Outcome(outcome), tuple(addresses), error)
        except (ValueError, TypeError, IndexError):
            continue
    return found

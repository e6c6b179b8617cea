"""The confinement of real workers at work, as the kernel shows it."""

import json
import signal
from pathlib import Path

import pytest
from private_bed import Bed, read_all, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]

SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def fields(status: Path) -> dict[str, str]:
    lines = status.read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def use(bed: Bed) -> None:
    """Makes every worker do what it is for, with all the threads it starts for that."""
    bed.ask("unknown.upstream.test")
    with bed.connect("echo.teleport.e2e.test", 7) as end:
        end.sendall(b"ping")
        end.shutdown(1)
        assert read_all(end) == b"ping"


def test_every_thread_of_every_worker_is_confined(bed):
    use(bed)
    workers = bed.status()["workers"]
    uids = {}
    for worker in workers:
        confinement = worker["confinement"]
        assert confinement["missing"] == []
        assert confinement["capabilities"] == []
        assert confinement["no_new_privs"] is True
        assert confinement["seccomp"] == "allow-list"
        assert confinement["landlock"] >= 6
        uids[worker["name"]] = confinement["uid"]
        looked_at = 0
        for thread in Path(f"/proc/{bed.outer_pid(worker['pid'])}/task").iterdir():
            try:
                found = fields(thread / "status")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended meanwhile
            looked_at += 1
            assert found["Seccomp"] == "2"
            assert found["NoNewPrivs"] == "1"
            assert {int(found[name], 16) for name in SETS} == {0}
            assert found["Uid"].split() == found["Gid"].split() == [str(confinement["uid"])] * 4
        # The bus has two of its own.
        assert looked_at >= 3
    assert uids["proxy-0"] == uids["proxy-1"] == uids["ssh"]
    assert len(set(uids.values())) == 3
    assert uids["tun"] > 0 < uids["dns"]


def test_status_for_people_has_no_note_when_nothing_is_missing(bed):
    assert "note, " not in bed.output("vnet", "status")


def test_workers_log_no_refusal_while_they_work(bed):
    use(bed)
    log = bed.log()
    for sign in ("Permission denied", "Operation not permitted", "confined worker"):
        assert sign not in log


def test_replaced_worker_is_confined_like_the_first(bed):
    before = bed.worker("dns")
    bed.kill(before["pid"], signal.SIGKILL)
    after = wait_until(
        lambda: (w := bed.worker("dns"))["state"] == "ready" and w["pid"] != before["pid"] and w,
        "dns is replaced",
    )
    assert json.dumps(after["confinement"]) == json.dumps(before["confinement"])
    bed.wait_for_health("healthy")
    use(bed)

"""How certificates are counted."""

import asyncio

import pytest

from workers.proxy.teleport.errors import RefusedError
from workers.proxy.teleport.issue_tally import IssueTally


def test_what_is_got_what_fails_and_what_is_cancelled():
    counters = {"connections_total": 1}
    tally = IssueTally(counters)
    with tally.counting("ssh"):
        pass
    for _ in range(2):
        with pytest.raises(RefusedError), tally.counting("database"):
            raise RefusedError("no role")
    with pytest.raises(asyncio.CancelledError), tally.counting("app"):
        raise asyncio.CancelledError
    assert counters == {
        "connections_total": 1,
        "certificates_ssh_issued": 1,
        "certificates_database_failed": 2,
    }

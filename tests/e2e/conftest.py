"""The beds that tests share, and VNet's log beside each failure."""

from collections.abc import Iterator

import private_bed
import pytest
from demo_bed import demo_bed
from private_bed import Bed
from shared_cluster import CLUSTER, CONFIG


@pytest.fixture(scope="session")
def session_bed() -> Iterator[Bed]:
    """One demo for all tests that leave it as they found it."""
    with demo_bed(CLUSTER, CONFIG) as bed:
        yield bed


@pytest.fixture
def bed(session_bed) -> Bed:
    """The shared demo, healthy again after whatever the test before has done to it."""
    session_bed.wait_for_health("healthy")
    return session_bed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Shows the end of each live VNet's log with a failure."""
    report = yield
    if report.failed:
        for number, shown in enumerate(private_bed.LIVE):
            lines = shown.log().splitlines()[-private_bed.LOG_LINES :]
            report.sections.append((f"log of VNet {number}", "\n".join(lines)))
    return report

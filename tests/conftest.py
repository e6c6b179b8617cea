"""What every test shares: how a test that needs root says so, and a fixed seed for Hypothesis."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The machine is slow and noisy: a deadline per example would only measure that. The examples are
# the same in each run, so a failure in one run fails in the next.
settings.register_profile(
    "vnet", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("vnet")

REQUIRED = os.environ.get("VNET_REQUIRE_E2E") == "1"


def _what_is_missing() -> str:
    if os.geteuid() != 0:
        return "not root"
    return "" if Path("/dev/net/tun").exists() else "no /dev/net/tun"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what cannot run here, with the reason; VNET_REQUIRE_E2E=1 lets it fail instead."""
    missing = _what_is_missing()
    if not missing or REQUIRED:
        return
    for item in items:
        if item.get_closest_marker("root") or item.get_closest_marker("e2e"):
            item.add_marker(pytest.mark.skip(reason=missing))

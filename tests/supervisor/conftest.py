"""What the tests of supervised runs share."""

import os
from pathlib import Path

import pretend_worker
import pytest


@pytest.fixture
def directory(tmp_path):
    """One that workers of other users can enter."""
    for part in (tmp_path, *tmp_path.parents):
        if part.stat().st_uid == os.getuid() and part != Path("/"):
            part.chmod(part.stat().st_mode | 0o011)
    return tmp_path


@pytest.fixture
def marker():
    return pretend_worker.Marker()

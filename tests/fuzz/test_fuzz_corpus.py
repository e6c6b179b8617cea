"""The fuzz targets without a fuzzer: every committed seed and finding, and some arbitrary bytes.

scripts/fuzz runs them for longer. What it finds becomes a seed named `finding-...`.
"""

import importlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
TARGETS = sorted(directory.name for directory in CORPUS.iterdir())
SEEDS = [seed for target in TARGETS for seed in sorted((CORPUS / target).iterdir())]

# Of libraries, about odd keys and certificates.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def check_of(target):
    return importlib.import_module(f"fuzz_{target}").check


@st.composite
def altered(draw, seeds):
    """A seed with a few places changed, cut out or put in."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        removed = draw(st.sampled_from([0, 0, 1, 1, 4, 100]))
        data[place : place + removed] = draw(st.binary(max_size=4))
    return bytes(data)


def test_every_target_has_seeds_and_every_seed_a_target():
    modules = sorted(path.stem for path in HERE.glob("fuzz_*.py"))
    assert modules == [f"fuzz_{target}" for target in TARGETS]


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"{seed.parent.name}-{seed.name}")
def test_target_takes_its_seed(seed):
    check_of(seed.parent.name)(seed.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_target_takes_arbitrary_bytes(target):
    check = check_of(target)
    seeds = [seed.read_bytes() for seed in SEEDS if seed.parent.name == target]

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.binary(max_size=300), altered(seeds)))
    def examples(data):
        check(data)

    examples()

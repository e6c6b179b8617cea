"""Runs one fuzz target under atheris. See scripts/fuzz.

    run.py TARGET --seconds 300 --corpus DIRECTORY

Inputs that lead to new code are kept in <corpus>/grown; the committed seeds in tests/fuzz/corpus/TARGET
are read as well. A finding ends the run with a status that is not 0, and is written to
<corpus>/findings.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

# What is measured: VNet's own code, the libraries in Python that read for it, and which values were
# built for decoders that are not in Python.
_INSTRUMENTED = ["ipc", "supervisor", "workers", "dnslib", "yaml", "typed_values"]
# One input may take so long, and the process so much memory.
_INPUT_SECONDS = 10
_MEMORY_MEGABYTES = 1024
_MAX_INPUT_BYTES = 8192


def main() -> None:
    """Never returns: libFuzzer ends the process."""
    parser = argparse.ArgumentParser(description="Runs one fuzz target.")
    parser.add_argument("target", help="a directory of tests/fuzz/corpus")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, required=True, help="outside of the tree")
    arguments = parser.parse_args()
    seeds = HERE / "corpus" / arguments.target
    if not seeds.is_dir():
        parser.error(f"there is no target {arguments.target}")
    findings, grown = arguments.corpus / "findings", arguments.corpus / "grown"
    for directory in (findings, grown):
        directory.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=_INSTRUMENTED):
        target = importlib.import_module(f"fuzz_{arguments.target}")
    options = [
        f"-max_total_time={arguments.seconds}",
        f"-timeout={_INPUT_SECONDS}",
        f"-rss_limit_mb={_MEMORY_MEGABYTES}",
        f"-max_len={_MAX_INPUT_BYTES}",
        f"-artifact_prefix={findings}{os.sep}",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(grown), str(seeds)], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

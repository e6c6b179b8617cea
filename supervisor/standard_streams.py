"""Standard input, output and error that the caller has closed, as in `vnet status >&-`."""

import os
import sys


def fill_descriptors() -> None:
    """Opens those of 0, 1 and 2 that are closed: no socket may get such a number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def fill() -> None:
    """Does that, and has `sys` know them: what is printed there goes nowhere.

    Python has None for them, and what is printed to None goes to standard output.
    """
    fill_descriptors()
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115  # for as long as we run
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115

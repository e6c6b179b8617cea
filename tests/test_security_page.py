"""docs/security.md names the tests that show what it says: each of them is there."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "security.md"
TEXT = PAGE.read_text()
NAMED = sorted(set(re.findall(r"`(tests/[^`]+)`", TEXT)))
ATTACKERS = (
    TEXT.split("\n## Who could attack from where\n")[1].split("\n## ")[0].split("\n### ")[1:]
)


@functools.cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


@pytest.mark.parametrize("named", NAMED)
def test_named_test_is_there(named):
    path, separator, function = named.partition("::")
    assert separator, "a test is named as path::function"
    assert (ROOT / path).is_file()
    assert function in functions_of(path)


@pytest.mark.parametrize("section", ATTACKERS, ids=lambda text: text.partition("\n")[0])
def test_every_attacker_has_rows_with_tests_and_a_list_of_what_is_not_stopped(section):
    stopped, _, open_list = section.partition("\nWhat is not stopped:\n")
    rows = [line for line in stopped.splitlines() if line.startswith("| ")][2:]
    assert rows
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3, row
        assert re.fullmatch(r"(`tests/[^` ]+`\s*)+", cells[2]), f"no test: {cells[0]}"
    assert re.findall(r"^- \S", open_list, re.MULTILINE)


def test_attackers_are_those_that_were_thought_of():
    assert len(ATTACKERS) == 6
    assert len(NAMED) > 40


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT):
        assert (PAGE.parent / target).exists(), target

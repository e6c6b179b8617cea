"""The manual pages say all that the programs say, and roff can read them."""

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import typer

from supervisor import config, main
from supervisor.cli import man_pages
from supervisor.cli.app import app

ROOT = Path(__file__).parent.parent.parent
CONFIGURATION = (ROOT / "docs/configuration.md").read_text()
BUILT_AT = 1_750_000_000


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return man_pages.pages(CONFIGURATION, BUILT_AT)


def plain(roff: str) -> str:
    """The words of a page, fonts and line ends taken out."""
    for written, meant in (("\\fB", ""), ("\\fR", ""), ("\\-", "-"), ("\\&", ""), ("\\(aq", "'")):
        roff = roff.replace(written, meant)
    return " ".join(re.sub(r"(?m)^\.(PP|TP|nf|fi|RS.*|RE|br)$", "", roff).split())


def commands(group=None, path="vnet") -> Iterator[tuple[str, object]]:
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if subcommands := getattr(command, "commands", None):
            assert subcommands
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_each_command_has_a_page_with_its_whole_help(pages):
    found = list(commands())
    assert len(found) > 15
    for path, command in found:
        words = path.split()
        text = plain(pages[f"vnet-{words[1]}.1"])
        help_text = " ".join(command.help.split())
        for sentence in re.split(r"(?<=\.) |Example: ", help_text):
            assert sentence.strip().rstrip(".").lower() in text.lower(), (path, sentence)
        for parameter in command.params:
            if parameter.param_type_name == "option":
                for name in (*parameter.opts, *parameter.secondary_opts):
                    assert name in text, (path, name)
            assert (parameter.help or "") in text, (path, parameter.name)


def test_the_first_page_names_every_command(pages):
    text = plain(pages["vnet.1"])
    for path, _ in commands():
        assert f"vnet-{path.split()[1]}(1)" in text


def test_the_supervisors_page_has_every_flag(pages):
    text = plain(pages["vnet-supervisor.8"])
    actions = main.make_parser()._actions
    assert len(actions) > 8
    for action in actions:
        assert isinstance(action, argparse.Action)
        assert action.option_strings[-1] in text
        assert (action.help or "")[1:] in text


def test_the_page_of_the_configuration_has_every_key_with_its_default(pages):
    keys = {}
    for name, value in msgspec.to_builtins(config.Config()).items():
        keys |= value if isinstance(value, dict) else {name: value}
    text = plain(pages["vnet.toml.5"])
    # Of these the page has what the default means.
    del keys["user"], keys["teleport_home"]
    for name, value in keys.items():
        shown = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
        shown = shown or (f'"{value}"' if isinstance(value, str) else str(value))
        assert f"{name} = {shown.removesuffix('.0')}" in text, name
    assert "user = " in text
    assert "teleport_home = " in text
    assert 'network.ipv4_cidr_range = "auto" means' in text
    assert "](" not in text
    assert "`" not in text


def test_a_line_of_the_configuration_that_is_no_key_is_not_passed_over():
    broken = CONFIGURATION.replace("[network]\n", "network:\n")
    with pytest.raises(ValueError, match="network:"):
        man_pages.pages(broken, BUILT_AT)


def test_the_same_source_makes_the_same_pages_in_their_sections(pages, tmp_path):
    man_pages.write(tmp_path, CONFIGURATION, BUILT_AT)
    written = {path.name: path.read_text() for path in tmp_path.glob("man*/*")}
    assert written == pages
    assert (tmp_path / "man1/vnet.1").exists()
    assert (tmp_path / "man5/vnet.toml.5").exists()
    assert all("2025-06-15" in text.splitlines()[0] for text in pages.values())


def test_no_line_of_text_is_taken_for_an_order(pages):
    known = r"\.(TH|SH|SS|PP|TP|BR|nf|fi|RS|RE|br)( |$)"
    for name, text in pages.items():
        for line in text.splitlines():
            assert not line.startswith("'"), (name, line)
            assert not line.startswith(".") or re.match(known, line), (name, line)


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff")
def test_groff_has_nothing_to_say(pages):
    for name, text in pages.items():
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-z"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), name

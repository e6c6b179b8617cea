"""What the commands say of themselves: help, examples, wrong usage, the page of all commands, completion."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import json_schemas
import pytest
import typer
from control_bed import ControlBed
from terminal import DEADLINE_SECONDS, VNET

from supervisor import main as supervisor_main
from supervisor.cli import command_page, completion, man_pages
from supervisor.cli.app import app
from supervisor.clusters import ClusterView
from supervisor.exits import ExitStatus

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "commands.md"
SUPERVISOR = str(Path(VNET).with_name("vnet-supervisor"))
# Of the contract with users: what must be there, whatever else is.
PROMISED = {
    "status": "--json --watch --wait",
    "ls": "--kind --cluster --search --json",
    "connections": "--json --watch",
    "diag": "--json --output",
    "logs": "--follow --worker --level --json",
    "log-level": "--next-start",
    "mfa": "--watch",
    "login": "",
    "proxy": "",
    "ssh-config": "--install --putty",
    "restart": "--drain",
    "reload": "",
    "stop": "",
    "service install": "--user",
    "service uninstall": "",
    "service show": "",
    "repair": "",
    "demo": "--cluster --config",
    "demo-cluster": "--cluster --home",
}


def commands() -> Iterator[tuple[str, Any]]:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        subcommands = getattr(command, "commands", None) or {"": command}
        for sub_name, sub in subcommands.items():
            yield f"{name} {sub_name}".strip(), sub


COMMANDS = dict(commands())


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        env=os.environ | env,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def test_every_promised_command_has_its_options():
    assert COMMANDS.keys() == PROMISED.keys()
    for name, options in PROMISED.items():
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert set(options.split()) <= known, name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_it_understands(name):
    command = COMMANDS[name]
    _, _, examples = man_pages.split_help(command.help)
    assert examples
    for example in examples:
        # As a shell takes it apart; what follows && is another command.
        words = shlex.split(example.partition("&&")[0])
        words = words[words[0] == "sudo" :]
        assert words[: 1 + len(name.split())] == ["vnet", *name.split()]
        arguments = words[1 + len(name.split()) :]
        parsed = command.make_context(name, list(arguments), resilient_parsing=False)
        assert parsed.args == []


def test_the_supervisors_example_is_understood():
    parser = supervisor_main.make_parser()
    words = shlex.split((parser.epilog or "").removeprefix("example: "))
    assert words[:2] == ["sudo", "vnet-supervisor"]
    assert parser.parse_args(words[2:]).user == "alice"


@pytest.mark.parametrize("name", ["", "status", "service", "service install"])
def test_help_fits_80_columns_and_shows_the_example(name):
    done = run(VNET, *name.split(), "--help", COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout
    if name in COMMANDS:
        assert "Example: " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("foo", "no such command 'foo'; see vnet --help"),
        ("statu", "no such command 'statu'. Did you mean 'status'"),
        ("status --bogus", "no such option: --bogus; see vnet status --help"),
        ("status --wait soon", "invalid value for '--wait'"),
        ("status extra", "see vnet status --help"),
        ("status --run-dir", "option '--run-dir' requires an argument; see vnet"),
        ("restart", "missing argument 'WORKER'; see vnet restart --help"),
        ("proxy app 99999", "invalid value for 'LOCAL_PORT'"),
        ("log-level loud", "'loud' is no level: use debug, info, warning or error"),
        ("ls --kind car", "'car' is no kind: use one of app, db, node"),
        ("demo-cluster", "missing option '--home'; see vnet demo-cluster --help"),
        ("service install", "missing option '--user'; see vnet service install --help"),
    ],
)
def test_wrong_usage_is_one_line_that_says_where_to_look(arguments, said):
    done = run(VNET, *arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("vnet: ")
    assert said in done.stderr


def test_wrong_usage_of_the_supervisor_is_one_line_as_well():
    done = run(SUPERVISOR, "--bogus")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--bogus; see vnet-supervisor --help" in done.stderr


@pytest.mark.parametrize("name", ["", "service"])
def test_without_a_command_there_is_help_and_the_status_of_wrong_usage(name):
    done = run(VNET, *name.split())
    assert done.returncode == 2
    assert "Usage: vnet" in done.stdout + done.stderr


@pytest.mark.parametrize("is_debugged", [False, True])
@pytest.mark.parametrize(
    ("bug", "kind"), [("1 / 0", "ZeroDivisionError"), ("open('none')", "FileNotFoundError")]
)
def test_a_bug_is_one_line_unless_the_traceback_is_wanted(is_debugged, bug, kind):
    script = (
        f"import supervisor.cli.app as a; a.status_command.show = lambda *_, **__: {bug}; a.main()"
    )
    flags = ["-X", "dev"] if is_debugged else []
    done = run(sys.executable, *flags, "-c", script, "status")
    assert ("Traceback" in done.stderr) == is_debugged
    if not is_debugged:
        assert done.returncode == ExitStatus.INTERNAL
        assert done.stderr.startswith(f"vnet: internal error: {kind}: ")
        assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_failure(tmp_path):
    bed = ControlBed(tmp_path, report=ClusterView([], "no profile: run tsh login"))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        # The second goes through the parser.
        for arguments in (["status"], ["status", "--wait", "1"], ["reload"], ["logs"]):
            done = subprocess.run(
                [VNET, *arguments, "--run-dir", str(tmp_path)],
                stdout=writer,
                stderr=subprocess.PIPE,
                timeout=DEADLINE_SECONDS,
                check=False,
            )
            assert done.stderr == b""
            assert done.returncode == 0
    finally:
        os.close(writer)
        bed.stop()


def through_shell(
    redirection: str, *arguments: str, **env: str
) -> subprocess.CompletedProcess[str]:
    # Not unbuffered, as the environment of the tests may have it: what is left over is written at the end.
    known = {"PYTHONUNBUFFERED": "", **env}
    return run("sh", "-c", f'exec "$0" "$@" {redirection}', VNET, *arguments, **known)


@pytest.mark.parametrize(
    "arguments", ["status", "status --wait 1", "reload", "diag --run-dir none", "ls", "--help"]
)
def test_closed_standard_streams_are_no_failure(tmp_path, arguments):
    home = tmp_path / "tsh"
    home.mkdir()
    bed = ControlBed(tmp_path, report=ClusterView([], "no profile: run tsh login"))
    env = {"VNET_RUN_DIR": str(bed.run_dir), "TELEPORT_HOME": str(home)}
    try:
        usual = run(VNET, *arguments.split(), **env)
        without_output = through_shell(">&-", *arguments.split(), **env)
        assert (without_output.returncode, without_output.stdout) == (usual.returncode, "")
        # What goes to standard error must not go to standard output in its place.
        without_errors = through_shell("2>&- <&-", *arguments.split(), **env)
        assert (without_errors.returncode, without_errors.stderr) == (usual.returncode, "")
        assert "vnet: " not in without_errors.stdout
        nothing = through_shell("<&- >&- 2>&-", *arguments.split(), **env)
        assert (nothing.returncode, nothing.stdout, nothing.stderr) == (usual.returncode, "", "")
    finally:
        bed.stop()


@pytest.mark.parametrize(
    "arguments", ["status", "status --wait 1", "reload", "diag --run-dir none", "--version"]
)
def test_output_that_cannot_be_written_is_one_line(tmp_path, arguments):
    bed = ControlBed(tmp_path, report=ClusterView([], "no profile: run tsh login"))
    env = {"VNET_RUN_DIR": str(bed.run_dir), "TELEPORT_HOME": str(tmp_path)}
    try:
        done = through_shell(">/dev/full", *arguments.split(), **env)
    finally:
        bed.stop()
    assert done.returncode == ExitStatus.INTERNAL
    assert done.stderr.startswith("vnet: standard output cannot be written (No space left on")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", ["status", "connections", "log-level loud", "--bogus"])
def test_errors_that_nobody_reads_keep_their_exit_status(tmp_path, arguments):
    usual = run(VNET, *arguments.split(), VNET_RUN_DIR=str(tmp_path))
    assert usual.returncode in (ExitStatus.USAGE, ExitStatus.NOT_RUNNING)
    done = through_shell("2>/dev/full", *arguments.split(), VNET_RUN_DIR=str(tmp_path))
    assert done.returncode == usual.returncode


def test_a_terminal_of_another_encoding_shows_what_it_can():
    script = (
        "import supervisor.cli.app as a; a.status_command.show = lambda *_, **__: print('b\u00fccher') or 0;"
        " a.main()"
    )
    done = run(sys.executable, "-c", script, "status", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "b?cher\n", "")


@pytest.mark.parametrize(
    "arguments",
    ["restart", "logs --worker", "ls --search", "ls --cluster", "proxy", "proxy pg --cluster"],
)
def test_words_that_are_not_utf_8_are_wrong_usage(tmp_path, arguments):
    done = run(VNET, *arguments.split(), os.fsdecode(b"pr\xff"), TELEPORT_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "'pr\\udcff' is not UTF-8; see vnet " in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["status", "connections", "mfa", "logs", "stop"])
def test_a_run_directory_that_can_be_none_is_one_line(tmp_path, command):
    done = run(VNET, command, "--run-dir", str(tmp_path / ("a" * 300)))
    assert (done.returncode, done.stdout) == (ExitStatus.INTERNAL, "")
    assert "/control.sock cannot be used (" in done.stderr
    assert done.stderr.count("\n") == 1


# -- pages --


def test_the_page_of_commands_is_that_of_the_code():
    # python -m supervisor.cli.command_page > docs/commands.md
    assert PAGE.read_text() == command_page.page()


def test_the_page_names_every_command_option_and_exit_status():
    page = PAGE.read_text()
    for name, command in COMMANDS.items():
        section = re.search(
            rf"^## vnet {name}( [^\n]*)?$\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL
        )
        assert section is not None, name
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert f"`{option}" in section[2] or f", {option}" in section[2], (name, option)
    assert all(f"| {status} | " in page for status in range(7))


@pytest.mark.parametrize("name", sorted(json_schemas.made()))
def test_schemas_are_those_of_what_is_printed(name):
    # python tests/json_schemas.py
    assert (json_schemas.DIRECTORY / name).read_bytes() == json_schemas.made()[name]


# -- completion --


@pytest.fixture
def bed(tmp_path):
    made = ControlBed(tmp_path)
    yield made
    made.stop()


def completed(line: str, run_dir: Path, shell: str = "bash", **env: str) -> list[str]:
    """What is offered at the end of a line, as the shells' scripts ask for it."""
    words = line.split(" ")
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
    }[shell]
    done = run(VNET, _VNET_COMPLETE=f"complete_{shell}", VNET_RUN_DIR=str(run_dir), **asked, **env)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_workers_and_levels_are_offered(bed, shell):
    def offered(line):
        return completed(line, bed.run_dir, shell)

    def is_offered_in_the_end(line, *words):
        # A shell does not wait long for a VNet that is busy.
        return any(offered(line) == [*words] for _ in range(10))

    assert is_offered_in_the_end("vnet restart ", "tun", "proxy-0", "proxy-1", "dns", "all")
    assert is_offered_in_the_end("vnet restart pr", "proxy-0", "proxy-1")
    assert offered("vnet logs --worker s") == ["supervisor"]
    assert offered("vnet log-level ") == ["debug", "info", "warning", "error"]
    assert offered("vnet logs --level e") == ["error"]
    assert offered("vnet ls --kind ") == ["app", "db", "node"]
    assert "connections" in offered("vnet con")[0]


def test_zsh_is_offered_them_as_well(bed):
    def offered():
        return " ".join(completed("vnet restart ", bed.run_dir, "zsh"))

    assert any('"proxy-0"' in offered() for _ in range(10))


def test_nothing_is_offered_and_said_where_nobody_answers(tmp_path):
    assert completed("vnet restart ", tmp_path) == ["all"]
    assert completed("vnet proxy ", tmp_path, TELEPORT_HOME=str(tmp_path / "none")) == []
    assert completed("vnet login ", tmp_path, TELEPORT_HOME=str(tmp_path / "none")) == []


def test_profiles_are_offered_for_a_login(tmp_path):
    for name in ("teleport.one.test", "teleport.two.test", "$(touch pwned)"):
        (tmp_path / f"{name}.yaml").write_text("")
    found = completed("vnet login teleport.t", tmp_path, TELEPORT_HOME=str(tmp_path))
    assert found == ["teleport.two.test"]
    assert "pwned" not in " ".join(completed("vnet login ", tmp_path, TELEPORT_HOME=str(tmp_path)))


@pytest.mark.parametrize(
    "name", ["$(id)", "`id`", "a b", "a;b", "-rf", "a'b", 'a"b', "a\nb", "", "é"]
)
def test_no_word_is_offered_that_a_shell_could_take_for_more(monkeypatch, name):
    monkeypatch.setattr(completion, "_apps", lambda: [name, "pg.example.com"])
    assert completion.apps("") == ["pg.example.com"]


def test_what_is_offered_has_an_end(monkeypatch):
    monkeypatch.setattr(completion, "_apps", lambda: [f"app{n}" for n in range(10_000)])
    assert len(completion.apps("app")) == completion.MAX_WORDS


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_with_the_script_that_is_installed(bed, tmp_path):
    script = run(VNET, _VNET_COMPLETE="source_bash").stdout
    assert "complete " in script
    path = f"{Path(VNET).parent}:{os.environ.get('PATH', os.defpath)}"
    asked = (
        f"{script}\nCOMP_WORDS=(vnet restart pro); COMP_CWORD=2; COMP_LINE='vnet restart pro'\n"
        "$(complete -p vnet | sed 's/.*-F \\([^ ]*\\) .*/\\1/') vnet pro restart\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = run("bash", "-c", asked, PATH=path, VNET_RUN_DIR=str(bed.run_dir))
    assert done.stdout.split() == ["proxy-0", "proxy-1"]


def test_completion_can_be_installed(tmp_path):
    # The shell is found out from the processes above; it would take the place of a last command.
    script = 'status=0; "$0" --install-completion || status=$?; exit $status'
    done = run("bash", "-c", script, VNET, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "vnet" in (tmp_path / ".bashrc").read_text()

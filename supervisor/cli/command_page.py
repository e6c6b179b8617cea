"""docs/commands.md, made from what the commands say of themselves. Pure but for `main`.

Run as a module it prints the page:  python -m supervisor.cli.command_page > docs/commands.md
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import typer

from supervisor import main as supervisor_main
from supervisor.cli.app import app
from supervisor.cli.man_pages import FILES, STATUSES, VARIABLES, split_help

_HEAD: Final = """\
# Commands

This page is made from the programs' own `--help` (`python -m supervisor.cli.command_page`); the manual pages,
`man vnet` and `man vnet-COMMAND`, are as well.

- Errors are one line on standard error: what went wrong, the offending value, what to do.
- Where a command has `--json` its objects carry `"schema": 1`; keys are only added. The schemas are in
  [schema/](schema). With `--watch` it is one object per line.
- Tables fit the terminal: what is too long is shortened in the middle, and what is needed least is left out. Where
  standard output is no terminal everything is printed in full, one line each, for grep and the like.
- Colours are for terminals only, and not with `NO_COLOR` or `TERM=dumb`. What takes long says so on standard
  error, if that is a terminal.
- `--watch` draws in place on a screen of its own, which is gone after Ctrl-C, and goes on over restarts and
  updates of VNet.
- A stopped or hanging supervisor makes `vnet status` fail after 1.5 s, and every other question to it after 2 s.

## Completion

The Debian package brings completion for bash, zsh and fish. Elsewhere `vnet --install-completion` sets it up for the
shell it is called from. Beside commands and options it offers workers and log levels, the profiles for
`vnet login` and, asking the clusters for 3 s at most, the apps and databases for `vnet proxy`.
"""


def page() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    lines = [_HEAD, "## Exit statuses", "", "| status | meaning |", "| --- | --- |"]
    lines += [f"| {int(status)} | {text} |" for status, text in STATUSES.items()]
    lines += ["", "`vnet demo` exits with its command's status, or 125 if it cannot be set up.", ""]
    lines += ["## Environment and files", ""]
    lines += [f"- `{name}`: {text}" for name, text in (VARIABLES | FILES).items()]
    for name, command in group.commands.items():
        for path, leaf in _leaves(f"vnet {name}", command):
            lines += ["", *_section(path, leaf)]
    lines += ["", *_supervisor()]
    return "\n".join(lines) + "\n"


def _leaves(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    subcommands = getattr(command, "commands", None)
    if subcommands is None:
        yield path, command
        return
    for name, sub in subcommands.items():
        yield f"{path} {name}", sub


def _section(path: str, command: Any) -> Iterator[str]:
    first, rest, examples = split_help(command.help)
    arguments = [_argument(p) for p in command.params if p.param_type_name == "argument"]
    yield f"## {' '.join((path, *arguments))}"
    yield ""
    yield " ".join((first, *rest))
    yield ""
    for example in examples:
        yield f"    {example}"
    yield ""
    yield from _table([(_names(p), p.help or "") for p in command.params])


def _supervisor() -> Iterator[str]:
    parser = supervisor_main.make_parser()
    yield f"## {parser.prog}"
    yield ""
    yield f"{parser.description} SIGHUP reads the configuration again; the log goes to standard error."
    yield ""
    yield f"    {(parser.epilog or '').removeprefix('example: ')}"
    yield ""
    rows = []
    for action in parser._actions:  # noqa: SLF001  # argparse has no other way to list them
        value = "" if action.nargs == 0 else f" {action.metavar or '|'.join(action.choices or ())}"
        rows.append((f"{', '.join(action.option_strings)}{value}", action.help or ""))
    yield from _table(rows)


def _table(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    if rows:
        yield "| option | meaning |"
        yield "| --- | --- |"
    for names, text in rows:
        shown = names.replace("|", "\\|")
        yield f"| `{shown}` | {text.rstrip('.')} |"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _label(parameter)
    value = "" if parameter.is_flag else f" {_label(parameter)}"
    return ", ".join([*parameter.opts, *parameter.secondary_opts]) + value


def _argument(parameter: Any) -> str:
    return _label(parameter) if parameter.required else f"[{_label(parameter)}]"


def _label(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def main() -> None:
    """Prints the page."""
    sys.stdout.write(page())


if __name__ == "__main__":
    main()

"""The manual pages, made from what the programs say of themselves (man(7)). Pure but for `write`.

vnet(1)              the commands and what holds for all of them
vnet-COMMAND(1)      one command, from its --help
vnet-supervisor(8)   from its --help
vnet.toml(5)         from docs/configuration.md, where every key stands with its default
"""

import argparse
import re
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import typer

from supervisor import main as supervisor_main
from supervisor import settings
from supervisor.cli.app import app
from supervisor.exits import ExitStatus

STATUSES: Final[Mapping[ExitStatus, str]] = {
    ExitStatus.OK: "Success, or VNet is healthy.",
    ExitStatus.DEGRADED: "VNet is degraded or starting, or issues were found.",
    ExitStatus.USAGE: "Wrong usage or configuration.",
    ExitStatus.NOT_RUNNING: "VNet is not running.",
    ExitStatus.NOT_PERMITTED: "Not permitted; the message names the right that is missing.",
    ExitStatus.INTERNAL: "Internal error, or no answer within 2 s.",
    ExitStatus.CONFLICT: "Conflict: another VNet, or an interface name or address that is taken.",
}
VARIABLES: Final = {
    settings.RUN_DIR_VARIABLE: f"Which running VNet is meant; else {settings.DEFAULT_RUN_DIR}.",
    "TELEPORT_HOME": "Where credentials are read; else teleport_home, else ~/.tsh of the VNet user.",
    "NO_COLOR": "Set to anything: no colours.",
}
FILES: Final = {
    "/etc/vnet/vnet.toml": "Configuration, see vnet.toml(5).",
    str(settings.DEFAULT_RUN_DIR): "Lock, control socket, sockets of the workers.",
    str(settings.DEFAULT_STATE_DIR): "Address book, IPv6 prefix, chosen IPv4 range.",
}
_KEY: Final = re.compile(r"(\w+) = (.*?)\s*(?:# (.*))?")
_TABLE: Final = re.compile(r"\[(\w+)\]\s*(?:# (.*))?")
_REST: Final = re.compile(r"\s*# (.*)")


def write(directory: Path, configuration: str, built_at: int) -> None:
    """Writes every page into its section's directory, such as `man1`.

    `configuration` is the text of docs/configuration.md, `built_at` seconds since the epoch.
    """
    for name, text in pages(configuration, built_at).items():
        folder = directory / f"man{name.rpartition('.')[2]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def pages(configuration: str, built_at: int) -> dict[str, str]:
    """Every page by its file name."""
    date = time.strftime("%Y-%m-%d", time.gmtime(built_at))
    group: Any = typer.main.get_command(app)
    made = {"vnet.1": _overview(group)}
    for name, command in group.commands.items():
        made[f"vnet-{name}.1"] = _command_page(f"vnet {name}", command)
    made["vnet-supervisor.8"] = _supervisor_page(supervisor_main.make_parser())
    made["vnet.toml.5"] = _configuration_page(configuration)
    return {name: _headed(name, date, body) for name, body in made.items()}


def _headed(name: str, date: str, body: Sequence[str]) -> str:
    title, _, section = name.rpartition(".")
    lines = [f'.TH "{_plain(title.upper())}" {section} {date} "VNet {settings.version()}" VNet']
    for line in body:
        # A section begins with a paragraph of itself.
        if line != ".PP" or not lines[-1].startswith((".SH", ".SS")):
            lines.append(line)
    return "\n".join(lines) + "\n"


# -- pages --


def _overview(group: Any) -> list[str]:
    names = {
        f"vnet-{name}(1)": split_help(command.help)[0] for name, command in group.commands.items()
    }
    return [
        *_name("vnet", split_help(group.help)[0]),
        *_section("SYNOPSIS", _bold("vnet") + " COMMAND [OPTIONS] [ARGUMENTS]"),
        *_section("DESCRIPTION"),
        *_paragraph(
            "VNet lets any program on this machine reach TCP apps, databases and SSH servers behind"
            " Teleport clusters by their names, as if they were on a local network. vnet-supervisor(8) runs"
            " it; these commands ask it, or do without."
        ),
        *_section("COMMANDS", *_list(names)),
        *_section("OPTIONS", *_options(group.params)),
        *_common(),
        *_see_also("vnet-supervisor(8)", "vnet.toml(5)", "tsh(1)"),
    ]


def _command_page(name: str, command: Any) -> list[str]:
    first, rest, examples = split_help(command.help)
    title = name.replace(" ", "-")
    body = [*_name(title, first)]
    subcommands = getattr(command, "commands", {})
    if subcommands:
        body += _section(
            "SYNOPSIS", *_lines(_synopsis(f"{name} {n}", sub) for n, sub in subcommands.items())
        )
        body += _section("DESCRIPTION", *_paragraph(first))
        for sub_name, sub in subcommands.items():
            sub_first, sub_rest, sub_examples = split_help(sub.help)
            body += _subsection(f"{name} {sub_name}", *_paragraph(sub_first))
            for text in (*sub_rest, *(f"Example: {text}" for text in sub_examples)):
                body += _paragraph(text)
            body += _options(sub.params)
    else:
        body += _section("SYNOPSIS", _synopsis(name, command))
        body += _section("DESCRIPTION", *_paragraph(first))
        for text in rest:
            body += _paragraph(text)
        body += _section("OPTIONS", *_options(command.params))
        if examples:
            body += _section("EXAMPLES", *_code(examples))
    return [*body, *_common(), *_see_also("vnet(1)", "vnet-supervisor(8)")]


def _supervisor_page(parser: argparse.ArgumentParser) -> list[str]:
    options = {}
    for action in parser._actions:  # noqa: SLF001  # argparse has no other way to list them
        value = "" if action.nargs == 0 else f" {action.metavar or '|'.join(action.choices or ())}"
        names = ", ".join(f"{_bold(name)}{_plain(value)}" for name in action.option_strings)
        options[names] = _sentence(action.help or "")
    example = (parser.epilog or "").removeprefix("example: ")
    return [
        *_name(parser.prog, parser.description or ""),
        *_section("SYNOPSIS", _bold(parser.prog) + " [OPTIONS]"),
        *_section("DESCRIPTION"),
        *_paragraph(parser.description or ""),
        *_paragraph(
            "It runs as root, makes the interface and the DNS server, and keeps workers without"
            " rights running that do everything else. SIGHUP has it read the configuration again."
            " Its log goes to standard error. As a service it is started by vnet@USER.service."
        ),
        *_section("OPTIONS", *_list(options, is_ready=True)),
        *_section("EXAMPLES", *_code([example])),
        *_common(),
        *_see_also("vnet(1)", "vnet.toml(5)", "systemd(1)"),
    ]


def _configuration_page(configuration: str) -> list[str]:
    """`configuration` has the keys in a block of TOML, each with its default and a comment."""
    before, _, rest = configuration.partition("```toml\n")
    block, _, after = rest.partition("```\n")
    paragraphs = [text for text in before.split("\n\n") if not text.startswith("#")]
    body = [
        *_name("vnet.toml", "configuration of VNet"),
        *_section("DESCRIPTION"),
    ]
    for text in paragraphs:
        body += _markdown(text)
    table, keys = "", dict[str, str]()
    for name, default, comment in _read_keys(block):
        if name.startswith("["):
            body += _section(table or "GENERAL", *_list(keys, is_ready=True)) if keys else []
            table, keys = name if not comment else f"{name} ({comment})", {}
        else:
            keys[f"{_bold(name)} = {_plain(default)}"] = comment
    body += _section(table, *_list(keys, is_ready=True))
    body += _section("NOTES")
    for text in after.split("\n\n"):
        body += _markdown(text)
    body += _section("EXAMPLES", *_code(["[dns]", 'upstream = ["192.0.2.1"]']))
    return [*body, *_see_also("vnet(1)", "vnet-supervisor(8)")]


def _read_keys(block: str) -> Iterator[tuple[str, str, str]]:
    """(key, default, comment); a table is one in brackets, without a default."""
    found: list[tuple[str, str, str]] = []
    for line in block.splitlines():
        if match := _KEY.fullmatch(line):
            found.append((match[1], match[2], match[3] or ""))
        elif match := _TABLE.fullmatch(line):
            found.append((f"[{match[1]}]", "", match[2] or ""))
        elif (match := _REST.fullmatch(line)) and found:
            name, default, comment = found[-1]
            found[-1] = name, default, f"{comment} {match[1]}"
        elif line.strip():
            raise ValueError(f"the configuration's block has a line that is no key: {line!r}")
    yield from found


def _common() -> list[str]:
    statuses = {str(int(status)): text for status, text in STATUSES.items()}
    return [
        *_section("ENVIRONMENT", *_list(VARIABLES)),
        *_section("FILES", *_list(FILES)),
        *_section("EXIT STATUS", *_list(statuses)),
    ]


# -- what click knows of a command --


def split_help(help_text: str) -> tuple[str, list[str], list[str]]:
    """First sentence, further paragraphs, examples."""
    paragraphs = [" ".join(part.split()) for part in help_text.split("\n\n")]
    texts, examples = [], []
    for paragraph in paragraphs:
        text, is_there, example = paragraph.partition("Example: ")
        if text.strip():
            texts.append(text.strip())
        if is_there:
            # In a line with the sentence the example ends like that.
            examples.append(example.removesuffix(".") if text else example)
    first, dot, more = texts[0].partition(". ")
    rest = [more] if dot else []
    return first.rstrip(".") + ".", [*rest, *texts[1:]], examples


def _synopsis(name: str, command: Any) -> str:
    words = [_bold(name)]
    if any(parameter.param_type_name == "option" for parameter in command.params):
        words.append("[OPTIONS]")
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            label = _label(parameter)
            is_given = parameter.required or label.startswith("[")
            words.append(_plain(label if is_given else f"[{label}]"))
    return " ".join(words)


def _options(parameters: Sequence[Any]) -> list[str]:
    listed = {}
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            names = _bold(_label(parameter).strip("[]"))
        else:
            opts = [*parameter.opts, *parameter.secondary_opts]
            value = "" if parameter.is_flag else f" {_label(parameter)}"
            names = ", ".join(f"{_bold(opt)}{_plain(value)}" for opt in opts)
        listed[names] = parameter.help or ""
    if any(parameter.param_type_name == "option" for parameter in parameters):
        listed[f"{_bold('-h')}, {_bold('--help')}"] = "Show this and exit."
    return _list(listed, is_ready=True)


def _label(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


# -- roff --


def _plain(text: str) -> str:
    """Text as it is, whatever roff would make of its characters."""
    escaped = text.replace("\\", "\\(rs").replace("-", "\\-").replace("'", "\\(aq")
    return f"\\&{escaped}" if escaped.startswith(".") else escaped


def _bold(text: str) -> str:
    return f"\\fB{_plain(text)}\\fR"


def _wrapped(escaped: str) -> list[str]:
    lines = textwrap.wrap(escaped, 78, break_long_words=False, break_on_hyphens=False)
    # A line that begins with a period would be an order to roff.
    return [f"\\&{line}" if line.startswith(".") else line for line in lines]


def _section(title: str, *lines: str) -> list[str]:
    return [f'.SH "{_plain(title)}"', *lines]


def _subsection(title: str, *lines: str) -> list[str]:
    return [f'.SS "{_plain(title)}"', *lines]


def _name(name: str, text: str) -> list[str]:
    clause = text.rstrip(".")
    return [".SH NAME", f"{_plain(name)} \\- {_plain(clause[:1].lower() + clause[1:])}"]


def _paragraph(text: str) -> list[str]:
    return [".PP", *_wrapped(_plain(text))]


def _lines(texts: Iterator[str]) -> list[str]:
    found: list[str] = []
    for text in texts:
        found += [".br", text] if found else [text]
    return found


def _list(entries: Mapping[str, str], *, is_ready: bool = False) -> list[str]:
    """Names with what they mean; `is_ready` are names in roff already."""
    found = []
    for name, text in entries.items():
        found += [".TP", name if is_ready else _bold(name), *(_wrapped(_plain(text)) or ["\\&"])]
    return found


def _code(lines: Sequence[str]) -> list[str]:
    return [".PP", ".nf", ".RS 4", *map(_plain, lines), ".RE", ".fi"]


def _markdown(text: str) -> list[str]:
    """A paragraph of Markdown: words in backticks are bold, of links the text remains."""
    flat = " ".join(re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text).split())
    parts = flat.split("`")
    roff = "".join(_bold(part) if index % 2 else _plain(part) for index, part in enumerate(parts))
    return [".PP", *_wrapped(roff)] if flat else []


def _sentence(text: str) -> str:
    text = text.strip()
    return text and f"{text[0].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _see_also(*names: str) -> list[str]:
    found = []
    for index, name in enumerate(names):
        title, _, section = name.rstrip(")").partition("(")
        comma = "," if index < len(names) - 1 else ""
        found.append(f".BR {_plain(title)} ({section}){comma}")
    return [".SH SEE ALSO", *found]

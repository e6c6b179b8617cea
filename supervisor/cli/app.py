"""The command `vnet`: typer commands, each a thin shell around a function.

What a command needs beyond the control socket is imported when it runs, so that `vnet status`, a
health check, starts quickly.
"""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from supervisor import control_messages as cm
from supervisor import settings, standard_streams
from supervisor.cli import completion, service_commands
from supervisor.cli import status as status_command
from supervisor.cli.control_client import AskError, order
from supervisor.exits import ExitStatus


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # typer would make it the status of what is degraded.
            raise SystemExit(_reader_has_gone()) from None


app = typer.Typer(
    name="vnet",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# As shells have it for a process that Ctrl-C has ended.
_INTERRUPTED = 130
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app.add_typer(service_commands.app, name="service")


def _is_text(value: str | None) -> str | None:
    """What is no path goes to VNet or a cluster as UTF-8."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise typer.BadParameter(f"{value!r} is not UTF-8.") from None
    return value


def _file_or_folder(name: str) -> Path:
    if name.endswith("/") and not Path(name).is_dir():
        raise typer.BadParameter(f"there is no folder {name!r}: make it, or name a file.")
    return Path(name)


RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", metavar="DIR", help="Which running VNet; else VNET_RUN_DIR."),
]


def main() -> None:
    """Entry point."""
    standard_streams.fill()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal of another encoding still shows what it can.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            status = _run(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        status = _reader_has_gone()
    except OSError as error:
        if not _is_of_output(error):
            raise
        status = _cannot_print(error)
    raise SystemExit(status)


def _run(arguments: list[str]) -> int:
    wish = status_command.plain_wish(arguments[1:]) if arguments[:1] == ["status"] else None
    try:
        if wish is not None:
            _show_status(wish)
        # Exits that commands ask for pass as SystemExit.
        return app(arguments, standalone_mode=False, prog_name="vnet") or int(ExitStatus.OK)
    except typer.TyperException as error:
        _explain(error)
        return int(ExitStatus.USAGE)
    except typer.Abort:
        return _INTERRUPTED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError) or _is_of_output(error):
            raise
        return _internal(error)
    except Exception as error:  # noqa: BLE001  # the outermost frame of the process
        return _internal(error)


def _explain(error: typer.TyperException) -> None:
    """What is wrong with the command line, and where to look, in one line."""
    text = error.format_message()
    if not text or "\n" in text.strip():
        # Without any argument: the help, which rich has printed already.
        print(text, end="", file=sys.stderr)
        return
    text = text.strip().rstrip(".")
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", "vnet")
    text = f"{text[:1].lower()}{text[1:]}{'' if text.endswith('?') else ';'}"
    _tell(f"{text} see {command} --help")


def _internal(error: Exception) -> int:
    if sys.flags.dev_mode:
        raise error
    text = " ".join(f"{type(error).__name__}: {error}".split())
    _tell(f"internal error: {text}: report it, with what PYTHONDEVMODE=1 prints")
    return int(ExitStatus.INTERNAL)


def _reader_has_gone() -> int:
    """The reader of our output has what it wanted, as in `vnet logs | head -1`."""
    _write_nowhere(1)
    return int(ExitStatus.OK)


def _is_of_output(error: OSError) -> bool:
    return error.filename is None and error.errno in _OUTPUT_ERRORS


def _cannot_print(error: OSError) -> int:
    _write_nowhere(1)
    why = f"standard output cannot be written ({error.strerror})"
    _tell(f"{why}: make room, or name another place")
    return int(ExitStatus.INTERNAL)


def _write_nowhere(descriptor: int) -> None:
    """Python would fail once more at the end, with what is left to be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def fail(status: ExitStatus, text: str) -> NoReturn:
    """Ends with one line on standard error."""
    _tell(text)
    raise SystemExit(int(status))


def _tell(text: str) -> None:
    """Where nobody reads it the exit status still says it."""
    try:
        print(f"vnet: {text}", file=sys.stderr)
    except OSError:
        _write_nowhere(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        _print(f"VNet {settings.version()}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Reach TCP apps behind a Teleport cluster by their names."""


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every second, until Ctrl-C.")
    ] = False,
    wait: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Wait until healthy, about so long at most."),
    ] = None,
    run_dir: RunDir = None,
) -> None:
    """Show whether VNet works. Exit status 0 healthy, 1 degraded or starting, 3 not running.

    Example: vnet status --wait 10 && psql -h pg.example.test
    """
    if watch:
        status_command.watch(settings.run_dir(run_dir, os.environ), as_json=as_json)
    _show_status(status_command.Wish(as_json=as_json, wait=wait or 0.0, run_dir=run_dir))


def _show_status(wish: status_command.Wish) -> NoReturn:
    where = settings.run_dir(wish.run_dir, os.environ)
    try:
        found = status_command.show(where, wait=wish.wait, as_json=wish.as_json)
    except AskError as error:
        fail(error.status, str(error))
    raise SystemExit(int(found))


def _print(text: str) -> None:
    print(text, flush=True)


@app.command()
def stop(run_dir: RunDir = None) -> None:
    """Stop a running VNet.

    Example: sudo vnet stop
    """
    _order(run_dir, cm.Stop())


@app.command()
def reload(run_dir: RunDir = None) -> None:
    """Read the configuration again, and say what is in force now and what needs a restart.

    Example: sudo vnet reload
    """
    _order(run_dir, cm.Reload())


@app.command()
def restart(
    worker: Annotated[
        str,
        typer.Argument(
            metavar="WORKER",
            help="Its name, or all.",
            callback=_is_text,
            autocompletion=completion.workers,
        ),
    ],
    drain: Annotated[
        bool, typer.Option("--drain", help="Cut nothing: the old one finishes what is open.")
    ] = False,
    run_dir: RunDir = None,
) -> None:
    """Restart a worker. With --drain and all an installed update takes over without a gap.

    Example: vnet restart proxy-0 --drain
    """
    if not drain:
        _order(run_dir, cm.Restart(worker=worker))
        return
    from supervisor.cli.replacement import replace  # noqa: PLC0415  # only this command needs it

    try:
        status = replace(settings.run_dir(run_dir, os.environ), worker, _print)
    except AskError as error:
        fail(error.status, str(error))
    raise SystemExit(int(status))


@app.command()
def repair(
    state_dir: Annotated[
        Path, typer.Option("--state-dir", metavar="DIR", help="Of the VNet that died.")
    ] = settings.DEFAULT_STATE_DIR,
) -> None:
    """Undo what a VNet that died has left in the system's settings. VNet does so itself when it starts.

    Exit status 1 if something was left, since another program has changed it.

    Example: sudo vnet repair
    """
    from supervisor.cli import repair as work  # noqa: PLC0415  # only this command needs it

    try:
        status = work.repair(state_dir)
    except work.RepairError as error:
        fail(error.status, str(error))
    raise SystemExit(int(status))


@app.command("log-level")
def log_level(
    level: Annotated[
        str,
        typer.Argument(
            metavar="LEVEL", help="debug, info, warning or error.", autocompletion=completion.levels
        ),
    ],
    next_start: Annotated[
        bool, typer.Option("--next-start", help="Only for the next start, and not before.")
    ] = False,
    run_dir: RunDir = None,
) -> None:
    """Change the log level while VNet runs.

    Example: vnet log-level debug
    """
    _order(run_dir, cm.LogLevel(level=_level(level), next_start=next_start))


def _level(name: str) -> cm.Level:
    if name not in list(cm.Level):
        fail(ExitStatus.USAGE, f"{name!r} is no level: use debug, info, warning or error")
    return cm.Level(name)


@app.command()
def logs(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with the lines that come, until Ctrl-C.")
    ] = False,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only of this worker, or supervisor.",
            callback=_is_text,
            autocompletion=completion.speakers,
        ),
    ] = None,
    level: Annotated[
        str,
        typer.Option(
            metavar="LEVEL", help="Only of this level or above.", autocompletion=completion.levels
        ),
    ] = "debug",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each line.")
    ] = False,
    run_dir: RunDir = None,
) -> None:
    """Show the last lines of the log, which a running VNet keeps in memory.

    Example: vnet logs --follow --worker proxy-0
    """
    from supervisor.cli.logs import show  # noqa: PLC0415  # only this command needs it

    where = settings.run_dir(run_dir, os.environ)
    try:
        status = show(where, follow=follow, worker=worker, level=_level(level), as_json=as_json)
    except AskError as error:
        fail(error.status, str(error))
    raise SystemExit(int(status))


def _order(run_dir: Path | None, request: cm.AnyRequest) -> None:
    try:
        answer = order(settings.run_dir(run_dir, os.environ), request)
    except AskError as error:
        fail(error.status, str(error))
    _print(answer.text)


@app.command()
def connections(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Print again when something changes, until Ctrl-C.")
    ] = False,
    run_dir: RunDir = None,
) -> None:
    """Show what connects through VNet, how fast, from which program, and why not.

    First totals for each target, then the connections: those that go on, and the last that have ended.

    Example: vnet connections --watch
    """
    from supervisor.cli.connections import run  # noqa: PLC0415  # only this command needs it

    try:
        status = run(settings.run_dir(run_dir, os.environ), watch=watch, as_json=as_json)
    except AskError as error:
        fail(error.status, str(error))
    raise SystemExit(int(status))


@app.command()
def mfa(
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on with the prompts that come, until Ctrl-C.")
    ] = False,
    run_dir: RunDir = None,
) -> None:
    """Answer connections that wait for a second factor, by code or security key.

    Without a terminal one line of standard input is read for each code.

    Example: vnet mfa --watch
    """
    from supervisor.cli.mfa import run  # noqa: PLC0415  # only this command needs it

    try:
        status = run(settings.run_dir(run_dir, os.environ), watch=watch)
    except AskError as error:
        fail(error.status, str(error))
    raise SystemExit(int(status))


@app.command()
def login(
    proxy: Annotated[
        str,
        typer.Argument(
            metavar="PROXY",
            help="Which profile, if several have expired.",
            autocompletion=completion.profiles,
        ),
    ] = "",
    run_dir: RunDir = None,
) -> None:
    """Log in again with tsh where the login has expired.

    Example: vnet login teleport.example.com
    """
    from supervisor.cli.login import LoginError, log_in  # noqa: PLC0415  # loads the client

    try:
        done = log_in(proxy, settings.run_dir(run_dir, os.environ), os.environ)
    except LoginError as error:
        fail(error.status, str(error))
    _print(done)


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Configuration; else /etc/vnet/vnet.toml."),
]


@app.command()
def diag(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=_file_or_folder,
            help="Save the report there; in a folder it gets a name.",
        ),
    ] = None,
    config: ConfigFile = None,
    run_dir: RunDir = None,
    state_dir: Annotated[
        Path, typer.Option("--state-dir", metavar="DIR", help="Where no VNet runs: its directory.")
    ] = settings.DEFAULT_STATE_DIR,
) -> None:
    """Look for what keeps names and connections from working. Exit status 1 if issues were found.

    Takes 20 seconds at most. Without a running VNet the report says what could not be checked.

    Example: vnet diag --output .
    """
    from supervisor.cli import diag as work  # noqa: PLC0415  # only this command needs it

    where = settings.run_dir(run_dir, os.environ)
    try:
        status = work.diagnose(
            work.Options(where, state_dir, config, as_json=as_json, output=output), os.environ
        )
    except work.DiagError as error:
        fail(error.status, str(error))
    work.leave(status)


InCluster = Annotated[
    str, typer.Option(metavar="NAME", help="Only in this cluster.", callback=_is_text)
]


@app.command()
def ls(
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="app|db|node",
            help="Only these; may be repeated.",
            autocompletion=completion.kinds,
        ),
    ] = None,
    cluster: InCluster = "",
    search: Annotated[
        str,
        typer.Option(metavar="WORDS", help="Only what contains them.", callback=_is_text),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    config: ConfigFile = None,
) -> None:
    """List what your logins let you reach. Needs no running VNet.

    Example: vnet ls --kind db --search orders
    """
    from supervisor.cli.ls import list_reachable  # noqa: PLC0415  # see the module
    from supervisor.cli.teleport_access import CommandError, find_access  # noqa: PLC0415

    try:
        access = find_access(config, os.environ)
        status = list_reachable(
            access, kinds=kind or [], cluster=cluster, search=search, as_json=as_json
        )
    except CommandError as error:
        fail(error.status, str(error))
    raise SystemExit(int(status))


@app.command("ssh-config")
def ssh_config(
    install: Annotated[
        bool, typer.Option("--install", help="Put the line at the top of ~/.ssh/config.")
    ] = False,
    putty: Annotated[
        bool, typer.Option("--putty", help='Write a session "VNet" for PuTTY instead.')
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Print the line that has OpenSSH know the SSH servers behind VNet. Needs no running VNet.

    Example: vnet ssh-config --install && ssh alice@node1.example.com
    """
    from supervisor.cli import ssh_config as work  # noqa: PLC0415  # only this command needs it
    from supervisor.cli.teleport_access import CommandError  # noqa: PLC0415  # see the module

    try:
        work.run(config, os.environ, install=install, putty=putty)
    except CommandError as error:
        fail(error.status, str(error))


@app.command()
def proxy(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Name or address of an app or database.",
            callback=_is_text,
            autocompletion=completion.apps,
        ),
    ],
    local_port: Annotated[
        int | None,
        typer.Argument(metavar="LOCAL_PORT", min=1, max=65535, help="Else a free one."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(metavar="PORT", min=1, max=65535, help="Which port of a multi-port app."),
    ] = None,
    cluster: InCluster = "",
    any_host: Annotated[
        bool,
        typer.Option("--any-host", help="Let HTTP requests pass whatever their Host and Origin."),
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Make one app or database reachable at a local port, until Ctrl-C. Needs no running VNet.

    Example: vnet proxy pg 5432
    """
    from supervisor.cli.local_proxy import serve  # noqa: PLC0415  # see the module
    from supervisor.cli.teleport_access import CommandError, find_access  # noqa: PLC0415

    try:
        access = find_access(config, os.environ)
        serve(
            access,
            name,
            local_port=local_port,
            target_port=port,
            cluster=cluster,
            any_host=any_host,
        )
    except CommandError as error:
        fail(error.status, str(error))


ClusterFile = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="Clusters to embed; see docs/demo.md."),
]


@app.command(context_settings={"allow_interspersed_args": False})
def demo(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="-- COMMAND", help="What to run in it.")
    ] = None,
    cluster: ClusterFile = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Configuration of VNet.")
    ] = None,
) -> None:
    """Run a command in a private network with an embedded cluster and a complete VNet.

    Example: vnet demo -- curl -s http://hello.demo.test/
    """
    from demo.session import run_demo  # noqa: PLC0415  # only this command needs the cluster

    raise SystemExit(run_demo(cluster, config, command or []))


@app.command("demo-cluster")
def demo_cluster(
    home: Annotated[Path, typer.Option(metavar="DIR", help="Where the tsh home is written.")],
    cluster: ClusterFile = None,
) -> None:
    """Run only the embedded cluster, on loopback, until Ctrl-C.

    Example: vnet demo-cluster --home /tmp/tsh
    """
    from demo.session import run_cluster  # noqa: PLC0415  # only this command needs the cluster

    raise SystemExit(run_cluster(cluster, home))

"""`vnet service install | uninstall | show`; the work is in `supervisor.cli.service`, loaded when needed."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from supervisor.cli.service import ServiceError

app = typer.Typer(
    no_args_is_help=True, help="Install VNet as a service of the system, or remove it."
)


def _fail(error: "ServiceError") -> typer.Exit:
    print(f"vnet: {error}", file=sys.stderr)
    return typer.Exit(int(error.status))


@app.command()
def install(
    user: Annotated[
        str, typer.Option("--user", metavar="NAME", help="Whose Teleport credentials are used.")
    ],
    start: Annotated[
        bool, typer.Option("--start/--no-start", help="Start it now and with the system.")
    ] = True,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also for root, from unsafe places, over changed files."),
    ] = False,
) -> None:
    """Install the service and start it for one user. Needs root.

    Example: sudo vnet service install --user alice
    """
    from supervisor.cli import service  # noqa: PLC0415  # only these commands need it

    try:
        service.install(user, start=start, force=force)
    except service.ServiceError as error:
        raise _fail(error) from error


@app.command()
def uninstall() -> None:
    """Stop the service and remove what install has written; changed files are left. Needs root.

    Example: sudo vnet service uninstall
    """
    from supervisor.cli import service  # noqa: PLC0415  # only these commands need it

    try:
        service.uninstall()
    except service.ServiceError as error:
        raise _fail(error) from error


@app.command()
def show(
    user: Annotated[
        str, typer.Option("--user", metavar="NAME", help="Whose credentials would be used.")
    ] = "",
) -> None:
    """Print the files that install would write; nothing is changed.

    Example: vnet service show --user alice
    """
    from supervisor.cli import service  # noqa: PLC0415  # only these commands need it

    try:
        service.show(user)
    except service.ServiceError as error:
        raise _fail(error) from error

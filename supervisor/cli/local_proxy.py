"""`vnet proxy`: one app or database at a port of this machine, until Ctrl-C."""

import asyncio
import errno
import os
import resource
import signal
import sys

from ipc import prompts as p
from supervisor.cli.progress import Progress
from supervisor.cli.teleport_access import Access, CommandError, run
from supervisor.cli.terminal_prompts import Renew, TerminalPrompts
from supervisor.cli.text import printable
from supervisor.exits import ExitStatus

# Two for each of a thousand connections, and some.
_DESCRIPTORS = 4096


def serve(
    access: Access,
    name: str,
    *,
    local_port: int | None,
    target_port: int | None,
    cluster: str,
    any_host: bool,
) -> None:
    """Prints the local address when the app can be reached there; returns after Ctrl-C.

    Raises:
        CommandError: the app cannot be reached, or the port not be used.
    """
    # Only this command needs the client.
    from workers.proxy import local_proxy, local_session  # noqa: PLC0415
    from workers.proxy.dial_errors import DialError, ProxyUntrustedError  # noqa: PLC0415
    from workers.proxy.find_by_name import NotAskedError, NotFoundByNameError  # noqa: PLC0415
    from workers.proxy.listing import NoSuchClusterError  # noqa: PLC0415
    from workers.proxy.teleport.client import default_settings  # noqa: PLC0415
    from workers.proxy.teleport.errors import TeleportError  # noqa: PLC0415
    from workers.proxy.terminal_prompter import TerminalPrompter  # noqa: PLC0415

    try:
        listener = local_proxy.listen(local_port or 0)
    except OSError as error:
        raise _cannot_listen(local_port, error) from error
    where = f"{local_proxy.HOST}:{listener.getsockname()[1]}"
    wish = local_session.Wish(
        name=name,
        cluster=cluster,
        target_port=target_port,
        local_port=local_port,
        any_host=any_host,
    )
    _allow_descriptors()

    progress = Progress(f"looking for {printable(name)}")

    def tell(text: str) -> None:
        progress.hide()
        _tell(text)

    def is_ready(address: str) -> None:
        progress.end()
        print(f"{where} -> {address}", flush=True)

    async def main() -> None:
        prompts = TerminalPrompts()

        async def ask(opened: p.PromptOpened, renew: Renew) -> p.Answer | p.Decline:
            progress.end()
            return await prompts.ask(opened, renew)

        settings = default_settings(
            ca_file=access.ca_file,
            insecure=access.insecure,
            environment=os.environ,
            prompter=TerminalPrompter(ask),
        )
        try:
            await local_session.serve_by_name(
                access.home,
                settings,
                wish,
                listener,
                ready=is_ready,
                tell=tell,
            )
        except (NotFoundByNameError, NoSuchClusterError, local_proxy.PortError) as error:
            raise CommandError(ExitStatus.USAGE, str(error)) from error
        except NotAskedError as error:
            for problem in error.problems:
                tell(str(problem))
            raise CommandError(ExitStatus.DEGRADED, str(error)) from error
        except ProxyUntrustedError as error:
            text = f"{error}: name its authority as ca_file under [teleport] of the configuration"
            raise CommandError(ExitStatus.DEGRADED, text) from error
        except (TeleportError, DialError) as error:
            raise CommandError(ExitStatus.DEGRADED, str(error)) from error

    async def until_stopped() -> None:
        serving = asyncio.ensure_future(main())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
        await asyncio.wait([serving])
        if not serving.cancelled():
            serving.result()

    with progress:
        run(until_stopped)


def _tell(text: str) -> None:
    print(f"vnet: {text}", file=sys.stderr, flush=True)


def _cannot_listen(port: int | None, error: OSError) -> CommandError:
    if error.errno == errno.EADDRINUSE:
        text = f"port {port} of this machine is in use: name another, or none for a free one"
        return CommandError(ExitStatus.CONFLICT, text)
    if error.errno in {errno.EACCES, errno.EPERM}:
        text = f"port {port} of this machine needs root: name one above 1023, or none"
        return CommandError(ExitStatus.NOT_PERMITTED, text)
    return CommandError(ExitStatus.INTERNAL, f"port {port}: {error.strerror}")


def _allow_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

"""Does what a proxy does with its libraries, and prints what was imported only then.

python confined_script.py <directory with a tsh home in it>; run by test_preload.py in a process of
its own, because nothing else may have been imported before.
"""

import asyncio
import contextlib
import importlib
import json
import logging
import os
import socket
import ssl
import sys
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote_plus, urlsplit

import uvloop

importlib.import_module("workers.runtime")
for role in ("tun", "dns", "proxy"):
    importlib.import_module(f"workers.{role}.worker")

from asyncinotify import Inotify, Mask  # noqa: E402  # as workers import it
from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: E402  # see above

from ipc import prompts as p  # noqa: E402  # after the workers, which shall need no help
from workers.proxy import dial  # noqa: E402  # see above
from workers.proxy.dial_plan import DialPlan, TlsPlan  # noqa: E402  # see above
from workers.proxy.notification import DesktopNotifier  # noqa: E402  # see above
from workers.proxy.prompts import PromptServer  # noqa: E402  # see above
from workers.proxy.reactor import Reactor  # noqa: E402  # see above
from workers.proxy.teleport import auth_client  # noqa: E402  # see above
from workers.proxy.teleport.errors import TeleportError  # noqa: E402  # see above
from workers.proxy.teleport.home import Login, read_home  # noqa: E402  # see above
from workers.proxy.teleport.mfa import MfaQuestion  # noqa: E402  # see above
from workers.proxy.teleport.sso_callback import Callbacks, Outcome  # noqa: E402  # see above

# Its first letter is wide: the name has to be encoded (RFC 3490), and is known without asking.
WIDE_LOCALHOST = "\uff4cocalhost"
QUESTION = MfaQuestion(
    id="q",
    profile="teleport.demo.test",
    cluster="demo.test",
    target="app pg",
    user="alice",
    takes_code=True,
    webauthn=None,
    seconds=60.0,
)


async def watch_a_directory(directory: Path) -> None:
    with Inotify() as watch:
        watch.add_watch(directory, Mask.CREATE | Mask.MOVED_TO | Mask.DELETE_SELF)
        (directory / "new").touch()
        async for event in watch:
            assert event.name is not None
            return


async def ask_for_a_second_factor(directory: Path) -> None:
    async def renew() -> MfaQuestion:
        return QUESTION

    notifier = DesktopNotifier()
    server = PromptServer(directory, "proxy-0", notify=notifier)
    await server.start()
    asked = asyncio.ensure_future(server.ask(QUESTION, renew))
    reader, writer = await asyncio.open_unix_connection(directory / "proxy-0.sock")
    while not isinstance(p.decode_from_proxy(await reader.readuntil(b"\n")), p.PromptOpened):
        pass
    writer.write(p.encode(p.Answer(id="q", code="123456")))
    assert (await asked).TOTP.Code == "123456"
    shown = notifier._task
    assert shown is not None
    await shown
    writer.close()
    await server.close()


async def hear_a_browser() -> None:
    callbacks = Callbacks()
    callback = await callbacks.open("https://teleport.demo.test")
    delivered: list[Outcome] = []
    callback.deliver = delivered.append
    path, _, query = callback.url.partition("?")
    key = bytes.fromhex(query.partition("=")[2])
    data = AESGCM(key).encrypt(bytes(12), b'{"mfa_token":"t"}', None)
    sealed = {"ciphertext": b64encode(data).decode(), "nonce": b64encode(bytes(12)).decode()}
    form = f"response={quote_plus(json.dumps(sealed))}".encode()
    head = (
        "POST /callback HTTP/1.1\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {len(form)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(path).port)
    writer.write(head.encode() + form)
    assert (await reader.read()).startswith(b"HTTP/1.1 302 ")
    assert delivered == ["t"]
    writer.close()
    callback.close()


async def ask_a_cluster(login: Login) -> None:
    api = auth_client.connect(login, timeout_seconds=2.0)
    try:
        await api.ping()
    except TeleportError:
        logging.getLogger().info("there is no cluster", exc_info=True)
    finally:
        api.close()


async def dial_every_way(login: Login) -> None:
    reactor = Reactor(asyncio.get_running_loop())
    tls = TlsPlan(ssl.create_default_context(), "bücher.test")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for proxy in ("", f"http://u:p@127.0.0.1:{port}", f"https://127.0.0.1:{port}"):
            for plan in (
                DialPlan("localhost", port, None, http_proxy=proxy),
                DialPlan("localhost", port, tls, http_proxy=proxy),
                DialPlan(WIDE_LOCALHOST, port, tls, upgrade=tls, http_proxy=proxy),
            ):
                with contextlib.suppress(dial.DialError):
                    (await dial.dial(plan, 0.2, reactor)).close()


async def main(directory: Path) -> None:
    home = read_home(directory / "tsh")
    (login,) = home.logins
    assert login.credentials is not None, home
    await watch_a_directory(directory)
    await ask_for_a_second_factor(directory)
    await hear_a_browser()
    await ask_a_cluster(login)
    await dial_every_way(login)


late: list[str] = []


def note(event: str, arguments: tuple[object, ...]) -> None:
    """As in `supervisor.spawn`."""
    if event == "import" and arguments[1] is None and arguments[0] not in sys.modules:
        late.append(str(arguments[0]))


logging.basicConfig(filename=os.devnull, level=logging.DEBUG)
sys.addaudithook(note)
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(asyncio.wait_for(main(Path(sys.argv[1])), 30))
print(*late)

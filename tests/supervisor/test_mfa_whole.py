"""Second factors from end to end: an embedded cluster, VNet's client, its prompts and `vnet mfa`."""

import asyncio
import base64
import contextlib
import json
import re
import ssl
import time
import urllib.request
from urllib.parse import urlsplit

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from mfa_terminal import DEADLINE_SECONDS, VNET, WITH_KEY, Terminal, key_environment
from software_key import SoftwareKey

from demo.cluster.config import App, Cluster, ClusterFile, Database, check_clusters
from demo.cluster.server import EmbeddedCluster
from demo.cluster.totp import totp_code
from ipc.prompts import PROMPTS_DIRECTORY
from workers.proxy.prompts import PromptServer
from workers.proxy.teleport.client import Teleport, default_settings
from workers.proxy.teleport.errors import MfaRequiredError

NAMES = ("one.corp.test", "two.corp.test")
ECHO = "tcp://echo.backend.internal:7"


def clusters(*devices):
    cluster = Cluster(
        name="root.demo.test",
        proxy_addr="localhost:0",
        custom_dns_zones=("corp.test",),
        mfa_devices=devices,
        apps=tuple(
            App(name=name[:3], uri=ECHO, public_addr=name, session_mfa=True) for name in NAMES
        ),
        databases=(
            Database(name="orders", protocol="postgres", uri="localhost:5432", session_mfa=True),
        ),
    )
    leaf = Cluster(
        name="leaf.demo.test",
        leaf_of="root.demo.test",
        custom_dns_zones=("leaf.corp.test",),
        apps=(App(name="leafy", uri=ECHO, public_addr="leafy.leaf.corp.test", session_mfa=True),),
    )
    return check_clusters(ClusterFile(clusters=(cluster, leaf)))


class Bed:
    def __init__(self, directory, home, clients, cluster, servers):
        self.cluster = cluster
        self.servers = servers
        self.directory = directory
        self.home = home
        self.clients = clients
        self.terminals = []

    async def terminal(self, *arguments, **changes):
        terminal = await Terminal.start(self.directory, *arguments, **changes)
        self.terminals.append(terminal)
        return terminal

    def code(self, steps=0):
        secret = (self.home / "totp-secret").read_text().strip()
        return totp_code(secret, time.time() + 30 * steps)

    def key(self):
        found = json.loads((self.home / "webauthn-credential.json").read_text())
        return SoftwareKey(
            rp_id=found["rp_id"],
            credential_id=base64.b64decode(found["credential_id"]),
            user_handle=base64.b64decode(found["user_handle"]),
            private_key=load_pem_private_key(found["private_key"].encode(), None),
        )

    async def until_prompts(self, count):
        """Without --watch, who comes before the prompts finds none."""
        while sum(len(server._prompts) for server in self.servers) != count:
            await asyncio.sleep(0.01)

    async def until_faults(self, *, is_refusing):
        state = self.cluster.states["root.demo.test"]
        while state.faults.mfa_refused is not is_refusing:
            await asyncio.sleep(0.01)

    def connect(self, name, client=0):
        """What a connection to the name waits for."""

        async def plan():
            target = await self.clients[client].resolve(name)
            return await self.clients[client].plan(target, 7)

        return asyncio.ensure_future(plan())


def play(directory, file, scene, proxies=1):
    async def main():
        home, prompts = directory / "tsh", directory / PROMPTS_DIRECTORY
        for made in (home, prompts):
            made.mkdir()
        async with EmbeddedCluster(file, home) as cluster, contextlib.AsyncExitStack() as closing:
            clients, servers = [], []
            for index in range(proxies):
                server = PromptServer(prompts, f"proxy-{index}")
                await server.start()
                servers.append(server)
                closing.push_async_callback(server.close)
                settings = default_settings(ca_file=str(cluster.web_ca_file), prompter=server)
                client = Teleport(home, settings)
                await client.start()
                closing.push_async_callback(client.close)
                clients.append(client)
            bed = Bed(directory, home, clients, cluster, servers)
            try:
                async with asyncio.timeout(DEADLINE_SECONDS):
                    await scene(bed)
            finally:
                for terminal in bed.terminals:
                    terminal.close()
                    await terminal.process.wait()

    asyncio.run(main())


async def echo(plan):
    """Sends a few bytes through the proxy and back, which checks that the factor was given."""
    reader, writer = await asyncio.open_connection(
        plan.host, plan.port, ssl=plan.tls.context, server_hostname=plan.tls.server_hostname
    )
    writer.write(b"\0\0\0\5hello")
    assert await reader.readexactly(9) == b"\0\0\0\5hello"
    writer.close()


def test_a_code_opens_an_app_for_the_rest_of_the_session(tmp_path):
    async def scene(bed):
        waiting = bed.connect(NAMES[0])
        terminal = await bed.terminal("--watch")
        await terminal.expect("app one in root.demo.test waits for a second factor of alice")
        await terminal.expect("code (")
        terminal.type("000000\n")
        await terminal.expect("invalid totp token")
        await terminal.expect("code (")
        terminal.type(bed.code() + "\n")
        await echo(await waiting)
        await terminal.expect("app one can be used now")
        await echo(await bed.connect(NAMES[0]))

    play(tmp_path, clusters("totp"), scene)


def test_a_code_is_good_once_and_the_next_one_does(tmp_path):
    async def scene(bed):
        waiting = [bed.connect(name) for name in NAMES]
        await bed.until_prompts(2)
        terminal = await bed.terminal()
        code = bed.code()
        await terminal.expect("code (")
        terminal.type(code + "\n")
        await terminal.expect("can be used now")
        await terminal.expect("code (")
        terminal.type(code + "\n")
        await terminal.expect("previously used totp token")
        await terminal.expect("code (")
        terminal.type(bed.code(+1) + "\n")
        await terminal.expect("can be used now")
        assert await terminal.end() == 0
        for plan in await asyncio.gather(*waiting):
            await echo(plan)

    play(tmp_path, clusters("totp"), scene)


def test_leaf_apps_and_databases_ask_in_the_same_way(tmp_path):
    async def scene(bed):
        terminal = await bed.terminal("--watch")
        await terminal.expect("waiting for prompts")
        leafy = bed.connect("leafy.leaf.corp.test")
        await terminal.expect("app leafy in leaf.demo.test waits")
        await terminal.expect("code (")
        terminal.type(bed.code() + "\n")
        await echo(await leafy)
        orders = bed.connect("orders.db.localhost")
        await terminal.expect("database orders in root.demo.test waits")
        await terminal.expect("code (")
        terminal.type(bed.code(+1) + "\n")
        assert (await orders).tls is not None
        await terminal.expect("database orders can be used now")

    play(tmp_path, clusters("totp"), scene)


@pytest.mark.parametrize("proxies", [1, 2])
def test_one_key_answers_prompts_that_wait_together(tmp_path, proxies):
    """A cluster keeps one challenge per user: each prompt takes the other's place."""

    async def scene(bed):
        waiting = [bed.connect(name, index % proxies) for index, name in enumerate(NAMES)]
        terminal = await bed.terminal(
            "--watch", program=WITH_KEY + VNET, **key_environment(bed.key())
        )
        for _ in waiting:
            await terminal.expect("touch your security key")
            await terminal.expect("can be used now")
        assert "not taken" not in terminal.text
        for plan in await asyncio.gather(*waiting):
            await echo(plan)

    play(tmp_path, clusters("webauthn"), scene, proxies)


def follow(url, ca_file):
    """What a browser does: goes where it is sent, and returns where it ends."""
    context = ssl.create_default_context(cafile=str(ca_file))
    with urllib.request.urlopen(url, context=context, timeout=20) as answer:
        return answer.url


def page_in(text):
    return re.findall(r"open this address in your browser: (https://\S+)\s", text)[-1]


@pytest.mark.parametrize("devices", [("sso",), ("totp", "webauthn", "sso")])
def test_single_sign_on_opens_an_app(tmp_path, devices):
    async def scene(bed):
        waiting = bed.connect(NAMES[0])
        await bed.until_prompts(1)
        terminal = await bed.terminal()
        await terminal.expect("to sign in at sso-demo, open this address in your browser: ")
        await terminal.expect("decline): ")
        ended = await asyncio.to_thread(follow, page_in(terminal.text), bed.home / "web-ca.pem")
        assert urlsplit(ended).path == "/web/msg/info/login_success"
        await echo(await waiting)
        await terminal.expect("answered in the browser")
        await terminal.expect("app one can be used now")
        assert await terminal.end() == 0

    play(tmp_path, clusters(*devices), scene)


def test_a_sign_on_that_is_refused_can_be_tried_again(tmp_path):
    async def scene(bed):
        (bed.home / "faults").write_text("mfa_refused")
        await bed.until_faults(is_refusing=True)
        waiting = bed.connect(NAMES[0])
        terminal = await bed.terminal("--watch")
        await terminal.expect("decline): ")
        page = page_in(terminal.text)
        ended = await asyncio.to_thread(follow, page, bed.home / "web-ca.pem")
        assert urlsplit(ended).path == "/web/msg/error/login"
        await terminal.expect("not taken: single sign-on failed: a fault refuses every sign-on")
        await terminal.expect("decline): ")
        (bed.home / "faults").write_text("")
        await bed.until_faults(is_refusing=False)
        assert page_in(terminal.text) != page
        await asyncio.to_thread(follow, page_in(terminal.text), bed.home / "web-ca.pem")
        await echo(await waiting)

    play(tmp_path, clusters("sso"), scene)


def test_a_user_without_a_device_is_told_at_once(tmp_path):
    async def scene(bed):
        with pytest.raises(MfaRequiredError, match="tsh mfa add"):
            await bed.connect(NAMES[0])

    play(tmp_path, clusters(), scene)

"""Against a real session bus, with a desktop of our own on it."""

import asyncio
import contextlib
import shutil
import subprocess
from dataclasses import replace

import pytest
import uvloop
from jeepney import MessageType, message_bus, new_error, new_method_return
from jeepney.io.asyncio import open_dbus_connection
from jeepney.low_level import HeaderFields
from teleport_fakes import until

from workers.proxy import notification
from workers.proxy.notification import DesktopNotifier
from workers.proxy.teleport.mfa import MfaQuestion

QUESTION = MfaQuestion(
    id="q1",
    profile="teleport.demo.test",
    cluster="demo.test",
    target="app pg",
    user="alice",
    takes_code=True,
    webauthn=None,
    seconds=110.0,
)
NAME = "org.freedesktop.Notifications"


@pytest.fixture
def bus(tmp_path):
    """The address of a session bus."""
    if shutil.which("dbus-daemon") is None:
        pytest.skip("dbus-daemon is not installed")
    (tmp_path / "services").mkdir()
    configuration = tmp_path / "session.conf"
    configuration.write_text(
        f"""<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={tmp_path}/bus</listen>
<servicedir>{tmp_path}/services</servicedir>
<policy context="default"><allow send_destination="*" eavesdrop="true"/>
<allow eavesdrop="true"/><allow own="*"/></policy>
</busconfig>"""
    )
    arguments = ["dbus-daemon", f"--config-file={configuration}", "--nofork", "--print-address=1"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


class Desktop:
    """Owns the name and notes what it is asked to show."""

    def __init__(self):
        self.shown = []
        self.refuses = False

    async def serve(self, address, ready):
        async with await open_dbus_connection(address) as connection:
            await connection.send(message_bus.RequestName(NAME))
            while True:
                message = await connection.receive()
                if message.header.message_type is MessageType.method_call:
                    await connection.send(self.answer(message))
                elif message.header.message_type is MessageType.method_return:
                    ready.set()  # the name is ours

    def answer(self, call):
        assert call.header.fields[HeaderFields.interface] == NAME
        assert call.header.fields[HeaderFields.member] == "Notify"
        self.shown.append(call.body)
        if self.refuses:
            return new_error(call, f"{NAME}.Error", "s", ("no",))
        return new_method_return(call, "u", (1,))


@contextlib.asynccontextmanager
async def desktop(address):
    found, ready = Desktop(), asyncio.Event()
    task = asyncio.create_task(found.serve(address, ready))
    async with asyncio.timeout(20):
        await ready.wait()
    try:
        yield found
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def play(scene):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())


async def finished(notifier):
    await until(lambda: notifier._task is not None and notifier._task.done(), 20)


def test_the_desktop_shows_what_waits_and_what_to_do(bus, tmp_path):
    async def scene():
        async with desktop(bus) as found:
            notifier = DesktopNotifier({"DBUS_SESSION_BUS_ADDRESS": bus}, tmp_path / "none")
            notifier(QUESTION)
            await finished(notifier)
            ((name, replaces, _icon, summary, body, actions, hints, milliseconds),) = found.shown
            assert (name, replaces, actions) == ("VNet", 0, [])
            assert summary == "VNet waits for a second factor"
            assert body == "app pg in demo.test: run vnet mfa"
            assert hints == {"urgency": ("y", 1)}
            assert milliseconds == 110_000
            await notifier.close()

    play(scene)


def test_without_the_variable_the_users_own_bus_is_found(bus, tmp_path):
    async def scene():
        async with desktop(bus) as found:
            notifier = DesktopNotifier({}, tmp_path)
            notifier(QUESTION)
            await finished(notifier)
            assert len(found.shown) == 1
            await notifier.close()

    play(scene)


def test_an_address_of_another_session_does_not_hide_the_users_own(bus, tmp_path):
    async def scene():
        async with desktop(bus) as found:
            for wrong in (f"unix:path={tmp_path}/none", "tcp:host=127.0.0.1", "nonsense", ":,;="):
                notifier = DesktopNotifier({"DBUS_SESSION_BUS_ADDRESS": wrong}, tmp_path)
                notifier(QUESTION)
                await finished(notifier)
                await notifier.close()
            assert len(found.shown) == 4

    play(scene)


def test_many_prompts_do_not_cover_the_screen(bus, tmp_path):
    async def scene():
        async with desktop(bus) as found:
            notifier = DesktopNotifier({}, tmp_path)
            for number in range(50):
                notifier(replace(QUESTION, id=str(number)))
            await finished(notifier)
            assert len(found.shown) == 1
            await notifier.close()

    play(scene)


def test_the_next_one_comes_after_a_pause(bus, tmp_path, monkeypatch):
    monkeypatch.setattr(notification, "PAUSE_SECONDS", 0.0)

    async def scene():
        async with desktop(bus) as found:
            notifier = DesktopNotifier({}, tmp_path)
            for number in range(2):
                notifier(QUESTION)
                await until(lambda number=number: len(found.shown) > number, 20)
            await finished(notifier)
            await notifier.close()

    play(scene)


def test_names_from_a_cluster_are_no_markup(bus, tmp_path):
    async def scene():
        async with desktop(bus) as found:
            notifier = DesktopNotifier({}, tmp_path)
            notifier(replace(QUESTION, target="app <b>&\x1b" + "x" * 1000))
            await finished(notifier)
            body = found.shown[0][4]
            assert body.startswith("app &lt;b&gt;&amp; x")
            assert len(body) < 300
            await notifier.close()

    play(scene)


def test_a_desktop_that_refuses_is_no_fault(bus, tmp_path):
    async def scene():
        async with desktop(bus) as found:
            found.refuses = True
            notifier = DesktopNotifier({}, tmp_path)
            notifier(QUESTION)
            await finished(notifier)
            assert notifier._task.exception() is None
            await notifier.close()

    play(scene)


def test_a_bus_without_a_desktop_is_no_fault(bus, tmp_path):
    async def scene():
        notifier = DesktopNotifier({}, tmp_path)
        notifier(QUESTION)
        await finished(notifier)
        assert notifier._task.exception() is None
        await notifier.close()

    play(scene)


@pytest.mark.parametrize("said", [b"", b"REJECTED EXTERNAL\r\n", b"\0" * 10_000, b"OK 1\r\nmore"])
def test_something_else_in_the_place_of_the_bus_is_no_fault(tmp_path, said):
    async def scene():
        async def answer(reader, writer):
            await reader.read(100)
            writer.write(said)
            writer.close()

        server = await asyncio.start_unix_server(answer, tmp_path / "bus")
        notifier = DesktopNotifier({}, tmp_path)
        notifier(QUESTION)
        await finished(notifier)
        assert notifier._task.exception() is None
        await notifier.close()
        server.close()

    play(scene)


def test_a_bus_that_never_answers_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(notification, "TIMEOUT_SECONDS", 0.05)

    async def scene():
        connected, over = asyncio.Event(), asyncio.Event()

        async def be_silent(reader, writer):
            connected.set()
            await over.wait()
            writer.close()

        server = await asyncio.start_unix_server(be_silent, tmp_path / "bus")
        notifier = DesktopNotifier({}, tmp_path)
        notifier(QUESTION)
        await finished(notifier)
        assert notifier._task.exception() is None
        over.set()
        await notifier.close()
        server.close()

    play(scene)


def test_without_a_desktop_nothing_happens(tmp_path):
    async def scene():
        notifier = DesktopNotifier({}, tmp_path)
        await notifier.close()
        notifier(QUESTION)
        await finished(notifier)
        await notifier.close()

    play(scene)

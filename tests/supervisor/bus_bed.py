"""A system bus of the test's own, and services on it that note what they are asked."""

import contextlib
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from jeepney import HeaderFields, MessageType, new_error, new_method_return
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import open_dbus_connection

PROPERTIES = "org.freedesktop.DBus.Properties"
# Far more than anything takes here.
PATIENCE_SECONDS = 20.0


def wait_until(condition, what):
    limit = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.01)


class PrivateBus:
    """dbus-daemon with a socket in a directory; anybody may own any name."""

    def __init__(self, directory: Path):
        if shutil.which("dbus-daemon") is None:
            pytest.skip("dbus-daemon is not installed")
        self.address = f"unix:path={directory}/bus"
        self.environment = {"DBUS_SYSTEM_BUS_ADDRESS": self.address}
        self._directory = directory
        self._configuration = directory / "bus.conf"
        self._configuration.write_text(
            f"""<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>{self.address}</listen>
<policy context="default"><allow send_destination="*" eavesdrop="true"/>
<allow eavesdrop="true"/><allow own="*"/></policy>
</busconfig>"""
        )
        self.start()

    @property
    def pid(self):
        return self._process.pid

    def start(self):
        command = ["dbus-daemon", f"--config-file={self._configuration}", "--nofork"]
        self._process = subprocess.Popen(
            [*command, "--print-address=1"], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout.readline()

    def stop(self):
        with self._process:
            self._process.kill()
        (self._directory / "bus").unlink(missing_ok=True)


class Service:
    """Owns a name on the bus from a thread of its own.

    `calls` has (interface, member, body) of each call. `answers` maps a member to a function of the
    body and the object's path that returns (signature, values), or raises ErrorAnswer. A member in `hanging`,
    or "*", gets no answer.
    """

    def __init__(self, address, name):
        self.address = address
        self.name = name
        self.calls = []
        self.answers = {}
        self.hanging = set()
        self._thread = None
        self._leaves = threading.Event()

    def members(self):
        return [member for _, member, _ in self.calls]

    def start(self):
        self._leaves.clear()
        self._connection = open_dbus_connection(self.address)
        self._connection.send(message_bus.RequestName(self.name, 4), serial=1000)
        while True:
            message = self._connection.receive(timeout=PATIENCE_SECONDS)
            if message.header.fields.get(HeaderFields.reply_serial) == 1000:
                assert message.body == (1,)
                break
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self):
        if self._thread is not None:
            self._leaves.set()
            self._thread.join()
            self._thread = None
            self._connection.close()

    def restart(self):
        self.stop()
        self.start()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_error):
        self.stop()

    def _serve(self):
        # The bus may be taken away under the service.
        with contextlib.suppress(ConnectionError):
            while not self._leaves.is_set():
                with contextlib.suppress(TimeoutError):
                    message = self._connection.receive(timeout=0.02)
                    if message.header.message_type is MessageType.method_call:
                        self._answer(message)

    def _answer(self, call):
        fields = call.header.fields
        member = fields[HeaderFields.member]
        self.calls.append((fields[HeaderFields.interface], member, call.body))
        if self.hanging & {member, "*"}:
            return
        try:
            signature, values = self.answers[member](call.body, fields[HeaderFields.path])
        except KeyError:
            name = "org.freedesktop.DBus.Error.UnknownMethod"
            answer = new_error(call, name, "s", (f"no {member}",))
        except ErrorAnswer as error:
            answer = new_error(call, error.name, "s", (str(error),))
        else:
            answer = new_method_return(call, signature or None, values)
        self._connection.send(answer)


class ErrorAnswer(Exception):  # noqa: N818  # what a service says, not what goes wrong here
    def __init__(self, name, text="no"):
        super().__init__(text)
        self.name = name


class FakeResolved(Service):
    """The part of systemd-resolved that keeps the settings of links."""

    def __init__(self, address, links=(7,)):
        super().__init__(address, "org.freedesktop.resolve1")
        self.links = {index: {} for index in links}
        for setting in ("DNS", "Domains", "DefaultRoute", "LLMNR", "MulticastDNS"):
            self.answers[f"SetLink{setting}"] = self._setter(setting)
        for setting in ("DNSSEC", "DNSOverTLS"):
            self.answers[f"SetLink{setting}"] = self._setter(setting)
        self.answers["RevertLink"] = self._revert
        self.answers["GetLink"] = self._get_link
        self.answers["GetAll"] = self._get_all

    def refuse(self, member, name):
        def answer(_body, _path):
            raise ErrorAnswer(name)

        self.answers[member] = answer

    def _settings(self, index):
        try:
            return self.links[index]
        except KeyError:
            raise ErrorAnswer("org.freedesktop.resolve1.NoSuchLink") from None

    def _setter(self, setting):
        def answer(body, _path):
            self._settings(body[0])[setting] = body[1]
            return "", ()

        return answer

    def _revert(self, body, _path):
        self._settings(body[0]).clear()
        return "", ()

    def _get_link(self, body, _path):
        self._settings(body[0])
        return "o", (f"/org/freedesktop/resolve1/link/_3{body[0]}",)

    def _get_all(self, body, path):
        assert body == ("org.freedesktop.resolve1.Link",)
        found = _UNSET | self.links[int(path.rpartition("_3")[2])]
        kinds = {"DNS": "a(iay)", "Domains": "a(sb)", "DefaultRoute": "b"}
        return "a{sv}", ({name: (kinds.get(name, "s"), value) for name, value in found.items()},)


_UNSET = {
    "DNS": [],
    "Domains": [],
    "DefaultRoute": False,
    "LLMNR": "yes",
    "MulticastDNS": "no",
    "DNSSEC": "no",
    "DNSOverTLS": "no",
}


class FakeNetworkManager(Service):
    """Its DnsManager, its devices, and Reload."""

    def __init__(self, address, mode="dnsmasq", rc_manager="symlink"):
        super().__init__(address, "org.freedesktop.NetworkManager")
        self.dns = {"Mode": ("s", mode), "RcManager": ("s", rc_manager)}
        self.devices = {"vnet0": True}
        self.answers["GetAll"] = self._get_all
        self.answers["Set"] = self._set
        self.answers["Reload"] = lambda _body, _path: ("", ())
        self.answers["GetDeviceByIpIface"] = self._get_device

    def _get_device(self, body, _path):
        if body[0] not in self.devices:
            raise ErrorAnswer("org.freedesktop.NetworkManager.UnknownDevice")
        return "o", (f"/org/freedesktop/NetworkManager/Devices/{body[0]}",)

    def _get_all(self, body, path):
        if body == ("org.freedesktop.NetworkManager.DnsManager",):
            return "a{sv}", (self.dns,)
        assert body == ("org.freedesktop.NetworkManager.Device",)
        return "a{sv}", ({"Managed": ("b", self.devices[path.rpartition("/")[2]])},)

    def _set(self, body, path):
        assert body[:2] == ("org.freedesktop.NetworkManager.Device", "Managed")
        self.devices[path.rpartition("/")[2]] = body[2][1]
        return "", ()

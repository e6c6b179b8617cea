"""Plays systemd for one service: starts it, keeps its descriptors, starts it again when it is killed.

    service_manager.py RECORD PROGRAM ARGUMENTS...

RECORD gets one line of JSON for each event: {"started": pid, "stored": names}, {"said": line},
{"ended": status}. SIGTERM is passed on, and then the program is not started again; what it has stored
by then is in the last line, {"left": names}. See sd_pid_notify_with_fds(3), sd_listen_fds_with_names(3).
"""

import array
import json
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path

RESTART_SECONDS = 0.1  # RestartSec= of systemd, unless it is set
MAX_STORED = 16


class Manager:
    def __init__(self, record: Path, command: list[str]) -> None:
        self.record = record
        self.command = command
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(f"\0vnet-test-manager-{os.getpid()}")
        self.store: list[tuple[str, int]] = []
        self.stop_is_asked = False
        self.pid = 0

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self.pass_on)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        selector = selectors.DefaultSelector()
        selector.register(self.notify, selectors.EVENT_READ)
        selector.register(reader, selectors.EVENT_READ)
        self.start()
        while True:
            for key, _ in selector.select():
                if key.fileobj is self.notify:
                    self.hear()
                else:
                    os.read(reader, 4096)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == 0:
                continue
            code = os.waitstatus_to_exitcode(status)
            self.hear()
            self.say(ended=code)
            if self.stop_is_asked or code >= 0:
                self.say(left=[name for name, _ in self.store])
                return code if code >= 0 else 128 - code
            time.sleep(RESTART_SECONDS)
            self.start()

    def pass_on(self, number: int, _frame: object) -> None:
        self.stop_is_asked = True
        os.kill(self.pid, number)

    def say(self, **event: object) -> None:
        with self.record.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def start(self) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            self.become()
        self.say(started=self.pid, stored=[name for name, _ in self.store])

    def become(self) -> None:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            name = self.notify.getsockname().decode().replace("\0", "@")
            environment = os.environ | {"NOTIFY_SOCKET": name}
            if self.store:
                # Out of the way first: the targets may be sources.
                high = [os.dup(descriptor) for _, descriptor in self.store]
                high = [os.dup2(d, 100 + index) for index, d in enumerate(high)]
                for index, descriptor in enumerate(high):
                    os.dup2(descriptor, 3 + index)
                os.closerange(3 + len(high), 1024)
                environment |= {
                    "LISTEN_PID": str(os.getpid()),
                    "LISTEN_FDS": str(len(high)),
                    "LISTEN_FDNAMES": ":".join(name for name, _ in self.store),
                }
            os.execvpe(self.command[0], self.command, environment)
        finally:
            os._exit(99)

    def hear(self) -> None:
        while True:
            try:
                data, ancillary, _, _ = self.notify.recvmsg(
                    65536, socket.CMSG_SPACE(253 * 4), socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return
            descriptors = array.array("i")
            for _, _, rights in ancillary:
                descriptors.frombytes(rights)
            lines = data.decode().splitlines()
            names = [line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME=")]
            if "FDSTOREREMOVE=1" in lines:
                for name, descriptor in self.store:
                    if name in names:
                        os.close(descriptor)
                self.store = [kept for kept in self.store if kept[0] not in names]
            elif "FDSTORE=1" in lines:
                for descriptor in descriptors:
                    # As systemd does, the latest first.
                    self.store.insert(0, (names[0], descriptor))
                assert len(self.store) <= MAX_STORED
            for line in lines:
                if line.split("=")[0] in ("READY", "STOPPING", "FDNAME"):
                    self.say(said=line)


if __name__ == "__main__":
    sys.exit(Manager(Path(sys.argv[1]), sys.argv[2:]).run())

"""What runs in a session of the small SSH server: a shell or a command, with a terminal or without.

    channel --> standard input, or terminal --> program --> standard output, error --> channel

Programs run as the cluster's own user in its home directory (RFC 4254 section 6). Everything here
is blocking, in threads that end with the program or the channel.
"""

import contextlib
import fcntl
import os
import pwd
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import paramiko
from paramiko.common import cMSG_CHANNEL_REQUEST

READ_BYTES = 32 * 1024
# What paramiko raises when the channel or its connection has gone.
_GONE = (OSError, EOFError)
MAX_VARIABLES = 100
_JOIN_SECONDS = 2.0
# What Debian's sshd accepts.
_ACCEPTED = ("LANG", "LC_")
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
# What this process was started to ignore, as under nohup or in the background of a shell, a login does not.
_WITH_ORDINARY_SIGNALS = ("env", "--default-signal=HUP,INT,QUIT") if sys.platform == "linux" else ()
# Opening a terminal as leader of a session makes it the controlling one.
_ON_TERMINAL = 'exec <>"$SSH_TTY" >&0 2>&1; exec "$0" "$@"'


class Session:
    """One session channel; its methods are called by the thread of its connection."""

    def __init__(self, channel: paramiko.Channel, login: str, variables: Mapping[str, str]) -> None:
        """`variables` are for the program's environment, beside those the client sets."""
        self._channel = channel
        self._login = login
        self._variables = dict(variables)
        self._terminal: int | None = None
        self._slave = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._command: str | None = None
        self._has_command = False
        self._thread: threading.Thread | None = None
        self._feeder: threading.Thread | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing runs any more, and the channel is closed."""
        is_running = self._thread is not None and self._thread.is_alive()
        return bool(self._channel.closed) and not is_running

    def set_variable(self, name: str, value: str) -> bool:
        """Sets a variable of the environment, if it is of a kind that clients may set."""
        if not name.startswith(_ACCEPTED) or len(self._variables) >= MAX_VARIABLES:
            return False
        self._variables[name] = value
        return True

    def open_terminal(self, kind: str, width: int, height: int) -> bool:
        """Gives the program to come a terminal."""
        if self._terminal is not None or self._has_command:
            return False
        # Kept open here: otherwise the terminal would be at its end before the program begins.
        self._terminal, self._slave = os.openpty()
        self._variables |= {"TERM": kind, "SSH_TTY": os.ttyname(self._slave)}
        self.resize(width, height)
        return True

    def resize(self, width: int, height: int) -> bool:
        """Changes the size of the terminal."""
        if self._terminal is None:
            return False
        size = struct.pack("HHHH", height & 0xFFFF, width & 0xFFFF, 0, 0)
        with contextlib.suppress(OSError):  # it may have been closed just now
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)
        return True

    def choose(self, command: str | None) -> bool:
        """Says what to run (None: the shell), once."""
        if self._has_command:
            return False
        self._has_command, self._command = True, command
        return True

    def start(self) -> None:
        """Runs what has been chosen, once; later, so that the client knows it was accepted."""
        if self._has_command and self._thread is None:
            name = f"ssh session {self._channel.get_id()}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def send_signal(self, name: str) -> None:
        """A signal (without SIG) for the program and what it has started."""
        number = getattr(signal, f"SIG{name}", None)
        if isinstance(number, signal.Signals):
            self._kill(number)

    def close(self) -> None:
        """Hangs up."""
        with contextlib.suppress(*_GONE):
            self._channel.close()
        self._kill(signal.SIGHUP)
        if self._thread is None:
            self._close_terminal()

    def join(self) -> None:
        """Waits until the program has ended; one that does not take a hang-up is killed."""
        if self._thread is None:
            return
        self._thread.join(_JOIN_SECONDS)
        if self._thread.is_alive():
            self._kill(signal.SIGKILL)
            self._thread.join(_JOIN_SECONDS)

    def _kill(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)

    # -- in the session's own thread --

    def _run(self) -> None:
        try:
            status = self._run_program()
            if status < 0:
                _send_exit_signal(self._channel, signal.Signals(-status))
            else:
                self._channel.send_exit_status(status)
        except _GONE as error:
            with contextlib.suppress(*_GONE):
                self._channel.sendall_stderr(f"{error}\n".encode())
                self._channel.send_exit_status(255)
        finally:
            with contextlib.suppress(*_GONE):
                self._channel.shutdown_write()
                self._channel.close()
            if self._feeder is not None:
                self._feeder.join(_JOIN_SECONDS)
            self._close_terminal()

    def _run_program(self) -> int:
        entry = pwd.getpwuid(os.getuid())
        shell = entry.pw_shell or "/bin/sh"
        arguments = [shell, *(("-c", self._command) if self._command is not None else ("-l",))]
        home = entry.pw_dir if Path(entry.pw_dir).is_dir() else "/"
        environment = {
            "PATH": os.environ.get("PATH", _PATH),
            "HOME": home,
            "SHELL": shell,
            "USER": self._login,
            "LOGNAME": self._login,
        } | self._variables
        pipe: int | None = subprocess.PIPE
        if self._terminal is not None:
            arguments = ["/bin/sh", "-c", _ON_TERMINAL, *arguments]
            pipe = subprocess.DEVNULL
        self._process = process = subprocess.Popen(
            [*_WITH_ORDINARY_SIGNALS, *arguments],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            cwd=home,
            env=environment,
            start_new_session=True,
        )
        if self._terminal is not None:
            return self._carry_terminal(process, self._terminal)
        return self._carry_pipes(process)

    def _carry_pipes(self, process: "subprocess.Popen[bytes]") -> int:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        standard_input, channel = process.stdin, self._channel

        def feed() -> None:
            with contextlib.suppress(*_GONE), standard_input:
                while data := channel.recv(READ_BYTES):
                    standard_input.write(data)
                    standard_input.flush()

        self._feeder = _started(feed)
        with process.stdout as output, process.stderr as errors:
            copiers = (
                _started(self._copy, output.fileno(), channel.sendall),
                _started(self._copy, errors.fileno(), channel.sendall_stderr),
            )
            status = process.wait()
            for copier in copiers:
                copier.join()
        return status

    def _carry_terminal(self, process: "subprocess.Popen[bytes]", terminal: int) -> int:
        def feed() -> None:
            with contextlib.suppress(*_GONE):
                while data := self._channel.recv(READ_BYTES):
                    os.write(terminal, data)
                if not self._channel.closed:
                    os.write(terminal, b"\x04")  # Ctrl-D: the client sends no more

        self._feeder = _started(feed)
        copier = _started(self._copy, terminal, self._channel.sendall)
        status = process.wait()
        slave, self._slave = self._slave, -1
        os.close(slave)
        copier.join()
        return status

    def _copy(self, descriptor: int, send: Callable[[bytes], None]) -> None:
        """Sends what is read until the end; a terminal's end is an error, EIO."""
        try:
            while data := os.read(descriptor, READ_BYTES):
                send(data)
        except _GONE:
            if self._channel.closed:  # nobody reads what the program has to say
                self._kill(signal.SIGHUP)

    def _close_terminal(self) -> None:
        terminal, self._terminal = self._terminal, None
        slave, self._slave = self._slave, -1
        for descriptor in (terminal, slave):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)


def _started(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _send_exit_signal(channel: paramiko.Channel, number: signal.Signals) -> None:
    """Tells the client by which signal the program ended; paramiko has no function for it."""
    message = paramiko.Message()
    message.add_byte(cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string("exit-signal")
    message.add_boolean(False)  # wants no reply
    message.add_string(number.name.removeprefix("SIG"))
    message.add_boolean(False)  # no core dump
    message.add_string("")
    message.add_string("en")
    channel.transport._send_user_message(message)  # noqa: SLF001


def carry_socket(
    channel: paramiko.Channel, end: socket.socket, on_end: Callable[[], object]
) -> None:
    """Copies both ways between a forwarded channel and a connection until both have ended."""

    def up() -> None:
        with contextlib.suppress(*_GONE):
            while data := channel.recv(READ_BYTES):
                end.sendall(data)
            end.shutdown(socket.SHUT_RDWR if channel.closed else socket.SHUT_WR)

    def both() -> None:
        feeder = _started(up)
        with end, contextlib.suppress(*_GONE):
            while data := end.recv(READ_BYTES):
                channel.sendall(data)
            channel.shutdown_write()
            feeder.join()
        with contextlib.suppress(*_GONE):
            channel.close()
        on_end()

    _started(both)

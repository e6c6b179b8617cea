"""VNet's programs where Linux's libraries and calls are missing, and what stands in for them."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ipc.peer import uid_of_xucred

ROOT = Path(__file__).parent.parent.parent
PARTS = Path(__file__).parent


def on_macos(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in a process that looks like one on macOS."""
    return subprocess.run(
        [sys.executable, PARTS / "on_macos.py", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def program(text: str) -> str:
    """Output of a program that begins as on macOS."""
    head = "import on_macos\non_macos.pretend()\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{PARTS}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_configuration_is_checked(tmp_path):
    done = on_macos("supervisor.main", "--check-config")
    assert (done.returncode, done.stdout) == (0, "the configuration is valid\n"), done.stderr
    wrong = tmp_path / "vnet.toml"
    wrong.write_text("colour = 1\n")
    done = on_macos("supervisor.main", "--check-config", "--config", str(wrong))
    assert done.returncode == 2
    assert "colour" in done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("status", "--help"), ("service", "--help")])
def test_help_is_shown(arguments):
    done = on_macos("supervisor.cli.app", *arguments)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_a_health_check_says_that_vnet_does_not_run(tmp_path):
    done = on_macos("supervisor.cli.app", "status", "--run-dir", str(tmp_path))
    assert done.returncode == 3, done.stderr
    assert "not running" in done.stderr


def test_the_service_is_launchds():
    done = on_macos("supervisor.cli.app", "service", "show")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("==> /Library/LaunchDaemons/vnet.supervisor.plist <==\n")


def test_everything_that_runs_there_can_be_imported():
    # The one that only Linux has is imported only there.
    left_out = "workers.proxy.notification"
    failed = program(
        f"""
        import importlib, pkgutil
        for name in ("ipc", "supervisor", "workers"):
            package = importlib.import_module(name)
            for found in pkgutil.walk_packages(package.__path__, name + "."):
                if found.name != {left_out!r}:
                    importlib.import_module(found.name)
        from supervisor import this_system
        print(type(this_system.host()).__name__, this_system.HostNetwork.__module__)
        """
    )
    assert failed == "MacHost supervisor.macos.host_network"


def test_messages_and_descriptors_go_through_the_channel():
    said = program(
        """
        import os, socket
        from ipc.channel import Channel, make_pair
        from ipc.messages import ListenerOpened
        from ipc.permits import Role
        ours, theirs = make_pair()
        assert ours.type == socket.SOCK_DGRAM
        sender = Channel(ours, Role.SUPERVISOR, Role.PROXY, takes_descriptors=False)
        receiver = Channel(theirs, Role.PROXY, Role.SUPERVISOR, takes_descriptors=True)
        reader, writer = os.pipe()
        sender.send(ListenerOpened(address=bytes(4), port=7), [writer])
        message, [copy] = receiver.receive()
        assert not os.get_inheritable(copy)
        os.write(copy, b"through")
        print(message.port, os.read(reader, 9).decode(), receiver.receive())
        """
    )
    assert said == "7 through None"


def test_workers_become_other_users_than_root_and_say_what_is_missing():
    if os.geteuid() != 0:
        pytest.skip("not root")
    said = program(
        """
        import os
        from pathlib import Path
        from ipc.permits import Role
        from supervisor.confinement import apply, identities
        from supervisor.confinement.landlock_rules import Reach
        from supervisor.settings import User
        chosen = identities.choose(["tun", "proxy-0"], User("alice", 4711, 4712, Path("/")))
        assert chosen.of["proxy-0"].uid == 4711
        identity = chosen.of["tun"]
        confinement = apply.confine(Role.TUN, identity, Reach(), 1000, os.getppid())
        assert os.getuid() == os.geteuid() == identity.uid != 0
        assert os.getgroups() == [identity.extra_group]
        try:
            os.setuid(0)
        except PermissionError:
            print(*confinement.report.missing, sep=";")
        """
    )
    assert "no Landlock" in said
    assert "no system call filter" in said


def test_a_process_ends_soon_after_its_parent():
    said = program(
        """
        import os, signal, time
        from supervisor import privileges
        reader, writer = os.pipe()
        is_up, say_up = os.pipe()
        if os.fork() == 0:
            # The parent that dies.
            parent = os.getpid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, lambda *_: (os.write(writer, b"told"), os._exit(0)))
                privileges.die_with_parent(parent)
                privileges.die_with_parent(parent, signal.SIGTERM)
                os.write(say_up, b"x")
                time.sleep(30)
            os.read(is_up, 1)
            os.kill(parent, signal.SIGKILL)
        os.close(writer)
        print(os.read(reader, 9).decode())
        """
    )
    assert said == "told"


def test_a_client_certificate_is_in_a_file_for_a_moment_only(tmp_path):
    said = program(
        f"""
        import os, ssl, tempfile
        tempfile.tempdir = {str(tmp_path)!r}
        from workers.proxy.teleport.contexts import load_identity
        try:
            load_identity(ssl.create_default_context(), b"no certificate", b"no key")
        except ssl.SSLError as error:
            print("read", os.listdir({str(tmp_path)!r}))
        """
    )
    assert said == "read []"


def test_memory_cannot_be_sealed_and_that_is_an_error_like_others():
    said = program(
        """
        from supervisor import handover, sealed
        try:
            sealed.seal("x", b"")
        except OSError as error:
            print(error.strerror)
        """
    )
    assert "cannot" not in said
    assert "sealed" in said


def test_who_has_connected_is_read_from_the_kernels_answer():
    answer = (0).to_bytes(4, sys.byteorder) + (501).to_bytes(4, sys.byteorder) + bytes(68)
    assert uid_of_xucred(answer) == 501
    with pytest.raises(OSError, match="does not say"):
        uid_of_xucred(b"")


def test_signals_that_macos_lacks_are_not_needed():
    assert program("from ipc.orphan import ORPHAN_SIGNAL; print(int(ORPHAN_SIGNAL))") == str(
        int(signal.SIGUSR2)
    )

"""No secret is ever in a log: a whole run at debug level, searched for everything that is one."""

import base64
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare_clusters import cluster_in, copy_login
from far_bed import DNS_SERVER, FORWARD_PORT, far_bed, forward_proxy
from private_bed import Bed, read_exactly, wait_until
from second_factors import Waiting, fresh_code, mfa, started, terminal

pytestmark = [pytest.mark.root, pytest.mark.e2e]

HOSTS = {f"teleport.{name}.test": [f"192.0.2.{10 + index}"]
         for index, name in enumerate(("main", "second", "sign"))}  # fmt: skip
ROOT = """
[[clusters]]
name = "{name}.test"
proxy_addr = "teleport.{name}.test:3080"
mfa_devices = {devices}
[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"
session_mfa = {session_mfa}
"""
CLUSTERS = "".join(
    ROOT.format(name=name, devices=devices, session_mfa="true" if devices != "[]" else "false")
    for name, devices in (("main", "[]"), ("second", '["totp"]'), ("sign", '["sso"]'))
)
CONFIG = """
[dns]
upstream = ["{dns}"]
os_integration = "none"
[teleport]
ca_file = "{ca_file}"
[supervisor]
restart_max = 1000
restart_window_seconds = 1
"""
# The supervisor, with a copy of the keys of its bus for the test.
SUPERVISOR = """
import json, os
from supervisor import configure, main
make = configure.make_keys
def make_keys(proxies):
    keys = make(proxies)
    with open(os.environ["BUS_KEYS"], "w") as file:
        json.dump({slot: [found.public, found.secret] for slot, found in keys.items()}, file)
    return keys
configure.make_keys = make_keys
main.main()
"""
USER, PASSWORD = "forwarduser", "canary-forward-password-7c1e"
FORWARD_PROXY = f"http://{USER}:{PASSWORD}@127.0.0.1:{FORWARD_PORT}"
# Where a secret was put: the file's name is in it.
CANARY = "canary-3f9a"


class Secrets:
    """What must not be found, with a word for it that may be shown."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {CANARY: "a canary", PASSWORD: "the forward proxy's password"}
        both = f"{USER}:{PASSWORD}".encode()
        self.known[base64.b64encode(both).decode().rstrip("=")] = "the Proxy-Authorization"

    def take_files(self, home: Path) -> None:
        """The lines of every key, and the secret of one-time passwords."""
        for path in (path for path in home.rglob("*") if path.is_file()):
            text = path.read_text(errors="replace")
            if "PRIVATE KEY" in text:
                for line in re.findall(r"[A-Za-z0-9+/]{24,}", text.replace("\\n", "\n")):
                    self.known[line[:24]] = f"a line of {path.name}"
        self.known[(home / "totp-secret").read_text().strip()] = "the one-time password's secret"

    def found_in(self, text: str) -> set[str]:
        return {what for secret, what in self.known.items() if secret in text}


class Run:
    """VNet at debug level, behind a forward proxy that wants a password."""

    def __init__(self, bed: Bed, home: Path, log: Path) -> None:
        self.bed = bed
        self.home = home
        self.clusters_home = bed.directory / "clusters"
        self.secrets = Secrets()
        self.reasons: set[str] = set()
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def address(self, cluster: str) -> str:
        return self.bed.resolve(f"echo.teleport.{cluster}.test", server=DNS_SERVER)[0]

    def echo_works(self) -> bool:
        try:
            with self.bed.connect(self.address("main"), 7) as end:
                end.sendall(b"hello")
                return read_exactly(end, 5) == b"hello"
        except (OSError, AssertionError):
            return False

    def is_refused(self) -> bool:
        try:
            self.bed.connect(self.address("main"), 7).close()
        except ConnectionRefusedError:
            return True
        except (OSError, AssertionError):
            pass
        return False

    def has_read_its_home(self) -> None:
        """Returns when the proxies have read what is in the home now.

        Another login comes or goes, and what came before it has been read with it.
        """
        there, away = (self.home / f"teleport.sign.test.{end}" for end in ("yaml", "away"))
        was_there = there.exists()
        (there if was_there else away).rename(away if was_there else there)

        def is_seen() -> bool:
            profiles = {cluster["profile"] for cluster in self.bed.status()["clusters"]}
            return ("teleport.sign.test" in profiles) != was_there

        wait_until(is_seen, "the home is read")

    @contextlib.contextmanager
    def fault(self, line: str) -> Iterator[None]:
        """A fault of the clusters, whose own home is another."""
        before = self.bed.environment
        self.bed.environment = before | {"TELEPORT_HOME": str(self.clusters_home)}
        try:
            with self.bed.faults(line):
                self.bed.environment = before
                yield
                self.bed.environment = before | {"TELEPORT_HOME": str(self.clusters_home)}
        finally:
            self.bed.environment = before

    @contextlib.contextmanager
    def changed(self, path: Path, content: bytes) -> Iterator[None]:
        """A credential file with another content for a while."""
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            yield
        finally:
            path.write_bytes(before)


@contextlib.contextmanager
def a_run(log_format: str) -> Iterator[Run]:
    with contextlib.ExitStack() as closing:
        bed = closing.enter_context(far_bed(HOSTS))
        clusters_home = bed.directory / "clusters"
        places = {f"{name.split('.')[1]}.test": found[0] for name, found in HOSTS.items()}
        closing.enter_context(cluster_in(bed, CLUSTERS, clusters_home, places))
        # A copy is the user's, so that nothing writes the files while they are changed.
        home = bed.directory / "tsh"
        shutil.copytree(clusters_home, home)
        closing.enter_context(forward_proxy(bed, f"BasicAuth {USER} {PASSWORD}"))
        config, keys, log = (bed.directory / name for name in ("c.toml", "keys.json", "v.log"))
        config.write_text(CONFIG.format(dns=DNS_SERVER, ca_file=clusters_home / "web-ca.pem"))
        options = ["--config", str(config), "--run-dir", bed.environment["VNET_RUN_DIR"]]
        options += ["--state-dir", str(bed.directory / "state")]
        options += ["--log-level", "debug", "--log-format", log_format]
        env = {"TELEPORT_HOME": str(home), "BUS_KEYS": str(keys)}
        env |= {"HTTPS_PROXY": FORWARD_PROXY, "NO_PROXY": ""}
        bed.logs.append(log)
        closing.enter_context(
            bed.running(sys.executable, "-c", SUPERVISOR, *options, env=env, log_name="v")
        )
        bed.environment |= {"TELEPORT_HOME": str(home)}
        run = Run(bed, home, log)
        run.secrets.take_files(clusters_home)
        bed.wait_for_health("healthy")
        for slot, (_, secret) in json.loads(keys.read_text()).items():
            run.secrets.known[secret] = f"the bus key of {slot}"
        yield run


def credential_files(run: Run) -> list[Path]:
    found = [path for path in run.home.rglob("*") if path.is_file()]
    profile = "teleport.main.test"
    return [path for path in found if profile in str(path) or path.name == "current-profile"]


def use_second_factors(run: Run) -> None:
    bed = run.bed
    for cluster in ("second", "sign"):
        target = run.address(cluster)
        command = (
            sys.executable,
            "-c",
            f"import socket; socket.create_connection(({target!r}, 7))",
        )
        with started(bed, *command) as waiting:
            prompt = f"app echo in {cluster}.test waits for a second factor"
            wait_until(lambda prompt=prompt: prompt in run.log, "a prompt")
            if cluster == "second":
                give_code(run, waiting)
            else:
                sign_on(run, waiting)


def give_code(run: Run, waiting: Waiting) -> None:
    wrong = "918273"
    code = fresh_code(run.bed, "second")
    run.secrets.known |= {code: "a one-time password", wrong: "a wrong one-time password"}
    assert mfa(run.bed, wrong, code)[0] == 0
    assert waiting.result()[0] == 0


def sign_on(run: Run, waiting: Waiting) -> None:
    with terminal(run.bed, "vnet", "mfa") as screen:
        screen.expect("decline): ")
        page = re.findall(r"in your browser: (https://\S+)\s", screen.text)[-1]
        trust = str(run.bed.directory / "clusters" / "web-ca.pem")
        steps = ("curl", "-sSL", "--noproxy", "*", "--cacert", trust, "-o", "/dev/null")
        run.bed.output(*steps, page)
        screen.expect("answered in the browser")
        assert waiting.result()[0] == 0
    run.secrets.known["secret_key"] = "the secret of a single sign-on"


def leave_canaries(run: Run, kinds: int) -> None:
    """In each file at its end, and then in the place of its middle, its end and its whole.

    `kinds` of these are done.
    """
    for path in credential_files(run):
        before = path.read_bytes()
        canary = f"{CANARY}-{path.name}".encode()
        middle = len(before) // 2
        versions = [
            before + b"\n# " + canary + b"\n" + canary + b": " + canary + b"\n",
            before + b"\nnew_field: [" + canary,
            before[:middle] + canary + b"\xff\xfe" + before[middle:],
            before[:middle] + canary,
            canary,
        ]
        for content in versions[-kinds:]:
            with run.changed(path, content):
                run.has_read_its_home()
                with contextlib.suppress(OSError, AssertionError):
                    run.bed.connect(run.address("main"), 7, timeout=5).close()
                run.reasons |= set(run.bed.status()["reasons"])
    # What was put back in between has been read with what came after it.
    run.has_read_its_home()


def let_the_login_expire(run: Run) -> None:
    def states() -> set[str]:
        return {c["state"] for c in run.bed.status()["clusters"] if c["name"] == "main.test"}

    profile = "teleport.main.test"
    with run.fault("expire_login"):
        copy_login(run.clusters_home, run.home, profile)
        run.secrets.take_files(run.home)
        wait_until(lambda: states() == {"login_expired"}, "the login has expired")
        run.is_refused()
    copy_login(run.clusters_home, run.home, profile)
    run.secrets.take_files(run.home)
    wait_until(lambda: states() == {"ok"}, "there is a login")


# What is logged does not depend on the form, so one of them has the long run.
@pytest.mark.parametrize(("log_format", "kinds"), [("text", 5), ("json", 1)])
def test_no_secret_is_in_any_log_or_status(log_format, kinds):
    with a_run(log_format) as run:
        bed = run.bed
        for fault in ("refuse_certs", "deny no certificate for you"):
            with run.fault(fault):
                wait_until(run.is_refused, "no certificate is issued")
        wait_until(run.echo_works, "the app answers")
        use_second_factors(run)
        leave_canaries(run, kinds)
        let_the_login_expire(run)
        for slot in ("proxy-0", "proxy-1", "ssh", "dns", "tun"):
            pid = bed.worker(slot)["pid"]
            bed.kill(pid)
            bed.wait_for_successor(slot, pid)
        wait_until(run.echo_works, "the app answers again")
        commands = (("status", "--json"), ("status",), ("logs",), ("logs", "--json"))
        outputs = [run.log, *(bed.output("vnet", *command) for command in commands)]
        assert "debug" in run.log.lower()
        found = set().union(*(run.secrets.found_in(text) for text in outputs))
        assert not found
        # That was noticed; how often depends on when the status is looked at.
        assert len(run.reasons) > 1, run.reasons
        assert len(run.secrets.known) > 20


def test_a_secret_would_be_found(tmp_path):
    """Otherwise the test above would prove nothing."""
    secrets = Secrets()
    key = tmp_path / "alice.key"
    line = base64.b64encode(os.urandom(45)).decode()
    key.write_text(f"-----BEGIN PRIVATE KEY-----\n{line}\n-----END PRIVATE KEY-----\n")
    (tmp_path / "totp-secret").write_text("JBSWY3DPEHPK3PXP\n")
    secrets.take_files(tmp_path)
    assert secrets.found_in(f"cannot read {line}!") == {"a line of alice.key"}
    assert secrets.found_in("JBSWY3DPEHPK3PXP") == {"the one-time password's secret"}
    assert not secrets.found_in("nothing")

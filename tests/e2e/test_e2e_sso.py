"""Single sign-on as a second factor: the user opens a page, and the program goes on."""

import contextlib
import re
from collections.abc import Iterator

import pytest
from demo_bed import demo_bed
from private_bed import Bed, wait_until
from second_factors import Terminal, Waiting, fresh_code, started, terminal

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ROOT = """
[[clusters]]
name = "{name}.test"
proxy_addr = "teleport.{name}.test:3080"
mfa_devices = {devices}
[[clusters.apps]]
name = "page"
uri = "tcp://hello.backend.internal:80"
session_mfa = true
"""
DEVICES = {"only": '["sso"]', "both": '["totp", "sso"]', "again": '["sso"]', "local": '["sso"]'}
CLUSTERS = "".join(ROOT.format(name=name, devices=text) for name, text in DEVICES.items())
LOOPBACK = "127.0.0.1:"


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """One demo; each test has a cluster of its own."""
    with demo_bed(CLUSTERS) as bed:
        bed.wait_for_health("healthy")
        yield bed


def curl(cluster: str) -> tuple[str, ...]:
    # One address family: refused by one address, curl would ask for another second factor by the next.
    return ("curl", "-4", "-sS", "--max-time", "100", f"http://page.teleport.{cluster}.test/")


@contextlib.contextmanager
def waiting_program(bed: Bed, cluster: str) -> Iterator[tuple[Waiting, Terminal]]:
    """A program that waits for a second factor, and a terminal with `vnet mfa`."""
    with started(bed, *curl(cluster)) as waiting:
        # Without --watch, who comes before the prompt finds none.
        opened = f"app page in {cluster}.test waits for a second factor"
        wait_until(lambda: opened in bed.log(), "a prompt")
        with terminal(bed, "vnet", "mfa") as screen:
            yield waiting, screen


def ca_file(bed: Bed) -> str:
    return f"{bed.environment['TELEPORT_HOME']}/web-ca.pem"


def page_of(screen: Terminal) -> str:
    """The newest address that the user is told to open."""
    screen.expect("open this address in your browser: ")
    screen.expect("decline): ")
    return re.findall(r"in your browser: (https://\S+)\s", screen.text)[-1]


def browse(bed: Bed, page: str) -> str:
    """Follows redirects as a browser does; where it ends."""
    options = ("-sSL", "--cacert", ca_file(bed), "-o", "/dev/null", "-w", "%{url_effective}")
    return bed.output("curl", *options, page)


def listeners(bed: Bed) -> set[str]:
    """Addresses on 127.0.0.1 at which somebody listens for TCP."""
    lines = bed.output("ss", "-Htln").splitlines()
    return {line.split()[3] for line in lines if line.split()[3].startswith(LOOPBACK)}


def test_a_page_in_the_browser_lets_the_program_go_on(bed):
    before = listeners(bed)
    with waiting_program(bed, "only") as (waiting, screen):
        screen.expect("app page in only.test waits for a second factor of alice")
        page = page_of(screen)
        assert page.startswith("https://teleport.only.test:3080/sso-demo?request=")
        assert len(listeners(bed) - before) == 1
        assert not waiting.is_over
        end = "https://teleport.only.test:3080/web/msg/info/login_success"
        assert browse(bed, page) == end
        screen.expect("app page in only.test: answered in the browser")
        screen.expect("app page can be used now")
        status, text = waiting.result()
        assert (status, "Hello from VNet" in text) == (0, True), text
    wait_until(lambda: listeners(bed) == before, "nobody listens any more")
    assert "Hello from VNet" in bed.output(*curl("only"))
    assert "secret_key" not in bed.log()


def test_a_code_does_as_well_where_there_is_one(bed):
    before = listeners(bed)
    with waiting_program(bed, "both") as (waiting, screen):
        screen.expect("open this address in your browser: ")
        screen.expect("browser, or code (empty: later, n: decline): ")
        screen.type(f"{fresh_code(bed, 'both')}\n")
        screen.expect("app page can be used now")
        assert "Hello from VNet" in waiting.result()[1]
    wait_until(lambda: listeners(bed) == before, "nobody listens any more")


def test_a_sign_on_that_is_refused_can_be_tried_again(bed):
    before = listeners(bed)
    with waiting_program(bed, "again") as (waiting, screen):
        page = page_of(screen)
        with bed.faults("mfa_refused"):
            assert browse(bed, page).endswith("/web/msg/error/login")
            screen.expect("not taken: single sign-on failed: a fault refuses every sign-on")
        another = page_of(screen)
        assert another != page
        assert browse(bed, another).endswith("/web/msg/info/login_success")
        screen.expect("app page can be used now")
        assert "Hello from VNet" in waiting.result()[1]
    wait_until(lambda: listeners(bed) == before, "nobody listens any more")


def test_a_local_proxy_asks_in_its_own_terminal(bed):
    config = bed.directory / "local.toml"
    config.write_text(f'[teleport]\nca_file = "{ca_file(bed)}"\n')
    command = ("vnet", "proxy", "--config", str(config), "page", "--cluster", "local.test")
    with terminal(bed, *command) as screen:
        assert browse(bed, page_of(screen)).endswith("/web/msg/info/login_success")
        screen.expect(" -> page.teleport.local.test")
        address = re.findall(r"(127\.0\.0\.1:\d+) -> page", screen.text)[-1]
        assert "Hello from VNet" in bed.output("curl", "-sS", f"http://{address}/")
        screen.type("\x03")

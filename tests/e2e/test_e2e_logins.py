"""Logins that come, end, change and are renewed while VNet runs, as `tsh` writes them."""

import contextlib
import itertools
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare_clusters import UPSTREAM_ADDRESS, cluster_in, copy_login, remove_login, upstream_dns
from demo_bed import bare_bed, supervisor_in
from private_bed import AT_ONCE_SECONDS, Bed, read_all, read_exactly, wait_until

from ipc.addresses import owner_of_name

pytestmark = [pytest.mark.root, pytest.mark.e2e]

MAIN, OLD, REQUESTS = "proxy.main.test", "proxy.old.test", "proxy.requests.test"
CLUSTERS = f"""
[[clusters]]
name = "main.test"
proxy_addr = "{MAIN}:3080"
custom_dns_zones = ["zone.test"]

[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"
public_addr = "echo.zone.test"
"""
OTHERS = f"""
[[clusters]]
name = "old.test"
proxy_addr = "{OLD}:0"
home_layout = 16

[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"

[[clusters]]
name = "requests.test"
proxy_addr = "{REQUESTS}:0"
roles = ["access"]
access_requests = [{{ id = "4711", roles = ["admin"] }}]

[[clusters.apps]]
name = "wanted"
uri = "tcp://echo.backend.internal:7"
allowed_roles = ["admin"]

[[clusters.apps]]
name = "forbidden"
uri = "tcp://echo.backend.internal:7"
public_addr = "forbidden.in-no-zone.test"
allowed_roles = ["owner"]
"""
CONFIG = """
[dns]
upstream = ["127.0.0.54"]
os_integration = "none"
[teleport]
ca_file = "{ca_file}"
"""
APP = "echo.zone.test"
SERVER = "100.64.0.2"
# Generous: a login that is gone is believed after a second. VNet looks at the home without being told
# of a change after 30 s.
SOON_SECONDS = 15.0


@pytest.fixture(scope="module")
def module_bed() -> Iterator[Bed]:
    """VNet with one profile, and the home of two more that it does not know."""
    with bare_bed() as bed, contextlib.ExitStack() as closing:
        hosts = bed.directory / "hosts"
        hosts.write_text(
            "".join(f"127.0.0.1 {name}\n" for name in ("localhost", MAIN, OLD, REQUESTS))
        )
        bed.output("mount", "--bind", str(hosts), "/etc/hosts")
        closing.enter_context(upstream_dns(bed))
        authorities = []
        for text, home in ((CLUSTERS, home_of(bed)), (OTHERS, others_of(bed))):
            closing.enter_context(cluster_in(bed, text, home))
            authorities.append((home / "web-ca.pem").read_text())
        ca_file = bed.directory / "web-ca.pem"
        ca_file.write_text("".join(authorities))
        closing.enter_context(supervisor_in(bed, config=CONFIG.format(ca_file=ca_file)))
        bed.wait_for_health("healthy")
        yield bed


@pytest.fixture
def bed(module_bed) -> Iterator[Bed]:
    """The same, in good health before and after; no worker may have been restarted."""
    module_bed.wait_for_health("healthy")
    pids = [worker["pid"] for worker in module_bed.status()["workers"]]
    yield module_bed
    assert [worker["pid"] for worker in module_bed.status()["workers"]] == pids


def home_of(bed: Bed) -> Path:
    return Path(bed.environment["TELEPORT_HOME"])


def others_of(bed: Bed) -> Path:
    return bed.directory / "others"


def clusters(bed: Bed) -> dict[str, tuple[str, str]]:
    """User and state of each cluster in the status."""
    return {c["name"]: (c["user"], c["state"]) for c in bed.status()["clusters"]}


def reasons(bed: Bed) -> str:
    return " ".join(bed.status()["reasons"])


def resolve(bed: Bed, name: str) -> str:
    return bed.resolve(name, server=SERVER)[0]


def leads_upstream(bed: Bed, name: str) -> None:
    """Returns once a name is none of VNet's any more: each proxy notices that for itself."""
    wait_until(lambda: resolve(bed, name) == UPSTREAM_ADDRESS, f"no {name}", SOON_SECONDS)


def leads_upstream_everywhere(bed: Bed, host: str) -> None:
    """Returns once no proxy takes names below `host` for VNet's."""
    proxies = sum(name.startswith("proxy-") for name in bed.pids())
    for index in range(proxies):
        names = (f"nobodys-{number}.{host}" for number in itertools.count())
        leads_upstream(bed, next(n for n in names if owner_of_name(n, proxies) == index))


def exchange(end: socket.socket, text: bytes) -> None:
    end.sendall(text)
    assert read_exactly(end, len(text)) == text


def echo_works(bed: Bed, name: str) -> bool:
    """Whether a new connection to a name, which may have no address yet, or to an address works."""
    address = name
    if name[-1].isalpha():
        answer = bed.ask(name, server=SERVER)
        if answer.header.rcode != 0 or not answer.rr:
            return False
        address = str(answer.rr[0].rdata)
    try:
        with bed.connect(address, 7) as end:
            end.sendall(b"hello")
            end.shutdown(socket.SHUT_WR)
            return read_all(end) == b"hello"
    except OSError:
        return False


def is_refused(bed: Bed, address: str) -> bool:
    try:
        bed.connect(address, 7).close()
    except ConnectionRefusedError:
        return True
    return False


def assert_cut_soon(end: socket.socket) -> None:
    """The connection is reset, not ended."""
    end.settimeout(SOON_SECONDS)
    with pytest.raises(ConnectionResetError):
        end.recv(1)


def works_soon(bed: Bed, name: str) -> None:
    wait_until(lambda: echo_works(bed, name), f"{name} works", SOON_SECONDS)


def write_slowly(source: Path, target: Path) -> None:
    """Copies a file as it is written without care: empty at first, then half, then whole."""
    data = source.read_bytes()
    with target.open("wb") as file:
        for part in (b"", data[: len(data) // 2], data[len(data) // 2 :]):
            file.write(part)
            file.flush()
            # So that each state is seen; what VNet waits for after a change is shorter.
            time.sleep(0.07)


# -- logout, another user --


def test_a_logout_cuts_connections_and_the_next_login_works_by_itself(bed):
    address = resolve(bed, APP)
    with bed.connect(address, 7) as end:
        exchange(end, b"hello")
        with bed.faults("logout"):
            assert_cut_soon(end)
            leads_upstream(bed, APP)
            bed.wait_for_health("degraded")
            # Degraded with the first proxy that notices; the list is another one's.
            wait_until(lambda: clusters(bed) == {}, "no cluster is listed", SOON_SECONDS)
            assert "run tsh login" in reasons(bed)
            assert bed.seconds_until_refused(address, 7) < AT_ONCE_SECONDS
    wait_until(lambda: not logged_out(bed), "there is a login again")
    works_soon(bed, address)
    works_soon(bed, APP)
    assert resolve(bed, APP) == address


def logged_out(bed: Bed) -> bool:
    return not (home_of(bed) / "current-profile").exists()


def test_a_logout_from_one_cluster_is_shown_as_no_login(bed):
    """`tsh logout --proxy` takes the keys of one profile and may leave its file."""
    home = home_of(bed)
    with bed.connect(resolve(bed, APP), 7) as end:
        exchange(end, b"hello")
        (home / "keys").rename(home / "away")
        try:
            assert_cut_soon(end)
            bed.wait_for_health("degraded")
            without = {"main.test": ("alice", "no_login")}
            wait_until(lambda: clusters(bed) == without, "the status says so")
            assert f"run tsh login --proxy={MAIN}:3080" in reasons(bed)
            leads_upstream(bed, APP)
            assert resolve(bed, "example.org") == UPSTREAM_ADDRESS
        finally:
            (home / "away").rename(home / "keys")
    works_soon(bed, APP)


def test_another_user_gets_no_connection_of_the_one_before(bed):
    address = resolve(bed, APP)
    with bed.connect(address, 7) as end:
        exchange(end, b"hello")
        with bed.faults("other_user bob"):
            assert_cut_soon(end)
            wait_until(lambda: clusters(bed) == {"main.test": ("bob", "ok")}, "bob is logged in")
            # The cluster refuses certificates of one user to the other.
            works_soon(bed, address)
            assert resolve(bed, APP) == address
            bobs = bed.connect(address, 7)
    with bobs:
        assert_cut_soon(bobs)
    wait_until(lambda: clusters(bed) == {"main.test": ("alice", "ok")}, "alice is logged in")
    works_soon(bed, APP)


# -- renewal, expiry --


@contextlib.contextmanager
def nothing_is_cut(bed: Bed) -> Iterator[None]:
    """A connection that is made before the block works during it and after it."""
    with bed.connect(resolve(bed, APP), 7) as end:
        exchange(end, b"before")
        yield
        exchange(end, b"after")
        end.shutdown(socket.SHUT_WR)
        assert read_all(end) == b""


def test_a_new_login_of_the_same_user_cuts_nothing(bed):
    key = home_of(bed) / "keys" / MAIN / "alice.key"
    before = key.read_bytes()
    with nothing_is_cut(bed):
        with bed.faults("other_user alice"):
            wait_until(lambda: key.read_bytes() != before, "there is a new key")
            works_soon(bed, APP)
        works_soon(bed, APP)


def test_a_login_that_is_written_slowly_over_the_old_one_cuts_nothing(bed):
    home, earlier = home_of(bed), bed.directory / "earlier"
    key = home / "keys" / MAIN / "alice.key"
    shutil.copytree(home, earlier)
    first = key.read_bytes()
    with bed.faults("other_user alice"):
        wait_until(lambda: key.read_bytes() != first, "there is a new key")
    works_soon(bed, APP)
    with nothing_is_cut(bed):
        copy_login(earlier, home, MAIN, write_slowly)
        assert key.read_bytes() == first
        works_soon(bed, APP)
        wait_until(lambda: clusters(bed) == {"main.test": ("alice", "ok")}, "the login is good")
        # The embedded cluster renews certificates only of keys that it has made last.
        with bed.faults("other_user alice"):
            wait_until(lambda: key.read_bytes() != first, "there is a new key")
    shutil.rmtree(earlier)


def test_an_expired_login_cuts_nothing_and_refuses_what_is_new(bed):
    address = resolve(bed, APP)
    with nothing_is_cut(bed):
        with bed.faults("expire_login"):
            expired = {"main.test": ("alice", "login_expired")}
            wait_until(lambda: clusters(bed) == expired, "the status says so")
            assert bed.health() == "degraded"
            assert f"run tsh login --proxy={MAIN}:3080" in reasons(bed)
            assert resolve(bed, APP) == address
            assert resolve(bed, "example.org") == UPSTREAM_ADDRESS
            told = len(refusals(bed, "the login expired at"))

            def is_refused_as_expired() -> bool:
                is_told = len(refusals(bed, "the login expired at")) > told
                return is_refused(bed, address) and is_told

            # The status has it from the first proxy that notices, perhaps not from the address's: that
            # may refuse before because the cluster has cut it off.
            wait_until(is_refused_as_expired, "it is noticed, and the log says so", SOON_SECONDS)
            assert bed.seconds_until_refused(address, 7) < AT_ONCE_SECONDS
            assert "run tsh login" in refusals(bed, "the login expired at")[-1]
        wait_until(lambda: clusters(bed)["main.test"][1] == "ok", "the login is renewed")
        works_soon(bed, address)
        works_soon(bed, APP)
    assert resolve(bed, APP) == address


def refusals(bed: Bed, reason: str) -> list[str]:
    """Lines of the log that say that a connection was refused for this reason."""
    lines = bed.log().splitlines()
    return [line for line in lines if "refused (not_logged_in)" in line and reason in line]


# -- further profiles --


@contextlib.contextmanager
def another_profile(
    bed: Bed, name: str, copy: Callable[[Path, Path], object] = shutil.copyfile
) -> Iterator[Path]:
    """The home with one more of the profiles that lie ready; its file."""
    home = home_of(bed)
    copy_login(others_of(bed), home, name, copy)
    try:
        yield home / f"{name}.yaml"
    finally:
        remove_login(home, name)
        wait_until(lambda: list(clusters(bed)) == ["main.test"], "the profile is gone")
        # The list is one proxy's; a login that comes next must not be its successor for another.
        leads_upstream_everywhere(bed, name)


def test_a_profile_that_comes_is_used_though_it_is_written_slowly(bed):
    name = f"echo.{OLD}"
    assert resolve(bed, name) == UPSTREAM_ADDRESS
    with nothing_is_cut(bed):
        with another_profile(bed, OLD, write_slowly):
            works_soon(bed, name)
            states = {"main.test": ("alice", "ok"), "old.test": ("alice", "ok")}
            wait_until(lambda: clusters(bed) == states, "the status shows it")
            bed.wait_for_health("healthy")
            with bed.connect(resolve(bed, name), 7) as end:
                exchange(end, b"hello")
                remove_login(home_of(bed), OLD)
                assert_cut_soon(end)
            copy_login(others_of(bed), home_of(bed), OLD)
            works_soon(bed, name)
        leads_upstream(bed, name)


def test_a_home_as_tsh_wrote_it_up_to_version_16_is_read(bed):
    with another_profile(bed, OLD):
        keys = home_of(bed) / "keys" / OLD
        assert (keys / "alice-x509.pem").exists()
        assert not (keys / "alice.crt").exists()
        works_soon(bed, f"echo.{OLD}")


def test_access_requests_of_the_login_count_for_apps_too(bed):
    with another_profile(bed, REQUESTS):
        works_soon(bed, f"wanted.{REQUESTS}")
        # Nobody's request: the cluster shows it to nobody.
        assert resolve(bed, "forbidden.in-no-zone.test") == UPSTREAM_ADDRESS


def test_keys_of_a_later_version_in_a_profile_are_ignored(bed):
    def with_more(source: Path, target: Path) -> None:
        data = source.read_bytes()
        if source.suffix == ".yaml":
            data += b"new_setting: [1, {a: b}]\nnew_text: |\n  lines\n"
        target.write_bytes(data)

    with another_profile(bed, OLD, with_more):
        works_soon(bed, f"echo.{OLD}")
        bed.wait_for_health("healthy")


PIV_KEY = """-----BEGIN PIV YUBIKEY PRIVATE KEY-----
eyJzZXJpYWxfbnVtYmVyIjoxMjM0NTY3OCwic2xvdF9rZXkiOjE1NH0=
-----END PIV YUBIKEY PRIVATE KEY-----
"""


def cut_profile(profile: Path) -> None:
    profile.write_bytes(profile.read_bytes()[:20])


def empty_profile(profile: Path) -> None:
    profile.write_bytes(b"")


def odd_profile(profile: Path) -> None:
    profile.write_bytes(b"{[\0")


def cut_certificate(profile: Path) -> None:
    certificate = next((profile.parent / "keys" / profile.stem).glob("*-x509.pem"))
    certificate.write_bytes(certificate.read_bytes()[:200])


def foreign_key(profile: Path) -> None:
    keys = profile.parent / "keys"
    shutil.copyfile(keys / MAIN / "alice.key", keys / profile.stem / "alice")


def no_authority(profile: Path) -> None:
    shutil.rmtree(profile.parent / "keys" / profile.stem / "cas")


def hardware_key(profile: Path) -> None:
    (profile.parent / "keys" / profile.stem / "alice").write_text(PIV_KEY)


@pytest.mark.parametrize(
    ("spoil", "state", "reason"),
    [
        (cut_profile, "no_login", f"{OLD}.yaml: it has no user: run tsh login"),
        (empty_profile, "no_login", f"{OLD}.yaml: it is empty or no YAML map: run tsh login"),
        (odd_profile, "no_login", f"{OLD}.yaml: it is no YAML: run tsh login"),
        (cut_certificate, "no_login", "holds no certificate: run tsh login"),
        (foreign_key, "no_login", "run tsh login"),
        (no_authority, "no_login", "no host authority of cluster old.test"),
        (hardware_key, "hardware_key", "hardware token"),
    ],
)
def test_a_profile_that_cannot_be_used_is_reported_and_disturbs_no_other(bed, spoil, state, reason):
    home = home_of(bed)
    with nothing_is_cut(bed):
        # As a whole: nothing of it must have been good for a moment.
        ready = bed.directory / "ready"
        copy_login(others_of(bed), ready, OLD)
        (ready / "keys" / MAIN).mkdir(parents=True)
        shutil.copyfile(home / "keys" / MAIN / "alice.key", ready / "keys" / MAIN / "alice.key")
        spoil(ready / f"{OLD}.yaml")
        copy_login(ready, home, OLD)
        # Its file may have been seen while it was empty.
        wait_until(lambda: reason in reasons(bed), "the status says why")
        assert bed.health() == "degraded"
        assert sorted(state for _, state in clusters(bed).values()) == sorted(["ok", state])
        assert echo_works(bed, APP)
        for name in ("example.org", OLD, f"echo.{OLD}"):
            assert resolve(bed, name) == UPSTREAM_ADDRESS
        remove_login(home, OLD)
        shutil.rmtree(ready)
        bed.wait_for_health("healthy")
        wait_until(lambda: list(clusters(bed)) == ["main.test"], "the profile is gone")

"""The Debian package: what is in it, and what is left of it; the service of an installation elsewhere."""

import re
import subprocess
from pathlib import Path

import pytest
from booted_bed import BootedBed
from far_end import UNIT, USER, copy_in, install
from private_bed import wait_until

from supervisor.exits import ExitStatus

ONE_TEST = pytest.mark.timeout(180, func_only=True)
pytestmark = [pytest.mark.root, pytest.mark.e2e, pytest.mark.system, ONE_TEST]

# What systemd and dpkg write about everything they do.
NOISY = ("/var/log", "/var/cache", "/var/lib/dpkg", "/var/lib/systemd", "/var/tmp", "/tmp")
OPT = "/opt/vnet"


def field(package: Path, name: str) -> str:
    done = subprocess.run(
        ["dpkg-deb", "--field", package, name], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def contents(package) -> list[tuple[str, str, str]]:
    """(mode, owner/group, path) of each file of the package."""
    done = subprocess.run(
        ["dpkg-deb", "--contents", package], capture_output=True, text=True, check=True
    )
    return [
        (words[0], words[1], words[5].split(" -> ")[0].removeprefix("."))
        for words in (line.split(None, 5) for line in done.stdout.splitlines())
    ]


def test_everything_in_the_package_is_roots_and_for_all_to_read(contents):
    for mode, owner, path in contents:
        assert owner == "root/root", path
        assert re.fullmatch(r"[d-]r[w-][x-]r-[x-]r-[x-]|lrwxrwxrwx", mode), (mode, path)


def test_the_package_has_what_it_promises_and_nothing_compiles_later(contents):
    paths = {path for _, _, path in contents}
    for wanted in (
        "/usr/bin/vnet",
        "/usr/bin/vnet-supervisor",
        "/usr/lib/systemd/system/vnet@.service",
        "/usr/lib/systemd/system/vnet-repair.service",
        "/usr/share/polkit-1/rules.d/50-vnet.rules",
        "/usr/share/bash-completion/completions/vnet",
        "/usr/share/zsh/vendor-completions/_vnet",
        "/usr/share/fish/vendor_completions.d/vnet.fish",
        "/usr/share/man/man1/vnet.1.gz",
        "/usr/share/man/man1/vnet-status.1.gz",
        "/usr/share/man/man1/vnet-service.1.gz",
        "/usr/share/man/man5/vnet.toml.5.gz",
        "/usr/share/man/man8/vnet-supervisor.8.gz",
        "/usr/share/doc/vnet/copyright",
        "/usr/share/doc/vnet/README.md",
        "/usr/share/doc/vnet/metrics.md",
        "/usr/share/doc/vnet/schema/status.json",
        "/usr/share/doc/vnet/examples/grafana/vnet.json",
        "/usr/share/doc/vnet/examples/prometheus/vnet.rules.yml",
        "/etc/vnet/vnet.toml",
    ):
        assert wanted in paths
    outside = [p for p in paths if not p.startswith(("/usr", "/etc")) and p != "/"]
    assert outside == []
    sources = [path for path in paths if path.endswith(".py") and "/site-packages/" in path]
    assert len(sources) > 500
    for source in sources:
        folder, _, name = source.rpartition("/")
        compiled = f"{folder}/__pycache__/{name.removesuffix('.py')}.cpython-3"
        assert any(path.startswith(compiled) for path in paths), source


def test_a_linter_has_nothing_to_say_about_the_man_pages(package, unpack, tmp_path):
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path], check=True)
    pages = sorted((tmp_path / "usr/share/man").glob("*/*.gz"))
    assert len(pages) > 15
    subprocess.run(["gunzip", *pages], check=True)
    lint = [unpack("mandoc") / "usr/bin/mandoc", "-T", "lint", "-W", "warning"]
    lint += [page.with_suffix("") for page in pages]
    done = subprocess.run(lint, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_the_package_names_the_python_it_was_built_for(package):
    depends = field(package, "Depends")
    found = re.search(r"python3 \(>= 3\.(\d+)\), python3 \(<< 3\.(\d+)~\)", depends)
    assert found
    assert int(found[2]) == int(found[1]) + 1
    assert "libseccomp2" in depends


def new_files(bed: BootedBed, before: dict[str, object]) -> set[str]:
    """What is there now and was not before, but for the address book and its like."""
    return {
        path
        for path in bed.files(*NOISY).keys() - before.keys()
        if not path.startswith("/var/lib/vnet/")
    }


def wait_until_it_answers(bed: BootedBed) -> None:
    # Nobody is logged in: it runs, and says that this is missing.
    wait_until(lambda: bed.health() in ("healthy", "degraded"), "VNet runs")


def test_of_a_purged_package_nothing_is_left(bare, package):
    bed, before = bare, bare.files(*NOISY)
    install(bed, package)
    installed = bed.files(*NOISY)
    # The configuration that comes with it: every key, commented out.
    assert "valid" in bed.output("vnet-supervisor", "--check-config")
    # A tsh home at another place needs a drop-in.
    bed.path("/etc/vnet/environment").write_text("TELEPORT_HOME=/srv/tsh\n")
    bed.output("vnet", "service", "install", "--user", USER)
    drop_in = bed.path(f"/etc/systemd/system/{UNIT}.d/vnet.conf")
    assert drop_in.exists()
    assert "-/srv/tsh" in bed.property_of(UNIT, "ReadWritePaths").split()
    wait_until_it_answers(bed)
    assert bed.property_of(UNIT, "UnitFileState") == "enabled"
    written = {path for path in new_files(bed, installed) if path.startswith("/usr")}
    assert written == set()

    bed.output("dpkg", "--remove", "vnet")
    assert bed.health() == "none"
    assert not bed.path("/sys/class/net/vnet0").exists()
    assert not bed.path("/run/vnet").exists()
    left = {"/etc/vnet", "/etc/vnet/vnet.toml", "/etc/vnet/environment", "/var/lib/vnet"}
    assert new_files(bed, before) == left

    said = bed.output("dpkg", "--purge", "vnet")
    assert "nothing of VNet remains" in said
    after = bed.files(*NOISY)
    assert after == before
    assert list(bed.path("/var/lib/dpkg/info").glob("vnet*")) == []
    assert UNIT not in bed.systemctl("list-units", "--all", "vnet@*")


def test_an_upgrade_of_the_package_replaces_what_runs(bare, package):
    bed = bare
    install(bed, package)
    bed.systemctl("start", UNIT)
    wait_until_it_answers(bed)
    before = bed.property_of(UNIT, "MainPID")
    install(bed, package)
    assert bed.property_of(UNIT, "ActiveState") == "active"
    assert bed.property_of(UNIT, "MainPID") != before
    assert bed.property_of("vnet@bob.service", "ActiveState") == "inactive"


def move_to_opt(bed: BootedBed, package: Path) -> None:
    """An environment as an administrator would make one, and no package."""
    bed.output("dpkg-deb", "--extract", copy_in(bed, package), "/var/tmp/unpacked")
    bed.output("mv", "/var/tmp/unpacked/usr/lib/vnet", OPT)
    for program in ("vnet", "vnet-supervisor"):
        bed.output("sed", "-i", f"1s|.*|#!{OPT}/bin/python -I|", f"{OPT}/bin/{program}")


def test_the_service_of_an_installation_elsewhere_comes_and_goes(bare, package):
    bed = bare
    move_to_opt(bed, package)
    before = bed.files(*NOISY, "/var/lib/vnet")
    bed.output(f"{OPT}/bin/vnet", "service", "install", "--user", USER)
    wait_until_it_answers(bed)
    unit, rule = "/etc/systemd/system/vnet@.service", "/etc/polkit-1/rules.d/50-vnet.rules"
    link = f"/etc/systemd/system/multi-user.target.wants/{UNIT}"
    repair = {
        "/etc/systemd/system/vnet-repair.service",
        "/etc/systemd/system/multi-user.target.wants/vnet-repair.service",
    }
    assert new_files(bed, before) - {"/var/lib/vnet"} == {unit, rule, link} | repair
    # Again: what is there is its own.
    bed.output(f"{OPT}/bin/vnet", "service", "install", "--user", USER)

    changed = bed.path(unit)
    changed.write_text(changed.read_text().replace("LimitCORE=0", "LimitCORE=1"))
    again = bed.run(f"{OPT}/bin/vnet", "service", "install", "--user", USER)
    assert again.returncode == ExitStatus.CONFLICT
    assert unit.encode() in again.stderr
    gone = bed.run(f"{OPT}/bin/vnet", "service", "uninstall")
    assert gone.returncode == ExitStatus.CONFLICT
    assert unit.encode() in gone.stderr
    assert bed.property_of(UNIT, "ActiveState") == "inactive"
    after = bed.files(*NOISY, "/var/lib/vnet")
    assert after.keys() - before.keys() == {unit}

    bed.output(f"{OPT}/bin/vnet", "service", "install", "--user", USER, "--no-start", "--force")
    bed.output(f"{OPT}/bin/vnet", "service", "uninstall")
    assert bed.files(*NOISY, "/var/lib/vnet") == before


def test_what_others_can_change_is_not_run_as_root(bare, package):
    bed = bare
    move_to_opt(bed, package)
    bed.output("chown", USER, f"{OPT}/bin")
    done = bed.run(f"{OPT}/bin/vnet", "service", "install", "--user", USER)
    assert done.returncode == ExitStatus.NOT_PERMITTED
    assert f"{OPT}/bin can be changed".encode() in done.stderr
    assert not bed.path("/etc/systemd/system/vnet@.service").exists()
    assert bed.run(f"{OPT}/bin/vnet", "service", "install", "--user", USER, user=USER).returncode

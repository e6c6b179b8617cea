"""The two programs named resolvconf, as Debian has them, in a private network with its own `/etc` and `/usr`."""

import shutil
from collections.abc import Iterator

import pytest
from private_bed import Bed
from test_e2e_resolver import kill_at_each_step, own_etc

pytestmark = [pytest.mark.root, pytest.mark.e2e, pytest.mark.system]


@pytest.fixture(params=["resolvconf", "openresolv"])
def bed(request, unpack) -> Iterator[Bed]:
    """One with this package, which writes its `/etc/resolv.conf`."""
    package = unpack(request.param)
    # As dpkg puts them where /sbin and /lib are links into /usr.
    for name in ("sbin", "lib"):
        shutil.copytree(package / name, package / "usr" / name, dirs_exist_ok=True, symlinks=True)
    with own_etc() as made:
        made.output("cp", "-a", f"{package}/etc/.", "/etc")
        made.output(
            *("mount", "-t", "overlay", "-o", f"lowerdir={package}/usr:/usr", "none", "/usr")
        )
        yield made


def test_killed_at_each_step_everything_is_restored(bed):
    kill_at_each_step(bed, "resolvconf", least=9)

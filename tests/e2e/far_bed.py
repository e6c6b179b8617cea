"""A private network whose Teleport proxies are not on its loopback interface, and forward proxies.

No forward proxy is ever used for a loopback address, so proxies need other ones here.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from demo_bed import bare_bed, supervisor_in
from private_bed import Bed, wait_until

# VNet's DNS server.
DNS_SERVER = "100.64.0.2"
FORWARD_PORT = 8888
FORWARD_PROXY = f"http://127.0.0.1:{FORWARD_PORT}"

_CONFIG = """
[dns]
upstream = ["127.0.0.54"]
os_integration = "none"
[teleport]
{trust}
"""
_TINYPROXY = """
Port {port}
Listen 127.0.0.1
Allow 127.0.0.1
LogLevel Connect
LogFile "{log}"
{lines}
"""
# Only who is nobody, as the forward proxy is, gets out.
_FIREWALL = """
table inet firewall {
  chain output {
    type filter hook output priority 0
    ip daddr 192.0.2.0/24 tcp flags & (syn | ack) == syn meta skuid != nobody reject with tcp reset
  }
}
"""
_numbers = itertools.count()


@contextlib.contextmanager
def far_bed(hosts: Mapping[str, Sequence[str]]) -> Iterator[Bed]:
    """A private network without VNet where these host names have these addresses.

    The last address of each is there, for a server to listen at; what is sent to others is lost.
    """
    with bare_bed() as bed:
        for *lost, own in hosts.values():
            bed.output("ip", "address", "add", own, "dev", "lo", *["nodad"] * (":" in own))
            for address in lost:
                # Packets for an address that is not ours, coming in again, are dropped.
                bed.output("ip", "route", "add", address, "dev", "lo")
        lines = [f"{address} {name}" for name, found in hosts.items() for address in found]
        for name, text in (("hosts", "\n".join([*lines, ""])), ("nsswitch.conf", "hosts: files\n")):
            path = bed.directory / name
            path.write_text(text)
            bed.output("mount", "--bind", str(path), f"/etc/{name}")
        yield bed


@contextlib.contextmanager
def vnet_in(
    bed: Bed, home: Path, *, https_proxy: str = "", no_proxy: str = "", trust: str = ""
) -> Iterator[Path]:
    """VNet in such a network; its log.

    Forward proxies of our own environment are not used. The web certificates of the home's clusters
    are trusted unless `trust` says something else.
    """
    name = f"vnet-{next(_numbers)}"
    trust = trust or f'ca_file = "{home}/web-ca.pem"'
    names = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")
    env = dict.fromkeys((*names, *map(str.lower, names)), "")
    env |= {"HTTPS_PROXY": https_proxy, "NO_PROXY": no_proxy, "TELEPORT_HOME": str(home)}
    with supervisor_in(bed, config=_CONFIG.format(trust=trust), name=name, env=env):
        yield bed.directory / f"{name}.log"


@contextlib.contextmanager
def firewall(bed: Bed) -> Iterator[None]:
    """Lets nobody but the forward proxy connect to 192.0.2.0/24."""
    bed.output("nft", "-f", "-", stdin=_FIREWALL.encode())
    try:
        yield
    finally:
        bed.output("nft", "delete", "table", "inet", "firewall")


@contextlib.contextmanager
def forward_proxy(bed: Bed, *lines: str) -> Iterator[Path]:
    """A tinyproxy with these lines in its configuration; its log."""
    name = f"tinyproxy-{next(_numbers)}"
    path, log = bed.directory / f"{name}.conf", bed.directory / f"{name}.requests"
    log.touch()
    log.chmod(0o666)
    path.write_text(_TINYPROXY.format(port=FORWARD_PORT, log=log, lines="\n".join(lines)))
    with bed.running("tinyproxy", "-d", "-c", str(path), user="nobody", log_name=name):
        wait_until(lambda: listens(bed, "127.0.0.1", FORWARD_PORT), "tinyproxy listens")
        yield log
    # It ends a moment after the program that has brought it into the network.
    wait_until(lambda: not listens(bed, "127.0.0.1", FORWARD_PORT), "tinyproxy has ended")


def listens(bed: Bed, address: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        bed.connect(address, port).close()
    except OSError:
        return False
    return True

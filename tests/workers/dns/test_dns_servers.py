"""Which upstream servers are used."""

import pytest
from dns_fakes import make_network, packed

from ipc.messages import Upstream
from workers.dns.servers import select_servers


def select(*addresses: str, limit: int = 9, port: int = 53) -> list[str]:
    upstream = [Upstream(address=packed(address), port=port) for address in addresses]
    return [str(server) for server in select_servers(upstream, make_network(), limit)]


@pytest.mark.parametrize(
    "own",
    [
        "100.64.0.1",
        "100.64.0.2",
        "100.99.1.2",
        "fd60:67ec:4325::1",
        "fd60:67ec:4325::2",
        "fd60:67ec:4325::6440:7",
        "::ffff:100.64.0.2",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "ff02::fb",
    ],
)
def test_server_that_leads_back_to_us_is_left_out(own: str) -> None:
    assert select(own, "192.0.2.1") == ["192.0.2.1 port 53"]


def test_each_server_is_asked_once_in_the_given_order() -> None:
    assert select("192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1", "127.0.0.53") == [
        "192.0.2.1 port 53",
        "2001:db8::1 port 53",
        "127.0.0.53 port 53",
    ]


def test_list_is_cut_at_the_limit() -> None:
    assert select("192.0.2.1", "192.0.2.2", "192.0.2.3", limit=2) == [
        "192.0.2.1 port 53",
        "192.0.2.2 port 53",
    ]


def test_impossible_entries_are_left_out() -> None:
    assert select("192.0.2.1", port=0) == []
    assert select_servers([Upstream(address=b"12345")], make_network(), 9) == ()


def test_link_local_server_keeps_its_interface() -> None:
    upstream = [Upstream(address=packed("fe80::1"), scope="eth0")]
    (server,) = select_servers(upstream, make_network(), 9)
    assert (server.scope, str(server)) == ("eth0", "fe80::1%eth0 port 53")

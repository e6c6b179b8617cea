"""The data plane that rewrites packets, through the tests of the other one, and what is different.

The imported tests run here a second time, in a demo of this module's own.
"""

import socket
import threading
from collections.abc import Iterator

import pytest
from demo_bed import SUPERVISOR, bare_bed, demo_bed, stop
from private_bed import AT_ONCE_SECONDS, Bed, read_all, read_exactly, wait_until
from shared_cluster import CLUSTER, CONFIG
from test_e2e_connections import (  # noqa: F401
    test_200_short_connections_in_parallel_all_succeed,
    test_a_client_that_half_closes_still_gets_its_answer,
    test_a_client_that_resets_is_noticed_by_the_app,
    test_a_port_that_the_app_does_not_have_is_refused_at_once,
    test_a_server_that_half_closes_first_still_hears_its_client,
    test_a_slow_reader_loses_nothing,
    test_an_address_that_vnet_never_gives_out_is_refused_at_once,
    test_an_app_that_resets_ends_the_connection,
    test_an_unassigned_address_is_refused_at_once,
    test_both_directions_at_once_carry_every_byte,
    test_each_port_of_a_multi_port_app_is_its_own,
)
from test_e2e_crashes import (  # noqa: F401
    DATA,
    ECHO,
    echo,
    kill_worker,
    test_a_killed_proxy_resets_its_connections_and_none_hangs,
    test_a_proxy_killed_between_verdict_and_accept_costs_one_reconnect,
    test_a_transfer_survives_the_death_of_tun,
    test_after_a_killed_dns_the_next_query_works,
    test_after_a_killed_idle_proxy_the_next_connect_works,
    test_after_a_killed_tun_new_connections_work,
    test_no_killed_worker_leaves_a_descriptor_of_the_supervisor_behind,
)
from test_e2e_dns import (  # noqa: F401
    test_a_question_that_is_cut_off_is_a_format_error,
    test_tcp_gives_the_same_answer_as_udp,
    test_the_dns_server_answers_on_its_ipv6_address_too,
)
from test_e2e_programs import (  # noqa: F401
    FIREWALL,
    test_curl_works_over_each_ip_version,
    test_iperf3_moves_a_bounded_amount_both_ways,
    test_ping_is_answered_by_an_assigned_address,
    test_udp_to_a_virtual_address_is_refused_at_once,
)
from test_e2e_takeover import (  # noqa: F401
    Service,
    idle_connections,
    links,
    require_reset,
    seconds_until_echo,
    service_in,
    test_idle_connections_are_reset_when_the_supervisor_is_killed,
    wait_until_gone,
)

pytestmark = [pytest.mark.root, pytest.mark.e2e]

REWRITING = {"VNET_DATA_PLANE": "rewriting"}


@pytest.fixture(scope="module")
def session_bed() -> Iterator[Bed]:
    """In place of the demo that the tests of other modules share."""
    with demo_bed(CLUSTER, CONFIG, env=REWRITING) as bed:
        yield bed


@pytest.fixture
def shaken(bed) -> Bed:
    """Its workers may be killed."""
    return bed


@pytest.fixture
def doomed() -> Iterator[Bed]:
    """A demo whose supervisor may be killed."""
    with demo_bed(CLUSTER, CONFIG, env=REWRITING) as bed:
        bed.wait_for_health("healthy")
        yield bed


def test_status_says_that_packets_are_rewritten(bed):
    assert bed.status()["network"]["data_plane"] == "rewriting"
    assert "vnet-inner" not in bed.output("ip", "link")


def own_ports(bed: Bed) -> list[int]:
    """The ports on which proxies listen at the interface's own IPv4 address."""
    rows = bed.output("ss", "-tlp", "--numeric", "--no-header").splitlines()
    places = [row.split()[3] for row in rows if "vnet-proxy" in row or "vnet-ssh" in row]
    return [
        int(place.rpartition(":")[2]) for place in places if place.startswith("100.64.0.1%vnet0:")
    ]


def talk_directly(bed: Bed, port: int, interface: str) -> bytes:
    with bed.open_socket(timeout=AT_ONCE_SECONDS) as end:
        if interface:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        end.connect(("100.64.0.1", port))
        return end.recv(1)


@pytest.mark.parametrize("interface", ["", "vnet0"])
def test_what_comes_to_a_listener_past_the_device_is_reset(bed, interface):
    assert echo(bed) == b"hello"
    listening = own_ports(bed)
    assert len(listening) >= 1
    bed.wait_for_counters()
    total = bed.status()["connections"]["total"]
    for port in listening:
        with pytest.raises(ConnectionResetError):
            talk_directly(bed, port, interface)
    bed.wait_for_counters()
    assert bed.status()["connections"]["total"] == total


def test_a_transfer_goes_on_while_every_worker_and_the_program_are_replaced(bed):
    """Nothing that is carried over is known to workers alone."""
    received: list[bytes] = []
    before = bed.status()
    with bed.connect(ECHO, 7, timeout=60) as end:

        def send() -> None:
            end.sendall(DATA)
            end.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        received.append(read_exactly(end, 1 << 20))
        bed.output("vnet", "restart", "all", "--drain", timeout=120)
        assert echo(bed) == b"hello"
        # A tun that has the table from the new program, and this listener in it.
        bed.wait_for_successor("tun", kill_worker(bed, "tun"))
        received.append(read_all(end))
        thread.join()
    assert b"".join(received) == DATA
    assert bed.status()["supervisor"]["pid"] == before["supervisor"]["pid"]
    assert {worker["name"] for worker in bed.status()["workers"]} >= {"tun", "dns"}
    assert f"VNet {before['supervisor']['version']} goes on after" in bed.log()


def test_a_firewall_that_drops_unsolicited_input_has_to_let_the_interface_in(bed):
    rule = 'iifname "lo" accept'
    assert rule in FIREWALL
    with_interface = FIREWALL.replace(rule, 'iifname { "lo", "vnet0" } accept')
    bed.output("nft", "-f", "-", stdin=with_interface.encode())
    try:
        for version in ("-4", "-6"):
            assert "Hello" in bed.output("curl", "-sS", version, "http://page.corp.example.test/")
        assert echo(bed, b"through the firewall") == b"through the firewall"
    finally:
        bed.output("nft", "flush", "ruleset")


@pytest.fixture
def service(doomed) -> Iterator[Service]:
    doomed.output("vnet", "stop")
    wait_until_gone(doomed)
    with service_in(doomed) as service:
        yield service


def test_the_link_stays_up_when_a_killed_supervisor_is_started_again(service):
    bed = service.bed
    before = links(bed)["vnet0"]
    ends = idle_connections(bed, 3)
    began = service.kill_supervisor()
    require_reset(ends, began)
    seconds_until_echo(bed, began)
    bed.wait_for_health("healthy")
    assert links(bed)["vnet0"] == before
    # Device, plan and four sockets of the DNS server.
    assert all(len(names) == 6 for names in service.events("stored")[1:])
    assert bed.log().count("stays up") == 1
    assert bed.status()["network"]["data_plane"] == "rewriting"


def start_without_namespaces(bed: Bed, name: str, wish: str) -> list[str]:
    """The command line of a supervisor that may do everything but make namespaces."""
    path = bed.directory / f"{name}.toml"
    path.write_text('[dns]\nupstream = ["127.0.0.54"]\nos_integration = "none"\n')
    options = ["--run-dir", str(bed.directory / "run"), "--state-dir", str(bed.directory / "state")]
    program = ["env", f"VNET_DATA_PLANE={wish}", SUPERVISOR, "--config", str(path), *options]
    return ["setpriv", "--bounding-set=-sys_admin", *program]


def test_where_namespaces_are_forbidden_packets_are_rewritten():
    with bare_bed() as bed:
        forced = bed.run(*start_without_namespaces(bed, "forced", "namespace"))
        assert forced.returncode == 4
        assert b"CAP_SYS_ADMIN is needed" in forced.stderr
        wrong = bed.run(*start_without_namespaces(bed, "wrong", "nonsense"))
        assert wrong.returncode == 2
        assert b"VNET_DATA_PLANE: 'nonsense' is none of auto, namespace, rewriting" in wrong.stderr
        bed.logs.append(bed.directory / "auto.log")
        with bed.running(*start_without_namespaces(bed, "auto", "auto"), log_name="auto") as vnet:
            try:
                wait_until(lambda: bed.health() not in ("none", "starting"), "VNet works")
                network = bed.status()["network"]
                assert network["data_plane"] == "rewriting"
                assert bed.log().count("a network namespace cannot be made") == 1
                server = network["dns_addresses"][0]
                assert bed.resolve("vnet-diag-0123456789abcdef.test", server=server) == [server]
                assert bed.seconds_until_refused("100.64.9.9", 80) < AT_ONCE_SECONDS
            finally:
                stop(vnet)

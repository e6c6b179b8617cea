"""Databases by name: real servers, and real clients that know nothing of VNet."""

import contextlib
import hashlib
import os
import signal
import subprocess
from base64 import b32hexencode
from collections.abc import Iterator

import pytest
from database_servers import (
    MARIADB_PORT,
    MARIADB_USER,
    POSTGRES,
    POSTGRES_PORT,
    mariadb_in,
    postgres_in,
)
from demo_bed import demo_bed, supervisor_pid
from private_bed import AT_ONCE_SECONDS, Bed, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]

CLUSTERS = """
[[clusters]]
name = "data.test"
proxy_addr = "teleport.data.test:3080"
databases = [
  { name = "stock", protocol = "postgres", uri = "127.0.0.1:5432" },
  { name = "Orders", protocol = "postgres", uri = "127.0.0.1:5432" },
  { name = "Stock of 2024 (Łódź)", protocol = "postgres", uri = "127.0.0.1:5432" },
  { name = "shop", protocol = "mysql", uri = "127.0.0.1:3306" },
  { name = "Shop of 2024", protocol = "mysql", uri = "127.0.0.1:3306" },
  { name = "pg-away", protocol = "postgres", uri = "127.0.0.1:9" },
  { name = "my-away", protocol = "mysql", uri = "127.0.0.1:9" },
  { name = "documents", protocol = "mongodb", uri = "127.0.0.1:9" },
  { name = "secret", protocol = "postgres", uri = "127.0.0.1:5432", allowed_roles = ["dba"] },
]

[[clusters]]
name = "branch.test"
leaf_of = "data.test"
databases = [
  { name = "branch-stock", protocol = "postgres", uri = "127.0.0.1:5432" },
  { name = "branch-shop", protocol = "mysql", uri = "127.0.0.1:3306" },
]

[[clusters]]
name = "balanced.test"
proxy_addr = "teleport.balanced.test:3080"
tls_routing = false
conn_upgrade_required = true
databases = [
  { name = "stock", protocol = "postgres", uri = "127.0.0.1:5432" },
  { name = "shop", protocol = "mysql", uri = "127.0.0.1:3306" },
]
"""
BELOW = "db.teleport.data.test"
STOCK, SHOP = f"stock.{BELOW}", f"shop.{BELOW}"
ROWS = 200_000


def hashed(name: str) -> str:
    """The identifier of a database whose name is no DNS label."""
    digest = hashlib.sha256(name.encode()).digest()
    return b32hexencode(digest[:8]).decode().rstrip("=").lower()


POSTGRES_NAMES = [
    STOCK,
    f"{hashed('stock')}.{BELOW}",
    f"Orders.{BELOW}",
    f"{hashed('Stock of 2024 (Łódź)')}.{BELOW}",
    # Those of a leaf are below its own proxy's name and below that of the root.
    "branch-stock.db.branch.test",
    f"branch-stock.{BELOW}",
    "stock.db.teleport.balanced.test",
]
MARIADB_NAMES = [
    SHOP,
    f"{hashed('shop')}.{BELOW}",
    f"{hashed('Shop of 2024')}.{BELOW}",
    "branch-shop.db.branch.test",
    f"branch-shop.{BELOW}",
    "shop.db.teleport.balanced.test",
]


@pytest.fixture(scope="module")
def servers() -> Iterator[Bed]:
    with demo_bed(CLUSTERS) as bed, postgres_in(bed), mariadb_in(bed):
        yield bed


@pytest.fixture
def bed(servers) -> Bed:
    servers.wait_for_health("healthy")
    return servers


def psql_command(*commands: str, host: str = STOCK, port: int = 5432, more: str = "") -> list[str]:
    """`psql` for one connection; `more` are further words of the connection string."""
    where = f"host={host} port={port} user=postgres dbname=postgres {more}"
    options = [word for command in commands for word in ("-c", command)]
    return ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", where, *options]


def psql(bed: Bed, *commands: str, stdin: bytes = b"", **where) -> str:
    return bed.output(*psql_command(*commands, **where), stdin=stdin, timeout=90).strip()


def mariadb_command(*words: str, host: str = SHOP, port: int = 3306) -> list[str]:
    # Newer clients insist on TLS, which there is none of inside Teleport's.
    where = ["-h", host, "-P", str(port), "-u", MARIADB_USER, "-D", "shop"]
    return ["mariadb", "--no-defaults", "--skip-ssl", "-N", "-B", *where, *words]


def mariadb(bed: Bed, *commands: str, stdin: bytes = b"", **where) -> str:
    words = ["-e", ";".join(commands)] if commands else []
    return bed.output(*mariadb_command(*words, **where), stdin=stdin, timeout=90).strip()


def on_server(bed: Bed, query: str) -> str:
    """What PostgreSQL itself says, without VNet."""
    return psql(bed, query, host="127.0.0.1", port=POSTGRES_PORT)


def on_mariadb_server(bed: Bed, query: str) -> str:
    return mariadb(bed, query, host="127.0.0.1", port=MARIADB_PORT)


# -- PostgreSQL --


@pytest.mark.parametrize("host", POSTGRES_NAMES)
def test_psql_queries_a_database_by_each_of_its_names(bed, host):
    before = bed.status()["connections"]["bytes_received"]
    assert psql(bed, "select 6 * 7", host=host) == "42"
    wait_until(lambda: bed.status()["connections"]["bytes_received"] > before, "it came by VNet")


@pytest.mark.parametrize("port", [22, 80, 3080, 65535])
def test_a_database_has_every_port(bed, port):
    assert psql(bed, "select 6 * 7", port=port) == "42"
    assert mariadb(bed, "select 6 * 7", port=port) == "42"


def test_psql_and_mariadb_work_over_ipv6(bed):
    [stock], [shop] = bed.resolve(STOCK, "AAAA"), bed.resolve(SHOP, "AAAA")
    assert psql(bed, "select 6 * 7", more=f"hostaddr={stock}") == "42"
    assert mariadb(bed, "select 6 * 7", host=shop) == "42"


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer"])
def test_psql_does_without_tls_of_its_own_if_it_may(bed, mode):
    assert psql(bed, "select 6 * 7", more=f"sslmode={mode}") == "42"


def test_psql_that_insists_on_tls_of_its_own_says_why_it_fails(bed):
    done = bed.run(*psql_command("select 1", more="sslmode=require"))
    assert done.returncode == 2
    assert b"server does not support SSL, but SSL was required" in done.stderr


def test_psql_copies_much_both_ways(bed):
    rows = "".join(f"{number}\t{number * 7919}\n" for number in range(ROWS))
    copied = psql(
        bed,
        "create temporary table copied (a bigint, b bigint)",
        "copy copied from stdin",
        "copy (select * from copied order by a) to stdout",
        stdin=rows.encode(),
    )
    assert (
        hashlib.sha256(copied.encode()).digest() == hashlib.sha256(rows.strip().encode()).digest()
    )


def test_pgbench_finds_no_error_with_5_clients(bed):
    where = ["-h", STOCK, "-U", "postgres", "postgres"]
    program = str(POSTGRES / "pgbench")
    bed.output(program, "--initialize", "--quiet", *where)
    report = bed.output(program, "-n", "-c", "5", "-j", "2", "-t", "20", *where)
    assert "number of transactions actually processed: 100/100" in report


@contextlib.contextmanager
def sleeping_psql(
    bed: Bed, name: str, more: str = ""
) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A psql whose query runs for long, and the server's id of its session."""
    query = f"select pg_sleep(600) /* {name} */"
    with bed.running(*psql_command(query, more=more), log_name=name) as process:
        look = f"select pid from pg_stat_activity where query = '{query}' and state = 'active'"
        yield process, wait_until(lambda: on_server(bed, look), "the query runs")


def output_of(bed: Bed, name: str) -> str:
    return (bed.directory / f"{name}.log").read_text()


def test_ctrl_c_in_psql_cancels_the_query(bed):
    with sleeping_psql(bed, "cancelled") as (process, pid):
        os.kill(supervisor_pid(process), signal.SIGINT)
        assert process.wait(20) == 1
    assert "canceling statement due to user request" in output_of(bed, "cancelled")
    assert on_server(bed, f"select state from pg_stat_activity where pid = {pid}") != "active"


def test_a_session_that_the_server_ends_ends_for_psql(bed):
    with sleeping_psql(bed, "terminated") as (process, pid):
        on_server(bed, f"select pg_terminate_backend({pid})")
        assert process.wait(20) == 2
    assert "terminating connection due to administrator command" in output_of(bed, "terminated")


def test_a_psql_that_is_killed_is_noticed_by_the_server(bed):
    watchful = "options='-c client_connection_check_interval=100ms'"
    with sleeping_psql(bed, "killed", watchful) as (process, pid):
        os.kill(supervisor_pid(process), signal.SIGKILL)
        look = f"select count(*) from pg_stat_activity where pid = {pid}"
        wait_until(lambda: on_server(bed, look) == "0", "the session is over")


def test_a_session_that_the_cluster_closes_ends_and_later_ones_work(bed):
    with sleeping_psql(bed, "closed") as (process, _pid):
        with bed.faults("close_apps"):
            assert process.wait(20) == 2
        assert "server closed the connection unexpectedly" in output_of(bed, "closed")

    def works() -> bool:
        return bed.run(*psql_command("select 1")).returncode == 0

    wait_until(works, "it works again")


def test_a_postgresql_server_that_is_down_ends_the_connection_with_a_reason(bed):
    done = bed.run(*psql_command("select 1", host=f"pg-away.{BELOW}"))
    assert done.returncode == 2
    assert b"Connect call failed" in done.stderr


# -- MariaDB --


@pytest.mark.parametrize("host", MARIADB_NAMES)
def test_mariadb_queries_a_database_by_each_of_its_names(bed, host):
    before = bed.status()["connections"]["bytes_received"]
    assert mariadb(bed, "select 6 * 7, database(), current_user()", host=host).split("\t") == [
        *("42", "shop", f"{MARIADB_USER}@%"),
    ]
    wait_until(lambda: bed.status()["connections"]["bytes_received"] > before, "it came by VNet")


def test_mariadb_moves_much_both_ways(bed):
    rows = [f"({number},repeat('{number:06}',4))" for number in range(ROWS // 2)]
    sent = (
        "create or replace table moved (a int, b text);"
        f"insert into moved values {','.join(rows)};"
        "select * from moved order by a"
    )
    received = mariadb(bed, stdin=sent.encode())
    expected = "\n".join(f"{number}\t{f'{number:06}' * 4}" for number in range(ROWS // 2))
    assert hashlib.sha256(received.encode()).digest() == hashlib.sha256(expected.encode()).digest()


def test_a_query_that_another_mariadb_kills_ends(bed):
    query = "select sleep(600) /* killed */"
    look = f"select id from information_schema.processlist where info = '{query}'"
    with bed.running(*mariadb_command("--comments", "-e", query), log_name="killed-mariadb") as it:
        number = wait_until(lambda: on_mariadb_server(bed, look), "the query runs")
        mariadb(bed, f"kill {number}")
        assert it.wait(20) == 1
    assert "Lost connection to" in output_of(bed, "killed-mariadb")


def test_a_mariadb_server_that_is_down_ends_the_connection_with_a_reason(bed):
    done = bed.run(*mariadb_command("-e", "select 1", host=f"my-away.{BELOW}"))
    assert done.returncode == 1
    assert b"Connect call failed" in done.stderr


# -- names and refusals --


@pytest.mark.parametrize("kind", ["A", "AAAA"])
@pytest.mark.parametrize("identifier", ["nothing", hashed("nothing"), "documents", "secret"])
def test_dig_finds_no_name_for_what_is_no_database_of_ours(bed, identifier, kind):
    """Which is: no database at all, one of a protocol VNet does not carry, one of somebody else."""
    answer = bed.output("dig", "+noall", "+comments", kind, f"{identifier}.{BELOW}")
    assert "status: NXDOMAIN" in answer


def test_the_log_says_which_protocol_is_not_carried(bed):
    bed.ask(f"documents.{BELOW}")
    line = "database documents has protocol mongodb, which VNet does not carry"
    wait_until(lambda: line in bed.log(), "a log line")


def test_getent_finds_a_database_and_its_name_by_its_address(bed):
    address = bed.resolve(STOCK)[0]
    assert bed.output("getent", "ahostsv4", STOCK).split()[0] == address
    assert bed.output("getent", "hosts", address).split() == [address, STOCK]


def test_certificates_that_are_refused_refuse_the_connection_at_once(bed):
    address = bed.resolve(f"branch-stock.{BELOW}")[0]
    with bed.faults("deny no databases today"):
        # Certificates that VNet has already go on being used.
        bed.output("vnet", "restart", bed.owner_of(address))
        bed.wait_for_health("healthy")

        def is_refused() -> bool:
            return bed.seconds_until_refused(address, 5432) < AT_ONCE_SECONDS

        wait_until(is_refused, "it is refused")
        wait_until(lambda: "no databases today" in bed.log(), "a log line")
    wait_until(
        lambda: bed.run(*psql_command("select 1", host=f"branch-stock.{BELOW}")).returncode == 0,
        "it works again",
    )

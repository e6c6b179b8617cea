"""Database servers on the loopback interface of a private network, run by nobody."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from demo_bed import scratch_directory
from private_bed import Bed, wait_until

POSTGRES = next(Path("/usr/lib/postgresql").glob("*/bin"), Path("/usr/lib/postgresql"))
POSTGRES_PORT = 5432
MARIADB_PORT = 3306
# The user everybody may log in as, without a password: Teleport knows who it is.
MARIADB_USER = "alice"


@contextlib.contextmanager
def postgres_in(bed: Bed) -> Iterator[None]:
    """A PostgreSQL server; its user is postgres."""
    with _data_directory() as data:
        bed.output(
            *(str(POSTGRES / "initdb"), "-D", data, "-A", "trust", "-U", "postgres"),
            *("--no-sync", "--no-instructions", "--encoding=UTF8", "--locale=C"),
            user="nobody",
        )
        options = ["-D", data, "-k", "", "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        program = str(POSTGRES / "postgres")
        with bed.running(program, *options, user="nobody", log_name="postgres"):
            # It listens before it serves: until then clients are told that it is starting up.
            ready = [str(POSTGRES / "pg_isready"), "-h", "127.0.0.1", "-p", str(POSTGRES_PORT)]
            wait_until(lambda: bed.run(*ready).returncode == 0, "PostgreSQL serves")
            yield


@contextlib.contextmanager
def mariadb_in(bed: Bed) -> Iterator[None]:
    """A MariaDB server with a database `shop`."""
    with _data_directory() as data:
        bed.output(
            *("mariadb-install-db", "--no-defaults", "--skip-test-db", f"--datadir={data}"),
            "--auth-root-authentication-method=normal",
            user="nobody",
        )
        first = Path(data).with_name("first.sql")
        first.write_text(
            f"create user {MARIADB_USER}@'%';\n"
            f"grant all on *.* to {MARIADB_USER}@'%';\n"
            "create database shop;\n"
        )
        options = [
            *(
                "--no-defaults",
                f"--datadir={data}",
                f"--init-file={first}",
                f"--socket={data}.sock",
            ),
            *("--bind-address=127.0.0.1", f"--port={MARIADB_PORT}", "--skip-name-resolve"),
            *("--innodb-flush-log-at-trx-commit=0", "--max-allowed-packet=64M"),
        ]
        with bed.running("mariadbd", *options, user="nobody"):
            wait_until(lambda: _listens(bed, MARIADB_PORT), "MariaDB listens")
            yield


@contextlib.contextmanager
def _data_directory() -> Iterator[str]:
    """The servers refuse to run as root, and want to make the directory themselves."""
    with scratch_directory() as directory:
        directory.chmod(0o777)
        yield str(directory / "data")


def _listens(bed: Bed, port: int) -> bool:
    try:
        bed.connect("127.0.0.1", port).close()
    except OSError:
        return False
    return True

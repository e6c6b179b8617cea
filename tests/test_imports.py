"""Imports point one way. Read from the sources, so that lazy and TYPE_CHECKING imports count too.

ipc  <--  workers/<role>, supervisor   <--  demo
(supervisor starts workers by name; its command line imports demo and the client, workers.proxy, in
functions)
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ipc", "supervisor", "workers", "demo")


def sources() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources()


def is_lazy(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imports_of(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(imported name, whether its module does without: inside a function, or for types only)."""
    lazy = {inner for outer in ast.walk(tree) if is_lazy(outer) for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in lazy
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module), node in lazy


IMPORTS = {name: list(imports_of(ast.parse(path.read_text()))) for name, path in MODULES.items()}


def ours(name: str) -> set[str]:
    return {imported for imported, _ in IMPORTS[name] if imported.split(".")[0] in PACKAGES}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_ipc_imports_nothing_else_of_ours():
    for name in MODULES:
        if within(name, "ipc"):
            assert all(within(imported, "ipc") for imported in ours(name)), name


def test_workers_import_neither_the_supervisor_nor_each_other():
    roles = ("workers.tun", "workers.dns", "workers.proxy", "workers.metrics")
    for name in MODULES:
        own = next((role for role in roles if within(name, role)), None)
        if own is None and not within(name, "workers"):
            continue
        for imported in ours(name):
            assert not within(imported, "supervisor"), (name, imported)
            assert not within(imported, "demo"), (name, imported)
            for role in roles:
                assert role == own or not within(imported, role), (name, imported)


def test_supervisor_imports_no_worker_but_the_client_in_functions_of_the_command_line():
    for name, imports in IMPORTS.items():
        for imported, is_lazy in imports:
            if within(name, "supervisor") and within(imported, "workers"):
                assert within(name, "supervisor.cli"), (name, imported)
                assert within(imported, "workers.proxy"), (name, imported)
                assert is_lazy, (name, imported)


def test_demo_is_imported_only_in_functions_of_the_command_line():
    for name, imports in IMPORTS.items():
        for imported, is_lazy in imports:
            if within(imported, "demo") and not within(name, "demo"):
                assert (name, is_lazy) == ("supervisor.cli.app", True)


def test_embedded_cluster_shares_only_the_protobuf_messages_with_our_client():
    for name in MODULES:
        if within(name, "demo"):
            for imported in ours(name):
                if within(imported, "workers"):
                    assert within(imported, "workers.proxy.teleport.pb"), (name, imported)


@pytest.mark.parametrize(
    ("library", "users"),
    [
        ("zmq", {"ipc.bus"}),
        ("pytun", {"supervisor.devices"}),
        ("multiprocessing_logging", {"ipc.logpipe"}),
        ("pickle", set()),
        ("prometheus_client", {"workers.metrics.families", "workers.metrics.page"}),
        ("fido2", {"supervisor.cli.security_key", "demo.cluster.webauthn"}),
        ("jeepney", {"workers.proxy.notification", "supervisor.osconfig.dbus"}),
    ],
)
def test_library_is_touched_in_one_place(library, users):
    found = {
        name
        for name, imports in IMPORTS.items()
        if any(within(imported, library) for imported, _ in imports)
    }
    assert found == users


def test_there_is_no_import_cycle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for imported in sorted(ours(name) & MODULES.keys()):
                visit(imported, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def loaded_by(*modules: str) -> set[str]:
    """The packages that a fresh process has loaded after these imports."""
    program = (
        f"import sys, {', '.join(modules)};"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return set(done.stdout.split())


HEAVY = {
    *("zmq", "workers", "demo", "uvloop", "paramiko", "grpclib", "google", "dnslib"),
    "prometheus_client",
}


def test_supervisor_process_loads_no_zeromq_and_no_worker():
    loaded = loaded_by("supervisor.supervisor", "supervisor.main")
    assert "supervisor" in loaded
    assert not loaded & HEAVY


def test_a_health_check_loads_no_client_and_no_event_loop():
    loaded = loaded_by("supervisor.cli.app", "supervisor.cli.control_client")
    assert "supervisor" in loaded
    assert not loaded & (HEAVY | {"asyncio", "cryptography", "fido2", "jeepney"})

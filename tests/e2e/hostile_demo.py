"""`vnet demo` with hostile code in the place of one role's workers; everything else is real.

The hostile worker does its work like the real one until it is told to attack, by something that only it
looks for in what it works on.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from demo_bed import demo_bed, scratch_directory
from private_bed import Bed
from shared_cluster import CLUSTER, CONFIG

# In the place of the interpreter that runs `-m supervisor.main`.
_SUPERVISOR = """#!{python}
import sys

sys.path.insert(0, {here!r})
from ipc.permits import Role
from supervisor import main, spawn

spawn.WORKER_MODULES[Role({role!r})] = "hostile_{role}"
del sys.argv[1:3]
main.main()
"""
_DEMO = "import sys; from supervisor.cli import app; sys.executable = sys.argv.pop(1); app.main()"


@contextlib.contextmanager
def hostile_demo(role: str, config: str = CONFIG) -> Iterator[Bed]:
    """`role` is tun, dns or proxy; its code is in `hostile_<role>`."""
    with scratch_directory() as directory:
        starter = directory / "python"
        here = str(Path(__file__).parent)
        starter.write_text(_SUPERVISOR.format(python=sys.executable, here=here, role=role))
        starter.chmod(0o755)
        program = (sys.executable, "-c", _DEMO, str(starter))
        with demo_bed(CLUSTER, config, program=program) as bed:
            yield bed

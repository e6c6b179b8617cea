"""Modules that libraries import only at their first use, imported now.

Once a worker is another user and confined it may not be able to read its own program. What is
missing here shows as a line "... is imported by a confined worker" in the log (`supervisor.spawn`).
And what they shall do without: None among `sys.modules` says that a package is not there.
"""

import _strptime  # type: ignore[import-not-found]  # noqa: F401  # datetime.strptime, for certificates
import encodings.idna  # host names in socket and ssl; brings stringprep, unicodedata
import encodings.punycode  # noqa: F401  # the same, for names that are not ASCII
import sys
from importlib.util import find_spec

# grpclib looks for this package whenever it opens a channel; None says that it is not there.
if find_spec("google.rpc") is None:
    sys.modules["google.rpc"] = None  # type: ignore[assignment]  # documented for this purpose
    sys.modules["google.rpc.status_pb2"] = None  # type: ignore[assignment]

# Paramiko takes this for `Match exec` in files of OpenSSH's client, which nobody reads here: half of the time
# that its own import takes.
sys.modules.setdefault("invoke", None)  # type: ignore[arg-type]  # documented for this purpose

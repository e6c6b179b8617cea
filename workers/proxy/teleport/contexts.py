"""TLS contexts with certificates from memory: nothing secret is ever in a file system.

Python's ssl loads certificates from paths only, so the path is that of an anonymous in-memory
file of this process, which is closed at once. MacOS has no such files: there it is one that only this user
can read, for the moment.
"""

import os
import re
import ssl
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TypeVar

from workers.proxy.teleport.credentials import certificate_pem
from workers.proxy.teleport.errors import MisconfiguredError, UnreachableError
from workers.proxy.teleport.names import (
    APP_ALPN,
    MAX_SERVER_NAME_BYTES,
    auth_alpn,
    encode_cluster_name,
)

# A WebSocket is opened over HTTP/1.1 (RFC 6455 section 4.1).
UPGRADE_ALPN = ("http/1.1",)
# OpenSSL's name for an authority in a directory: X509_LOOKUP_hash_dir(3).
_HASHED_NAME = re.compile(r"[0-9a-f]{8}\.[0-9]+")

C = TypeVar("C", bound=ssl.SSLContext)


def _harden(context: C) -> C:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Host authorities of older clusters lack a key usage, which strict checking refuses.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def load_identity(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Gives the context a client certificate and its key, both PEM.

    Raises:
        ssl.SSLError: they do not belong together.
    """
    data = certificate + b"\n" + key
    if sys.platform == "darwin":
        with tempfile.NamedTemporaryFile(prefix="vnet-") as file:
            file.write(data)
            file.flush()
            context.load_cert_chain(file.name)
        return
    descriptor = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _trust_system(context: ssl.SSLContext) -> None:
    """Trusts the system's authorities, without reading them all where that can be avoided.

    From a directory with hashed names OpenSSL reads only what a verification asks for; a bundle
    takes about 30 ms and 800 KB for each context.
    """
    paths = ssl.get_default_verify_paths()
    if not os.environ.get("SSL_CERT_FILE") and _is_hashed(paths.capath):
        context.load_verify_locations(capath=paths.capath)
    else:
        context.load_default_certs()


@cache
def _is_hashed(directory: str | None) -> bool:
    if not directory:
        return False
    try:
        with os.scandir(directory) as entries:
            return any(_HASHED_NAME.fullmatch(entry.name) for entry in entries)
    except OSError:
        return False


def _trust_file(context: ssl.SSLContext, ca_file: str) -> None:
    try:
        context.load_verify_locations(cafile=ca_file)
    except ssl.SSLError as error:
        raise MisconfiguredError(f"[teleport] ca_file {ca_file} holds no certificate") from error
    except OSError as error:
        raise MisconfiguredError(
            f"[teleport] ca_file {ca_file} cannot be read ({error.strerror})"
        ) from error


class _NamedContext(ssl.SSLContext):
    """Sends and verifies one server name, whatever name the event loop hands over.

    Given as text, Python puts a server name through IDNA, which refuses the labels of more than 63
    characters that long cluster names have. As bytes it is taken as it is, but uvloop wants text.
    """

    server_name: bytes

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002 - the signature of ssl
        server_hostname: str | bytes | None = None,  # noqa: ARG002 - replaced
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        return super().wrap_bio(incoming, outgoing, server_side, self.server_name, session)


def auth_context(
    root: str, cluster: str, authorities: Iterable[bytes], certificate: bytes, key: bytes
) -> ssl.SSLContext:
    """For the auth service of `cluster` behind the proxy's web port, which forwards by the ALPN.

    Trusts only that cluster's host authorities (DER). Raises as `cluster_context`.
    """
    return cluster_context(root, authorities, certificate, key, alpn=auth_alpn(cluster))


def cluster_context(
    root: str,
    authorities: Iterable[bytes],
    certificate: bytes,
    key: bytes,
    *,
    alpn: Sequence[str],
) -> ssl.SSLContext:
    """For any service of a cluster that takes user certificates; `authorities` (DER) are trusted.

    The server name is that of the root cluster, also for a leaf: the leaf chooses by it whose
    authority verifies the client.

    Raises:
        UnreachableError: the name of the root cluster is longer than TLS takes.
        ssl.SSLError: an authority is none, or certificate and key do not belong together.
    """
    context = _harden(_NamedContext(ssl.PROTOCOL_TLS_CLIENT))
    context.server_name = encode_cluster_name(root).encode("ascii")
    if len(context.server_name) > MAX_SERVER_NAME_BYTES:
        raise UnreachableError(f"the cluster name {root!r} is too long for TLS")
    _trust_only(context, authorities)
    context.set_alpn_protocols(list(alpn))
    load_identity(context, certificate, key)
    return context


def app_context(
    certificate: bytes,
    key: bytes,
    *,
    alpn: Sequence[str] = APP_ALPN,
    ca_file: str = "",
    insecure: bool = False,
) -> ssl.SSLContext:
    """For dialling an app or database through the proxy's web port, with its certificate.

    Trusts the system's authorities and those in `ca_file`; with `insecure`, anyone.

    Raises:
        MisconfiguredError: `ca_file` cannot be read or holds no certificate.
        ssl.SSLError: certificate and key do not belong together.
    """
    context = _web_context(ca_file=ca_file, insecure=insecure)
    context.set_alpn_protocols(list(alpn))
    load_identity(context, certificate, key)
    return context


def tunnel_app_context(
    certificate: bytes, key: bytes, authorities: Iterable[bytes], *, alpn: Sequence[str] = APP_ALPN
) -> ssl.SSLContext:
    """For dialling an app or database inside an upgraded connection.

    There the proxy shows a certificate of its cluster and for its own host name, so `authorities`
    (DER) are the root cluster's host authorities, whatever the web port's certificate is. Source:
    `lib/srv/alpnproxy/local_proxy.go`.

    Raises:
        ssl.SSLError: an authority is none, or certificate and key do not belong together.
    """
    context = _harden(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    _trust_only(context, authorities)
    context.set_alpn_protocols(list(alpn))
    load_identity(context, certificate, key)
    return context


def upgrade_context(*, ca_file: str = "", insecure: bool = False) -> ssl.SSLContext:
    """For the TLS that a load balancer before the proxy ends; a WebSocket is opened inside.

    Trust as in `app_context`. Without a client certificate, so one serves all connections.

    Raises:
        MisconfiguredError: `ca_file` cannot be read or holds no certificate.
    """
    context = _web_context(ca_file=ca_file, insecure=insecure)
    context.set_alpn_protocols(list(UPGRADE_ALPN))
    return context


def _web_context(*, ca_file: str, insecure: bool) -> ssl.SSLContext:
    context = _harden(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    _trust_system(context)
    if ca_file:
        _trust_file(context, ca_file)
    return context


def _trust_only(context: ssl.SSLContext, authorities: Iterable[bytes]) -> None:
    # All of them: while an authority is rotated, servers show certificates of either.
    context.load_verify_locations(
        cadata=b"".join(map(certificate_pem, authorities)).decode("ascii")
    )

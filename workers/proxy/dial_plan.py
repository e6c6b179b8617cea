"""All that dialling a proxy for one connection takes. Pure."""

import ssl
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TlsPlan:
    """A TLS handshake: `context` has trust, client certificate and ALPN list.

    `server_hostname` is the SNI and the name that the certificate must be for.
    """

    context: ssl.SSLContext
    server_hostname: str


@dataclass(frozen=True, slots=True)
class SshTarget:
    """A host behind the proxy: `<hostname or UUID>:<port>`, port 0 for the host's own.

    `version` is the client's, as the proxy is told it ("18.0.0").
    """

    host_port: str
    cluster: str
    version: str = ""


@dataclass(frozen=True, slots=True)
class DialPlan:
    """Where to connect, and what is put around the bytes, outermost first.

        connect --> `upgrade`: TLS that a load balancer ends, in it a WebSocket --> `tls` --> `ssh`:
        gRPC frames that the proxy takes to the host --> bytes

    Without `upgrade` `tls` is next to TCP; without both it is TCP alone (a web port that is relayed
    as it is). `host` is a name or an address; `http_proxy` is the URL of a forward proxy (RFC 9110
    section 9.3.6), or empty.
    """

    host: str
    port: int
    tls: TlsPlan | None
    upgrade: TlsPlan | None = None
    http_proxy: str = ""
    ssh: SshTarget | None = None

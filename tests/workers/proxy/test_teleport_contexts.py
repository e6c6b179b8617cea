"""TLS contexts: whom they trust, which name they check, what they offer."""

import ssl

import pytest
from auth_bed import issue, make_authority, server_context
from teleport_fakes import USER_KEY, der, pem, pem_key, user_certificate

from workers.proxy.teleport.contexts import app_context, tunnel_app_context, upgrade_context
from workers.proxy.teleport.errors import MisconfiguredError

HOST = "proxy.test"
DATABASE_ALPN = ("teleport-mysql-ping", "teleport-mysql")
PAIR = pem(user_certificate()), pem_key(USER_KEY)


def shake_hands(client_context, server_side, server_hostname=HOST):
    """The ALPN that was chosen."""
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(theirs, ours, server_hostname=server_hostname)
    server = server_side.wrap_bio(ours, theirs, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return client.selected_alpn_protocol()


def web_server(authority, names=(HOST,), alpn=(*DATABASE_ALPN, "teleport-tcp-ping", "http/1.1")):
    return server_context(authority, names=names, alpn=alpn)


def test_an_app_context_trusts_the_file_and_offers_the_protocols(tmp_path):
    web = make_authority("web")
    ca_file = tmp_path / "web.pem"
    ca_file.write_bytes(pem(web[1]))
    context = app_context(*PAIR, ca_file=str(ca_file))
    assert shake_hands(context, web_server(web)) == "teleport-tcp-ping"
    context = app_context(*PAIR, alpn=DATABASE_ALPN, ca_file=str(ca_file))
    assert shake_hands(context, web_server(web)) == "teleport-mysql-ping"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(app_context(*PAIR), web_server(web))


def test_inside_an_upgraded_connection_only_the_clusters_authorities_count(tmp_path):
    host, web = make_authority("demo.test"), make_authority("web")
    context = tunnel_app_context(*PAIR, [der(host[1])])
    assert shake_hands(context, web_server(host)) == "teleport-tcp-ping"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context, web_server(web))
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(context, web_server(host, names=("other.test",)))
    context = tunnel_app_context(*PAIR, [der(host[1])], alpn=DATABASE_ALPN)
    assert shake_hands(context, web_server(host)) == "teleport-mysql-ping"


def test_both_authorities_are_trusted_while_one_is_rotated():
    old, new = make_authority("demo.test"), make_authority("demo.test")
    context = tunnel_app_context(*PAIR, [der(old[1]), der(new[1])])
    for authority in (old, new):
        assert shake_hands(context, web_server(authority))


def test_the_outer_context_speaks_http(tmp_path):
    web = make_authority("web")
    ca_file = tmp_path / "web.pem"
    ca_file.write_bytes(pem(web[1]))
    assert shake_hands(upgrade_context(ca_file=str(ca_file)), web_server(web)) == "http/1.1"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(upgrade_context(), web_server(web))
    assert shake_hands(upgrade_context(insecure=True), web_server(web)) == "http/1.1"
    with pytest.raises(MisconfiguredError, match="ca_file"):
        upgrade_context(ca_file=str(tmp_path / "none.pem"))


def test_a_certificate_with_another_key_is_refused():
    _, key = issue(make_authority())
    with pytest.raises(ssl.SSLError):
        tunnel_app_context(PAIR[0], pem_key(key), [der(make_authority()[1])])

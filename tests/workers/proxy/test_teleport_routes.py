"""Profile and environment say which way leads to a cluster."""

import pytest
from teleport_fakes import PROFILE, PROXY

from workers.proxy.teleport.profile import parse_profile
from workers.proxy.teleport.routes import AuthRoute, Way, WebRoute, auth_route, web_route

LISTENERS = f"ssh_proxy_addr: ssh.{PROXY}:3024\n"
FORWARD = {"HTTPS_PROXY": "http://forward.test:3128"}


def profile(*, tls_routing, upgrade, ssh=LISTENERS):
    text = (
        PROFILE.replace(f"ssh_proxy_addr: {PROXY}:443\n", ssh)
        .replace("tls_routing_enabled: true", f"tls_routing_enabled: {str(tls_routing).lower()}")
        .replace("dir:", f"tls_routing_conn_upgrade_required: {str(upgrade).lower()}\ndir:")
    )
    return parse_profile(text.encode())


@pytest.mark.parametrize(
    ("tls_routing", "upgrade", "auth", "is_web_upgraded"),
    [
        (True, False, AuthRoute(Way.DIRECT, PROXY, 443), False),
        (True, True, AuthRoute(Way.UPGRADE, PROXY, 443), True),
        (False, False, AuthRoute(Way.TRANSPORT, f"ssh.{PROXY}", 3024), False),
        (False, True, AuthRoute(Way.TRANSPORT, f"ssh.{PROXY}", 3024), True),
    ],
)
def test_every_kind_of_profile_has_its_way(tls_routing, upgrade, auth, is_web_upgraded):
    found = profile(tls_routing=tls_routing, upgrade=upgrade)
    assert auth_route(found, {}) == auth
    assert web_route(found, {}) == WebRoute(PROXY, 443, "", is_web_upgraded)


@pytest.mark.parametrize("ssh", ["", "ssh_proxy_addr: ':99999'\n", "ssh_proxy_addr: [1]\n"])
def test_without_its_address_the_ssh_proxy_is_at_its_usual_port(ssh):
    found = profile(tls_routing=False, upgrade=False, ssh=ssh)
    assert auth_route(found, {}) == AuthRoute(Way.TRANSPORT, PROXY, 3023)


@pytest.mark.parametrize(("tls_routing", "upgrade"), [(True, False), (True, True), (False, False)])
def test_the_environment_names_a_forward_proxy_for_every_way(tls_routing, upgrade):
    found = profile(tls_routing=tls_routing, upgrade=upgrade)
    assert auth_route(found, FORWARD).http_proxy == "http://forward.test:3128"
    assert web_route(found, FORWARD).http_proxy == "http://forward.test:3128"


def test_hosts_are_excepted_from_the_forward_proxy_one_by_one():
    found = profile(tls_routing=False, upgrade=False)
    environment = FORWARD | {"NO_PROXY": f"ssh.{PROXY}"}
    assert auth_route(found, environment).http_proxy == ""
    assert web_route(found, environment).http_proxy == "http://forward.test:3128"

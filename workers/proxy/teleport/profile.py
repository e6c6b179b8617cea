"""The profile file `<home>/<name>.yaml` that tsh writes at login. Pure.

Source: `api/profile/profile.go`. Unknown keys are ignored; only what VNet needs is read.
"""

from dataclasses import dataclass
from typing import TypeGuard

import yaml

from workers.proxy.teleport.names import split_host_port

# tsh writes less than one kilobyte.
MAX_PROFILE_BYTES = 64 * 1024

# Teleport's own ports (`lib/defaults/defaults.go`), for addresses without one.
DEFAULT_SSH_PROXY_PORT = 3023
DEFAULT_MYSQL_PROXY_PORT = 3036


class ProfileError(ValueError):
    """The file is no complete profile."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One proxy the user has logged in to."""

    name: str  # host part of the web address, lower-case
    web_host: str
    web_port: int
    user: str
    cluster: str  # selected cluster, root or leaf; the profile name when the file has none
    is_tls_routing_enabled: bool
    is_conn_upgrade_required: bool
    private_key_policy: str
    mfa_mode: str
    # (host, port) of listeners of their own, for clusters without TLS routing. None: the file has
    # none, or none that can be used.
    ssh_proxy: tuple[str, int] | None = None
    postgres_proxy: tuple[str, int] | None = None
    mysql_proxy: tuple[str, int] | None = None

    @property
    def address(self) -> str:
        """The proxy as `tsh login --proxy=` takes it."""
        host = f"[{self.web_host}]" if ":" in self.web_host else self.web_host
        return f"{host}:{self.web_port}"


def parse_profile(data: bytes) -> Profile:
    """Reads the contents of a profile file.

    Raises:
        ProfileError: no YAML map, or an address or user name is missing or impossible.
    """
    values = _scalars(data)
    address = values.get("web_proxy_addr", "")
    if not address:
        raise ProfileError("it has no web_proxy_addr")
    try:
        host, port = split_host_port(address)
    except ValueError as error:
        raise ProfileError(f"web_proxy_addr: {error}") from error
    user = values.get("user", "")
    # The user name is a part of file names under keys/.
    if not user or "/" in user or "\0" in user or user in {".", ".."}:
        raise ProfileError(f"user {user!r} is no user name" if user else "it has no user")
    return Profile(
        name=host,
        web_host=host,
        web_port=port,
        user=user,
        cluster=values.get("cluster") or host,
        is_tls_routing_enabled=values.get("tls_routing_enabled") == "true",
        is_conn_upgrade_required=values.get("tls_routing_conn_upgrade_required") == "true",
        private_key_policy=values.get("private_key_policy", ""),
        mfa_mode=values.get("mfa_mode", ""),
        ssh_proxy=_listener(values.get("ssh_proxy_addr", ""), DEFAULT_SSH_PROXY_PORT),
        postgres_proxy=_listener(values.get("postgres_proxy_addr", ""), port),
        mysql_proxy=_listener(values.get("mysql_proxy_addr", ""), DEFAULT_MYSQL_PROXY_PORT),
    )


def _listener(address: str, default_port: int) -> tuple[str, int] | None:
    # A broken one must not cost the login: most clusters never need it.
    try:
        return split_host_port(address, default_port) if address else None
    except ValueError:
        return None


def _scalars(data: bytes) -> dict[str, str]:
    if len(data) > MAX_PROFILE_BYTES:
        raise ProfileError(f"{len(data)} bytes are too many")
    try:
        # All scalars as text: a user named 123 or 2024-01-01 stays what it is.
        values = yaml.load(data, Loader=yaml.BaseLoader)  # noqa: S506 - BaseLoader makes only text
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # PyYAML lets the errors of chr() out when an escape names no character.
        raise ProfileError("it is no YAML") from error
    if not isinstance(values, dict):
        raise ProfileError("it is empty or no YAML map")
    return {k: v for k, v in values.items() if isinstance(k, str) and _is_text(v)}


def _is_text(value: object) -> TypeGuard[str]:
    """Whether this is text that can be written; an escape may name half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True

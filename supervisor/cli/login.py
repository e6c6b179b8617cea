"""`vnet login`: has tsh log in again, where the login has expired or is gone.

VNet sees the new login by itself; it never writes credentials.
"""

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import yaml

from ipc.messages import ClusterState
from supervisor import config as configuration
from supervisor import control_messages as cm
from supervisor import settings
from supervisor.cli.control_client import AskError, ask_status
from supervisor.exits import ExitStatus, MisconfiguredError
from supervisor.settings import User

if TYPE_CHECKING:
    from workers.proxy.teleport.home import Login

# What a profile says of how its user logs in, if a password is part of it.
_LOCAL_CONNECTORS = frozenset({"", "local", "passwordless"})
# After a logout the profile stays, without a certificate.
_OUTDATED = frozenset({ClusterState.LOGIN_EXPIRED, ClusterState.NO_LOGIN})


class LoginError(Exception):
    """tsh is not run. The text is one line: why, and what to do."""

    def __init__(self, status: ExitStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What tsh is told. `user` is empty where the proxy, or whom it asks, finds it out."""

    address: str
    user: str

    @property
    def arguments(self) -> list[str]:
        user = [f"--user={self.user}"] if self.user else []
        return ["tsh", "login", f"--proxy={self.address}", *user]


def log_in(proxy: str, run_dir: Path, environment: Mapping[str, str]) -> str:
    """Becomes `tsh login` for the named proxy, or for the one whose login has expired.

    Returns a sentence when there is nothing to do.

    Raises:
        LoginError: the wrong user asks, it is not clear which proxy is meant, or tsh is missing.
    """
    from workers.proxy.teleport.home import read_home  # noqa: PLC0415  # the client; see test_imports

    config = _configuration()
    user = _vnet_user(config, run_dir, environment)
    if os.geteuid() != user.uid:
        raise LoginError(
            ExitStatus.NOT_PERMITTED,
            f"VNet uses the logins of {user.name}: run this command as {user.name}, without sudo",
        )
    directory = settings.teleport_home(config, user, environment)
    home = read_home(directory)
    chosen = _named(proxy, home.logins, directory) if proxy else _expired(home.logins, directory)
    if chosen is not None:
        _become_tsh(chosen, directory, environment)
    return f"no login has expired; to log in anyway: vnet login {home.logins[0].name}"


def _configuration() -> configuration.Config:
    """The default configuration; one that is wrong or not for us does not keep anyone out."""
    try:
        return configuration.read(None)
    except MisconfiguredError:
        return configuration.Config()


def _vnet_user(config: configuration.Config, run_dir: Path, environment: Mapping[str, str]) -> User:
    """Whose logins VNet uses: what a running VNet says counts most."""
    name = config.user or None
    try:
        status, _ = ask_status(run_dir, cm.Status())
    except AskError:
        pass  # it does not run, which is no obstacle
    else:
        name = status.supervisor.user if status.supervisor is not None else name
    try:
        return settings.find_user(name, environment)
    except MisconfiguredError as error:
        raise LoginError(ExitStatus.USAGE, str(error)) from error


def _expired(logins: "tuple[Login, ...]", directory: Path) -> _Chosen | None:
    """The one login that is outdated; None when all are good."""
    if not logins:
        raise LoginError(
            ExitStatus.USAGE,
            f"there is no profile in {directory}: name the proxy, as in vnet login"
            " teleport.example.com",
        )
    now = datetime.now(UTC)
    expired = [login for login in logins if login.state_at(now)[0] in _OUTDATED]
    if len(expired) > 1:
        names = ", ".join(login.name for login in expired)
        raise LoginError(
            ExitStatus.USAGE,
            f"the logins of {names} have expired: name one, as in vnet login {expired[0].name}",
        )
    return _choice(expired[0], directory) if expired else None


def _named(proxy: str, logins: "tuple[Login, ...]", directory: Path) -> _Chosen:
    from workers.proxy.teleport.names import split_host_port  # noqa: PLC0415  # see log_in

    try:
        host, _ = split_host_port(proxy)
    except ValueError as error:
        raise LoginError(ExitStatus.USAGE, f"{error}: name a proxy") from error
    for login in logins:
        if login.name == host:
            chosen = _choice(login, directory)
            # A port that was named is meant.
            return chosen if host == proxy.lower() else _Chosen(proxy, chosen.user)
    return _Chosen(proxy, "")


def _choice(login: "Login", directory: Path) -> _Chosen:
    profile = login.profile
    if profile is None:
        return _Chosen(login.name, "")
    host = f"[{profile.web_host}]" if ":" in profile.web_host else profile.web_host
    is_local = _connector(directory / f"{login.name}.yaml") in _LOCAL_CONNECTORS
    return _Chosen(f"{host}:{profile.web_port}", profile.user if is_local else "")


def _connector(path: Path) -> str:
    """How the user of this profile logs in. With single sign-on tsh is given no user name."""
    try:
        values = yaml.load(path.read_bytes(), Loader=yaml.BaseLoader)  # noqa: S506 - only text
        return str(values.get("auth_connector", ""))
    except (OSError, UnicodeError, yaml.YAMLError, AttributeError):
        return ""


def _become_tsh(chosen: _Chosen, home: Path, environment: Mapping[str, str]) -> NoReturn:
    program = shutil.which("tsh", path=environment.get("PATH"))
    if program is None:
        raise LoginError(
            ExitStatus.USAGE,
            "tsh, Teleport's own client, is not on PATH: install it (https://goteleport.com/download)"
            f" and run {shlex.join(chosen.arguments)}",
        )
    print(shlex.join(chosen.arguments), flush=True)
    try:
        # In place of this process: terminal, signals and exit status are tsh's.
        os.execve(  # noqa: S606  # it is what the user asks for
            program, chosen.arguments, {**environment, "TELEPORT_HOME": str(home)}
        )
    except OSError as error:
        raise LoginError(
            ExitStatus.INTERNAL, f"{program} cannot be run ({error.strerror}): install tsh again"
        ) from error

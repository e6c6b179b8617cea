"""The supervisor's settings after flags, environment and configuration file have been weighed."""

import functools
import os
import pwd
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from supervisor.exits import MisconfiguredError

if TYPE_CHECKING:
    # What the short commands of `vnet` need of this module shall be there quickly.
    from supervisor.config import Config
    from supervisor.logs import LogFormat

# hier(7): macOS has neither /run nor /var/lib, and lets nobody make the former.
_IS_MACOS = sys.platform == "darwin"
DEFAULT_RUN_DIR = Path("/var/run/vnet" if _IS_MACOS else "/run/vnet")
DEFAULT_STATE_DIR = Path("/var/db/vnet" if _IS_MACOS else "/var/lib/vnet")
RUN_DIR_VARIABLE = "VNET_RUN_DIR"


@dataclass(frozen=True, slots=True)
class User:
    """Whose credentials are used and whose connections are carried."""

    name: str
    uid: int
    gid: int
    home: Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a run depends on."""

    config: "Config"
    config_path: Path | None
    user: User
    teleport_home: Path
    run_dir: Path
    state_dir: Path
    log_level: str
    log_format: "LogFormat"


@functools.cache
def version() -> str:
    """The version of this program, as it was installed when this was asked first."""
    from importlib import metadata  # noqa: PLC0415  # it loads the parser of e-mail

    return metadata.version("vnet")


def run_dir(flag: Path | None, environment: Mapping[str, str]) -> Path:
    """Which running VNet is meant: flag, then VNET_RUN_DIR, then the default."""
    return flag or Path(environment.get(RUN_DIR_VARIABLE) or DEFAULT_RUN_DIR)


def find_user(name: str | None, environment: Mapping[str, str]) -> User:
    """The user of this name; without one SUDO_USER, else the caller.

    Raises:
        MisconfiguredError: the system knows no such user.
    """
    chosen = name or environment.get("SUDO_USER")
    try:
        entry = pwd.getpwnam(chosen) if chosen else pwd.getpwuid(os.getuid())
    except KeyError as error:
        who = repr(chosen) if chosen else f"uid {os.getuid()}"
        raise MisconfiguredError([f"user: the system knows no user {who}"]) from error
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


def teleport_home(config: "Config", user: User, environment: Mapping[str, str]) -> Path:
    """TELEPORT_HOME, then the configuration, then `~/.tsh` of the VNet user."""
    text = environment.get("TELEPORT_HOME") or config.teleport_home or "~/.tsh"
    if text == "~" or text.startswith("~/"):
        return user.home / text[2:]
    return Path(text)

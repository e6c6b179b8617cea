"""What `vnet service` does: VNet as a service of the system.

What goes into the files is made elsewhere (`supervisor.osconfig`); this module writes them, takes exactly
them away again, and asks the service manager to look.
"""

import contextlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import supervisor
from supervisor import config, settings
from supervisor.cli.progress import Progress
from supervisor.exits import ExitStatus, MisconfiguredError
from supervisor.osconfig import launchd, polkit_rule, repair_unit, systemd_unit
from supervisor.osconfig.own_files import Comment, Origin, OwnFile, origin
from supervisor.osconfig.systemd_unit import PACKAGED, TEMPLATE, Programs

# The environment of the Debian package, which brings unit and rule itself.
PACKAGE_PREFIX: Final = Path("/usr/lib/vnet")
PACKAGED_UNIT: Final = Path("/usr/lib/systemd/system", TEMPLATE)
UNITS: Final = Path("/etc/systemd/system")
RULES: Final = Path("/etc/polkit-1/rules.d")
REPAIR: Final = repair_unit.FILE_NAME
_DROP_IN: Final = "vnet.conf"
# The service manager waits for the start itself; this is for one that does not answer.
COMMAND_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Served:
    """The user of an instance, and where the credentials lie that it reads."""

    name: str
    is_root: bool
    tsh_home: Path


class ServiceError(Exception):
    """The command cannot be carried out; the text is one line."""

    def __init__(self, status: ExitStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


def install(user: str, *, start: bool, force: bool) -> None:
    """Installs the service for a user and starts it. Raises ServiceError."""
    _require_root()
    served = check_user(user, force=force)
    if sys.platform == "darwin":
        _install_on_macos(served, start=start, force=force)
    else:
        _install_on_linux(served, start=start, force=force)


def uninstall() -> None:
    """Stops the service and removes what `install` has written. Raises ServiceError."""
    _require_root()
    if sys.platform == "darwin":
        _uninstall_on_macos()
    else:
        _uninstall_on_linux()


def show(user: str) -> None:
    """Prints what `install` would write; without a user what is the same for all. Raises ServiceError."""
    served = check_user(user, force=True) if user else None
    for file in files(own_programs(), served, system=sys.platform):
        print(f"==> {file.path} <==\n{file.marked}")


def check_user(name: str, *, force: bool) -> Served:
    """The user of this name. Raises ServiceError for one whom the service cannot or should not serve."""
    try:
        systemd_unit.instance(name)
        user = settings.find_user(name, {})
        home = settings.teleport_home(config.read(None), user, service_environment())
    except (ValueError, MisconfiguredError) as error:
        raise ServiceError(ExitStatus.USAGE, str(error)) from error
    if user.uid == 0 and not force:
        raise ServiceError(
            ExitStatus.USAGE,
            f"{name} is root, whose credentials a service should not use: name the user who logs in"
            " with tsh, or add --force",
        )
    return Served(name, is_root=user.uid == 0, tsh_home=home)


def service_environment(path: Path = systemd_unit.ENVIRONMENT) -> dict[str, str]:
    """What the unit's file of variables says, as far as it is understood."""
    try:
        lines = path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, sign, value = line.strip().partition("=")
        if sign and not name.startswith(("#", ";")):
            with contextlib.suppress(ValueError):
                found[name.strip()] = " ".join(shlex.split(value))
    return found


def files(programs: Programs, served: Served | None, *, system: str) -> list[OwnFile]:
    """What is to be installed on this system (as sys.platform has it), for this user. Pure.

    Raises:
        ServiceError: the programs lie where a unit cannot name them.
    """
    if system == "darwin":
        name, is_root = (served.name, served.is_root) if served else ("NAME", False)
        text = launchd.plist(programs, name, refuses_root=not is_root)
        return [OwnFile(launchd.PLIST, text, Comment.XML)]
    try:
        found = [
            OwnFile(UNITS / TEMPLATE, systemd_unit.unit(programs), Comment.HASH),
            OwnFile(UNITS / REPAIR, repair_unit.repair_unit(programs), Comment.HASH),
            OwnFile(RULES / polkit_rule.FILE_NAME, polkit_rule.rule(), Comment.SLASHES),
        ]
    except ValueError as error:
        raise ServiceError(ExitStatus.USAGE, str(error)) from error
    return [*found, *(_drop_ins(programs, served) if served else ())]


def _drop_ins(programs: Programs, served: Served) -> list[OwnFile]:
    """What the instance of this user needs beside the unit. Raises ServiceError."""
    name = served.name
    try:
        text = systemd_unit.drop_in(programs, name, served.tsh_home, is_root=served.is_root)
    except ValueError as error:
        raise ServiceError(ExitStatus.USAGE, str(error)) from error
    return [OwnFile(_drop_in_path(name), text, Comment.HASH)] if text else []


def _drop_in_path(user: str) -> Path:
    return UNITS / f"{systemd_unit.instance(user)}.d" / _DROP_IN


def own_programs() -> Programs:
    """The programs of the environment that this command runs in."""
    if is_packaged():
        return PACKAGED
    scripts = Path(sysconfig.get_path("scripts"))
    return Programs(scripts / "vnet-supervisor", scripts / "vnet")


def is_packaged() -> bool:
    """Whether this command is the Debian package's."""
    return Path(sys.prefix) == PACKAGE_PREFIX


def unsafe(paths: Iterable[Path]) -> str:
    """Which of these, their targets and the folders above others than root may change; or ""."""
    for path in paths:
        with contextlib.suppress(OSError):
            for place in (path, *path.parents, path.resolve(), *path.resolve().parents):
                found = place.lstat()
                # In a sticky folder only the owner of an entry replaces it.
                is_open = found.st_mode & 0o022 and not (
                    stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX
                )
                if found.st_uid != 0 or is_open:
                    return str(place)
    return ""


# -- Linux --


def _install_on_linux(served: Served, *, start: bool, force: bool) -> None:
    _require_systemd()
    programs = own_programs()
    unit = systemd_unit.instance(served.name)
    if is_packaged():
        wanted = _drop_ins(programs, served)
    elif PACKAGED_UNIT.exists():
        raise ServiceError(
            ExitStatus.CONFLICT,
            f"the Debian package has installed {PACKAGED_UNIT} already: use /usr/bin/vnet, or remove"
            " the package vnet",
        )
    else:
        _require_safe_place(programs, force=force)
        wanted = files(programs, served, system="linux")
        if not RULES.is_dir():
            wanted = [file for file in wanted if file.path.parent != RULES]
            print("polkit is not installed: only root will be able to start and stop the service")
    _write(wanted, force=force)
    earlier = _drop_in_path(served.name)
    if earlier not in (file.path for file in wanted):
        _remove_drop_in(earlier, [])
    _command("systemctl", "daemon-reload")
    if not is_packaged():
        _command("systemctl", "enable", "--quiet", REPAIR)
    if start:
        _command("systemctl", "enable", "--now", unit)
        print(f"{unit} runs, and starts with the system")
    else:
        print(f"to start it: systemctl enable --now {unit}")


def _uninstall_on_linux() -> None:
    _require_systemd()
    changed: list[Path] = []
    _command("systemctl", "stop", "vnet@*.service")
    _repair()
    for link in sorted((*UNITS.glob("*.wants/vnet@*.service"), *UNITS.glob(f"*.wants/{REPAIR}"))):
        link.unlink(missing_ok=True)
        print(f"{link.name} starts no longer with the system")
    for path in (UNITS / TEMPLATE, UNITS / REPAIR, RULES / polkit_rule.FILE_NAME):
        _remove(path, changed)
    for path in sorted(UNITS.glob(f"vnet@*.service.d/{_DROP_IN}")):
        _remove_drop_in(path, changed)
    _command("systemctl", "daemon-reload")
    if is_packaged() and "DPKG_MAINTSCRIPT_NAME" not in os.environ:
        print("the unit and the polkit rule belong to the Debian package: apt remove vnet")
    _report_changed(changed)


def _repair() -> None:
    """What a service that did not end well has left would be there for good otherwise."""
    from supervisor.cli.repair import RepairError, repair  # noqa: PLC0415  # loads the back ends

    try:
        repair(settings.DEFAULT_STATE_DIR)
    except RepairError as error:
        print(f"vnet: {error}", file=sys.stderr)


def _require_systemd() -> None:
    if not Path("/run/systemd/system").is_dir():
        raise ServiceError(
            ExitStatus.USAGE,
            "this system does not run systemd: have your service manager start"
            " vnet-supervisor --user NAME",
        )


def _require_safe_place(programs: Programs, *, force: bool) -> None:
    parts = [
        programs.supervisor,
        Path(sys.executable),
        Path(sysconfig.get_path("purelib")),
        *map(Path, supervisor.__path__),
    ]
    place = unsafe(parts)
    if place and not force:
        raise ServiceError(
            ExitStatus.NOT_PERMITTED,
            f"{place} can be changed by others than root, and the service would run it as root:"
            " install VNet below /opt or as the Debian package, or add --force",
        )


# -- macOS --


def _install_on_macos(served: Served, *, start: bool, force: bool) -> None:
    programs = own_programs()
    _require_safe_place(programs, force=force)
    _write(files(programs, served, system="darwin"), force=force)
    for command in launchd.start_commands() if start else ():
        _command(*command)


def _uninstall_on_macos() -> None:
    changed: list[Path] = []
    for command in launchd.stop_commands() if launchd.PLIST.exists() else ():
        _command(*command)
    _remove(launchd.PLIST, changed)
    _report_changed(changed)


# -- files and commands --


def _require_root() -> None:
    if os.geteuid() != 0:
        raise ServiceError(ExitStatus.NOT_PERMITTED, "only root may do this: use sudo")


def _write(wanted: Sequence[OwnFile], *, force: bool) -> None:
    for file in wanted:
        with contextlib.suppress(FileNotFoundError):
            whose = origin(_read(file.path))
            if whose is not Origin.OURS and not force:
                raise ServiceError(
                    ExitStatus.CONFLICT,
                    f"{file.path} is there already and {_described(whose)}: move it away, or add"
                    " --force",
                )
    for file in wanted:
        temporary = file.path.with_name(f".{file.path.name}.new")
        try:
            file.path.parent.mkdir(mode=0o755, exist_ok=True)
            temporary.write_text(file.marked)
            temporary.chmod(0o644)
            temporary.replace(file.path)
        except OSError as error:
            raise ServiceError(
                ExitStatus.INTERNAL, f"{file.path} cannot be written: {error.strerror}"
            ) from error
        print(f"wrote {file.path}")


def _remove(path: Path, changed: list[Path]) -> None:
    try:
        if origin(_read(path)) is Origin.OURS:
            path.unlink()
            print(f"removed {path}")
        else:
            changed.append(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ServiceError(
            ExitStatus.INTERNAL, f"{path} cannot be removed: {error.strerror}"
        ) from error


def _remove_drop_in(path: Path, changed: list[Path]) -> None:
    _remove(path, changed)
    # Empty, unless the administrator has drop-ins there.
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def _read(path: Path) -> str:
    return path.read_text(errors="surrogateescape")


def _described(whose: Origin) -> str:
    return "was changed since" if whose is Origin.CHANGED else "is not VNet's"


def _report_changed(changed: Sequence[Path]) -> None:
    if changed:
        named = ", ".join(map(str, changed))
        raise ServiceError(
            ExitStatus.CONFLICT,
            f"left in place, since it was changed or is not VNet's: {named}; remove it by hand",
        )


def _command(*arguments: str) -> None:
    """Raises ServiceError unless it succeeds."""
    if shutil.which(arguments[0]) is None:
        raise ServiceError(ExitStatus.USAGE, f"{arguments[0]} is not installed here")
    try:
        with Progress(" ".join(arguments)):
            done = subprocess.run(
                arguments, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
            )
    except subprocess.TimeoutExpired as error:
        raise ServiceError(
            ExitStatus.INTERNAL, f"{' '.join(arguments)}: no end after {COMMAND_SECONDS:g} s"
        ) from error
    if done.returncode != 0:
        # systemctl says in two lines where to look.
        said = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise ServiceError(ExitStatus.INTERNAL, f"{' '.join(arguments)}: {said}")

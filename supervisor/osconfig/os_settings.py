"""The system's resolver as the supervisor sees it: says what is wanted, and never waits for it.

Everything that may block (files, programs, the system bus) happens in one thread. Wishes are taken in
turn, the last one counts; what fails is tried again.
"""

import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from supervisor.exits import ConflictError
from supervisor.osconfig import macos_resolver, networkmanager, resolvconf_backend
from supervisor.osconfig.backend import NoBackend, OsConfigError, ResolverBackend, said
from supervisor.osconfig.bus_facts import BusFacts, dbus_facts
from supervisor.osconfig.choose import Choice, Facts, choose
from supervisor.osconfig.dbus import SystemBus, load_library
from supervisor.osconfig.journal import InUseError, Journal, Outcome, Undo, Undone
from supervisor.osconfig.macos_resolver import MacosBackend
from supervisor.osconfig.networkmanager import NetworkManagerBackend
from supervisor.osconfig.resolv_conf_backend import RESOLV_CONF, ResolvConfBackend, text_before
from supervisor.osconfig.resolvconf_backend import ResolvconfBackend, find_resolvconf
from supervisor.osconfig.resolved import ResolvedBackend
from supervisor.osconfig.wish import ResolverWish

log = logging.getLogger(__name__)

CHECK_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 5.0
NSSWITCH: Final = Path("/etc/nsswitch.conf")

Servers = list[tuple[str, int, str]]
Make = Callable[[str, Journal], ResolverBackend]
Look = Callable[[Journal], Facts]


def undo_calls() -> Mapping[str, Undo]:
    """All calls that an entry of the journal may name."""
    return {
        **resolvconf_backend.UNDO_CALLS,
        **macos_resolver.UNDO_CALLS,
        **networkmanager.UNDO_CALLS,
    }


def find_facts(journal: Journal) -> Facts:
    """Asks the system; takes a few seconds at most."""
    is_linux = sys.platform == "linux"
    installed = find_resolvconf()
    change = journal.find(RESOLV_CONF)
    link = RESOLV_CONF.parent / change.before.target if change is not None else RESOLV_CONF
    is_link = bool(change.before.target) if change is not None else RESOLV_CONF.is_symlink()
    nsswitch = ""
    with suppress(OSError):
        nsswitch = NSSWITCH.read_text(errors="replace")
    return Facts(
        platform=sys.platform,
        bus=dbus_facts() if is_linux else BusFacts(),
        target=str(link.resolve()) if is_link else "",
        text=text_before(journal),
        nsswitch=nsswitch,
        resolvconf=installed[1] if installed else None,
    )


def make_backend(name: str, journal: Journal) -> ResolverBackend:
    """The back end of this name. Raises OsConfigError."""
    match name:
        case "resolved":
            return ResolvedBackend(SystemBus())
        case "networkmanager":
            return NetworkManagerBackend(SystemBus(), journal)
        case "resolv.conf":
            return ResolvConfBackend(journal)
        case "resolvconf":
            installed = find_resolvconf()
            if installed is None:
                raise OsConfigError("resolvconf is not installed any more: restart VNet.")
            return ResolvconfBackend(journal, *installed)
        case "macos":
            return MacosBackend(journal)
        case _:
            return NoBackend()


class OsSettings:
    """See the module. Its attributes may be read at any time."""

    def __init__(
        self,
        wanted: str,
        state_dir: Path,
        *,
        goes_on: bool = False,
        make: Make = make_backend,
        look: Look = find_facts,
        on_upstream: Callable[[], None] = lambda: None,
    ) -> None:
        """Undoes what a VNet that died has left, unless this one `goes_on` in its place.

        `wanted` is `dns.os_integration`. `on_upstream` is called in the thread
        when `upstream` has changed.

        Raises:
            ConflictError: a VNet runs with this state directory.
        """
        self._wanted = wanted
        self._make = make
        self._look = look
        self._on_upstream = on_upstream
        self.backend_name = "none"
        self.reasons: tuple[str, ...] = ()
        self._backend: ResolverBackend = NoBackend()
        self._upstream: Servers | None = None
        self._choice_problem = ""
        self._trouble: list[str] = []
        # What the last look has found, and the one before may have not.
        self._doubtful: list[str] = []
        self._wish: ResolverWish | None = None
        self._settled: ResolverWish | None = None
        self._is_closing = False
        self._wake = threading.Condition()
        # Held while something is changed; `hold` keeps the thread from beginning.
        self._working = threading.Lock()
        self._thread: threading.Thread | None = None
        self._journal: Journal | None = None
        try:
            self._journal = Journal(state_dir, undo_calls())
            if not goes_on:
                tell(self._journal.undo())
                if sys.platform == "darwin":
                    macos_resolver.remove_own(macos_resolver.DIRECTORY)
            elif self._journal.find(RESOLV_CONF) is not None:
                self._upstream = ResolvConfBackend(self._journal).upstream()
        except InUseError as error:
            raise ConflictError(f"{error}: stop it (vnet stop), or set --state-dir") from error
        except (OSError, OsConfigError) as error:
            self._give_up(
                f"The system's resolver is left alone, since {state_dir} cannot be used ({error}):"
                " set --state-dir."
            )

    def _give_up(self, why: str) -> None:
        log.warning("%s", why)
        if self._wanted != "none":
            self._trouble = [why]
        self._wanted = "none"

    @property
    def problems(self) -> list[str]:
        """Sentences for `vnet status`."""
        wish = self._wish
        if not self._trouble and wish is not None and wish.zones and wish != self._settled:
            return ["The system's resolver is being set up: wait."]
        return list(self._trouble)

    def upstream(self) -> Servers | None:
        """The nameservers for names that are not VNet's; None if /etc/resolv.conf has them."""
        return self._upstream

    def want(self, wish: ResolverWish) -> None:
        """Soon it will be so; with the same wish as before nothing happens."""
        if wish == self._wish or self._wanted == "none" or self._is_closing:
            return
        if self._thread is None and sys.platform == "linux":
            load_library()
        with self._wake:
            self._wish = wish
            self._wake.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._live, name="os-settings", daemon=True)
            self._thread.start()

    def hold(self) -> bool:
        """Keeps everything as it is until `release`; False while something is being changed."""
        return self._working.acquire(blocking=False)

    def release(self) -> None:
        """After `hold`: goes on."""
        self._working.release()

    def close(self) -> None:
        """Undoes everything, or leaves it to the next start if that takes too long. Works once."""
        if self._is_closing:
            return
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                log.warning("the system's resolver is not as before yet: run: vnet repair")
                return
        if self._journal is not None:
            if self._thread is None:
                # An earlier program of this process may have left something.
                tell(self._journal.undo())
            self._journal.close()
            self._journal = None

    # -- in the thread --

    def _live(self) -> None:
        journal = self._journal
        assert journal is not None
        with self._working:
            self._begin(journal)
        next_try = 0.0
        while not self._is_closing:
            wish = self._wish
            assert wish is not None
            if wish == self._settled:
                with self._working:
                    self._check()
            elif time.monotonic() >= next_try:
                with self._working:
                    is_done = self._attempt(functools.partial(self._settle, wish))
                next_try = 0.0 if is_done else time.monotonic() + RETRY_SECONDS
            with self._wake:
                self._wake.wait_for(functools.partial(self._has_news, wish), CHECK_SECONDS)
            if self._wish != wish:
                next_try = 0.0
        with self._working:
            self._attempt(self._backend.undo)

    def _has_news(self, wish: ResolverWish) -> bool:
        return self._is_closing or self._wish != wish

    def _begin(self, journal: Journal) -> None:
        try:
            choice = choose(self._wanted, self._look(journal))
        except Exception as error:  # whatever the system answers, VNet runs
            log.exception("the system cannot be asked for its resolver")
            choice = Choice("none", (), _fault(error))
        self._attempt(lambda: self._use(choice, journal))
        log.info("the system's resolver: %s, because %s", choice.backend, "; ".join(choice.reasons))
        if choice.problem:
            log.warning("%s", choice.problem)

    def _use(self, choice: Choice, journal: Journal) -> None:
        # Of an earlier program of this process, which may have chosen another.
        tell(journal.undo(journal.backends() - {choice.backend}))
        self._backend = self._make(choice.backend, journal)
        self.backend_name = choice.backend
        self.reasons = choice.reasons
        self._choice_problem = choice.problem

    def _settle(self, wish: ResolverWish) -> None:
        if wish.zones:
            # Told before VNet is asked for the first name: it must not ask in turn who asks it.
            self._use_upstream(self._backend.upstream())
            self._backend.apply(wish)
        else:
            self._backend.undo()
        self._use_upstream(self._backend.upstream() if wish.zones else None)
        self._settled = wish
        log.info("the system's resolver (%s) has %d zones", self.backend_name, len(wish.zones))
        self._trouble = self._standing()

    def _check(self) -> None:
        found: list[str] = []

        def look() -> None:
            found.extend(self._backend.check())
            if self._settled and self._settled.zones:
                self._use_upstream(self._backend.upstream())

        failure = self._failure_of(look)
        if failure:
            found = [failure]
        # A service that is just restarted, or a file that is just written, is there at the next look.
        known = [*self._doubtful, *self._trouble]
        # What the last look has found may say the same in other words, such as another number.
        has_changed = any(text not in found for text in self._doubtful)
        sure = [text for text in found if has_changed or text in known]
        self._doubtful = found
        if failure in sure:
            self._tell(failure)
        else:
            self._trouble = [*self._standing(), *sure]

    def _use_upstream(self, servers: Servers | None) -> None:
        before, self._upstream = self._upstream, servers
        if servers != before:
            self._on_upstream()

    def _standing(self) -> list[str]:
        return [self._choice_problem] if self._choice_problem else []

    def _attempt(self, work: Callable[[], None]) -> bool:
        failure = self._failure_of(work)
        if failure:
            self._tell(failure)
        return not failure

    def _failure_of(self, work: Callable[[], None]) -> str:
        try:
            work()
        except OsConfigError as error:
            return str(error)
        except OSError as error:
            return (
                f"What the system's resolver reads cannot be changed ({said(error)}): mend that, or set"
                ' dns.os_integration = "none".'
            )
        except Exception as error:  # a fault in a back end must not end VNet
            log.exception("the system's resolver cannot be set up")
            return _fault(error)
        return ""

    def _tell(self, failure: str) -> None:
        if [failure] != self._trouble:
            log.warning("the system's resolver: %s", failure)
        self._trouble = [failure]


def _fault(error: Exception) -> str:
    return (
        f"The system's resolver cannot be set up: {error}; report that, and set"
        ' dns.os_integration = "none".'
    )


def tell(outcomes: list[Undone]) -> None:
    """Puts what was undone into the log."""
    for undone in outcomes:
        level = logging.INFO if undone.outcome is Outcome.UNDONE else logging.WARNING
        log.log(level, "left by an earlier VNet: %s", undone.text)

"""The supervisor: one loop that waits, looks at its workers, and carries out what follows.

What follows is decided elsewhere (`worker_states`, `restart_policy`, `clusters`, `status`); this
module joins the decisions to processes and sockets. Signal handlers only write to a pipe, so all
work happens in the loop.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from ipc import counters
from ipc import messages as m
from ipc.log_limit import tell_suppressed
from ipc.permits import Role, role_of
from ipc.slots import METRICS
from supervisor import (
    configure,
    link_making,
    logs,
    next_start,
    places,
    privileges,
    upgrade,
)
from supervisor.access import lookup_socket
from supervisor.channels import Channels
from supervisor.clusters import ClusterView
from supervisor.commands import Commands
from supervisor.config import Config
from supervisor.configure import Surroundings
from supervisor.confinement import identities
from supervisor.confinement.reach import reach_of
from supervisor.control import ControlSocket, Promise
from supervisor.conversation import Conversation
from supervisor.crew import CannotReplaceError, Crew
from supervisor.dataplane import DataPlane
from supervisor.exits import ExitStatus, StartupError
from supervisor.handover import (
    Handover,
    KeptDevices,
    KeptIdentity,
    KeptLog,
)
from supervisor.host import Host
from supervisor.in_force import InForce, Then
from supervisor.link_store import LinkStore
from supervisor.listeners import Listeners
from supervisor.metrics_endpoint import MetricsEndpoint
from supervisor.notify import Notifier, watchdog_seconds
from supervisor.osconfig.os_settings import OsSettings
from supervisor.privileges import Identity
from supervisor.probe_blame import GAP_SECONDS, Ready
from supervisor.probes import Prober
from supervisor.reload_plan import ReloadPlan
from supervisor.restart_policy import RestartLimits
from supervisor.service_link import ServiceLink
from supervisor.settings import Settings, version
from supervisor.signals import Signals
from supervisor.status import Health
from supervisor.status_report import TOTALS
from supervisor.upgrade import Upgrade, UpgradeError
from supervisor.waiting_start import StoppedError, WaitingStart
from supervisor.worker import Worker, put_down
from supervisor.worker_states import WorkerState

log = logging.getLogger(__name__)

# The longest the loop sleeps: heartbeats and nameservers are looked at this often.
TICK_SECONDS = 0.5
# Listening sockets of all proxies: descriptors and kernel memory.
MAX_LISTENERS = 16384


class Supervisor:
    """One run of VNet; `run` returns when it was told to stop."""

    def __init__(
        self,
        settings: Settings,
        log_handler: logging.Handler,
        notifier: Notifier | None = None,
        link_store: LinkStore | None = None,
        handed: Handover | None = None,
    ) -> None:
        """`handed` is what an earlier program of this process hands over."""
        self.settings = settings
        self._notifier = notifier or Notifier({})
        self._link_store = link_store or LinkStore(self._notifier)
        self._handed = handed
        self._upgrade = Upgrade()
        self.workers: dict[str, Worker] = {}
        self._metrics = MetricsEndpoint(
            settings.config.metrics.listen, None if handed is None else handed.metrics
        )
        self._crew = Crew(
            self.workers,
            make_successor=self._make_successor,
            start=self._start,
            take_over=self._take_over,
        )
        self.were_ready = False
        self.was_healthy = False
        self.started_at = time.monotonic()
        # When the loop was there last, and since when it has not stood still.
        self._turned_at = self._awake_since = self.started_at
        # Counters of worker processes that have ended, so that totals never fall.
        self.past_counters: dict[str, int] = {}
        self.log_book = logs.book_of(log_handler)
        self._log_handler = log_handler
        self._selector = selectors.DefaultSelector()
        self._in_force = InForce()
        self._channels = Channels(self._selector, self._talk)
        self._stop_is_ordered = False
        # Not after a fault: then the link is for a successor.
        self._ends_in_order = False
        self._reload_is_ordered = False
        self._commands = Commands(self)
        self._service = ServiceLink(
            self._notifier,
            watchdog_seconds(os.environ, os.getpid()),
            self._commands.judge,
        )

    @property
    def network(self) -> m.Network:
        return self._host.network

    @property
    def others(self) -> Sequence[Worker]:
        return [*self._crew.standbys.values(), *self._crew.leavers]

    @property
    def zones(self) -> Sequence[str]:
        return self._host.clusters.zones

    @property
    def range_problems(self) -> Sequence[str]:
        return self._host.clusters.range_problems

    @property
    def probe_problems(self) -> Sequence[str]:
        return self._prober.problems

    @property
    def network_problems(self) -> Sequence[str]:
        return self._host.watch.problems

    @property
    def forwarding_warnings(self) -> Sequence[str]:
        return self._host.forwarded.warnings

    @property
    def data_plane(self) -> m.DataPlaneKind:
        return self._data_plane.kind

    @property
    def os_integration(self) -> str:
        return self._os_settings.backend_name

    @property
    def os_problems(self) -> Sequence[str]:
        return self._os_settings.problems

    @property
    def access(self) -> m.Access:
        return self._host.access

    @property
    def access_problems(self) -> Sequence[str]:
        return self._host.security.problems

    @property
    def access_warnings(self) -> Sequence[str]:
        return self._host.security.warnings

    @property
    def metrics_problems(self) -> Sequence[str]:
        return self._metrics.problems

    @property
    def os_reasons(self) -> Sequence[str]:
        return self._os_settings.reasons

    def run(self) -> None:
        """Runs until SIGINT, SIGTERM or `vnet stop`.

        Raises:
            StartupError: VNet cannot run here; nothing is left behind.
        """
        with contextlib.ExitStack() as closing:
            try:
                self._set_up(closing)
            except StoppedError:
                self._service.stopping()
                return
            log.info(
                "VNet %s %s for %s on %s",
                version(),
                "starts" if self._handed is None else f"goes on after {self._handed.version}",
                self.settings.user.name,
                self.network.interface,
            )
            if self._handed is None:
                for worker in self.workers.values():
                    self._start(worker)
            else:
                self._handed = None
                # An earlier program may have served at another address.
                self._use_metrics()
                self.replace(list(self.workers))
            while not self._stop_is_ordered:
                self._turn(TICK_SECONDS)
            self._ends_in_order = True
            self._service.stopping()
            log.info("VNet stops")

    # -- what commands and signals ask for --

    def order_stop(self) -> None:
        """The loop ends after this turn."""
        self._stop_is_ordered = True

    def restart(self, worker: Worker) -> None:
        """Restarts a worker; this never counts as a crash."""
        now = time.monotonic()
        worker.forget_crashes()
        self._crew.give_up_on(worker.slot, now)
        if worker.is_alive:
            worker.comes_back = True
            worker.order_stop(now)
        else:
            self._start(worker)

    def replace(self, slots: Sequence[str]) -> None:
        """Replaces workers one after the other without cutting a connection.

        A worker that is not ready has nothing to lose and is restarted.

        Raises:
            CannotReplaceError: too many processes still finish.
        """
        config = self.settings.config.supervisor
        present = [self.workers[slot] for slot in slots]
        ready = [worker.slot for worker in present if worker.state is WorkerState.READY]
        self._crew.replace(ready, config.drain_seconds)
        for worker in present:
            if worker.slot not in ready and not self._crew.is_replacing(worker.slot):
                self.restart(worker)

    def order_upgrade(self) -> Promise:
        """Has the installed version take over, as this process, without cutting a connection.

        Raises:
            CannotReplaceError: workers are being replaced, or too many processes still finish.
            UpgradeError: it cannot be begun.
        """
        if not self._crew.is_quiet:
            raise CannotReplaceError("workers are being replaced: try again in a moment")
        self._crew.require_room(self.workers)
        state = self._hand_over(lets_go=False)
        return self._upgrade.order(upgrade.command(), state, time.monotonic())

    def use_config(self, plan: ReloadPlan, teleport_home: Path) -> None:
        """Takes over what can change while VNet runs.

        Raises:
            CannotReplaceError: too many processes still finish; nothing is taken over.
        """
        before = self.settings
        self.settings = dataclasses.replace(before, config=plan.config, teleport_home=teleport_home)
        try:
            self.replace([slot for slot in self.workers if role_of(slot) in plan.replaced])
        except CannotReplaceError:
            self.settings = before
            raise
        limits = _limits(plan.config)
        for worker in self._crew:
            worker.use_limits(limits)
        self._host.use_settings(self.settings, time.monotonic())
        self._use_metrics()
        self._prober.use_times(
            heartbeat_seconds=plan.config.supervisor.heartbeat_seconds,
            hang_seconds=plan.config.supervisor.hang_seconds,
        )

    def _use_metrics(self) -> None:
        now = time.monotonic()
        if self._metrics.use(self.settings.config.metrics.listen, now):
            self._crew.dismiss(METRICS, now)

    def when_in_force(self, then: Then) -> None:
        """Calls `then` when all workers have taken over what they were told until now."""
        self._in_force.ask(self._crew, time.monotonic(), then)

    def use_log_level(self, message: m.SetLogLevel) -> None:
        """Every worker takes over the level, and each that is started from now on."""
        self._log_level = message.level
        self._tell(message, set(Role))

    def cluster_report(self) -> ClusterView | None:
        """What the proxies that have spoken say of the clusters."""
        return self._host.clusters.report

    # -- set-up --

    def _set_up(self, closing: contextlib.ExitStack) -> None:
        self._log_level = logging.getLevelName(logging.getLogger().level)
        # First: a signal in the middle of this must not leave half of it behind.
        self._signals = Signals(self._take_signal)
        closing.callback(self._signals.close)
        self._selector.register(
            self._signals, selectors.EVENT_READ, lambda _events: self._signals.hear()
        )
        book_path = self._set_up_directories(closing)
        self._set_up_network(closing)
        self._surroundings = self._find_surroundings(book_path)
        self._conversation = Conversation(
            self._crew,
            self._listeners,
            self._host.clusters,
            self._in_force,
            keys=self._surroundings.keys,
            network=lambda: self.network,
        )
        self._host.begin_watch(closing, self._selector)
        handed = self._handed
        if handed is None:
            self._make_workers()
        else:
            self._adopt(handed)
        self._control = ControlSocket(
            self._run_directory.control_path,
            self._selector,
            self._commands.answer,
            None if handed is None else socket.socket(fileno=handed.control),
        )
        closing.callback(self._control.close)
        closing.callback(self._upgrade.close)
        if handed is None and self._link_store.is_used:
            self._link_store.keep(self._data_plane.keep())
        # Last in, first out: the workers end before what they borrow is closed.
        closing.callback(self._stop_workers)
        # Nobody is to ask workers that end.
        closing.callback(self._os_settings.close)

    def _set_up_directories(self, closing: contextlib.ExitStack) -> Path:
        """Also the settings of the system's resolver; returns the path of the address book."""
        settings, handed = self.settings, self._handed
        self._run_directory = (
            places.RunDirectory(settings.run_dir)
            if handed is None
            else places.RunDirectory.adopt(settings.run_dir, handed.lock)
        )
        closing.callback(self._run_directory.close)
        closing.callback(self._metrics.close)
        try:
            self._metrics.open()
        except StartupError:
            # A service goes on without; `_serve_metrics` tries again, and tells.
            if handed is None and not self._notifier.is_heard:
                raise
        user_state = places.make_state_directory(
            settings.state_dir, settings.user, change_owner=os.geteuid() == 0
        )
        if handed is None:
            next_start.forget_log_level(settings.state_dir)
        # Before anything is set up: what a VNet that died has left may keep names from being found.
        self._os_settings = OsSettings(
            settings.config.dns.os_integration,
            settings.state_dir,
            goes_on=handed is not None,
            on_upstream=self._signals.wake_up,
        )
        closing.callback(self._os_settings.close)
        return user_state / "book.sqlite"

    def _set_up_network(self, closing: contextlib.ExitStack) -> None:
        """Link, listeners, and what is asked through them."""
        config = self.settings.config
        if config.teleport.insecure:
            log.warning(
                "teleport.insecure is set: the certificates of Teleport proxies are not verified"
            )
        self._data_plane, plan = self._make_link()
        closing.callback(self._close_data_plane)
        self._prober = Prober(
            plan,
            self._data_plane.tun_descriptors[0],
            heartbeat_seconds=config.supervisor.heartbeat_seconds,
            hang_seconds=config.supervisor.hang_seconds,
        )
        closing.callback(self._prober.close)
        # Half of the descriptors is for everything else, copies on their way to a worker included.
        limit = min(MAX_LISTENERS, privileges.raise_file_limit() // 2)
        self._listeners = Listeners(
            self._data_plane, config.proxy.workers, limit, self._tell_redirects
        )
        closing.callback(self._listeners.close_all)
        self._host = Host(
            self.settings,
            self._data_plane,
            plan,
            os_settings=self._os_settings,
            link_store=self._link_store,
            tell=self._tell,
            # One that has failed is not started again.
            is_served=lambda: self.workers["dns"].state is not WorkerState.FAILED,
        )

    def _make_link(self) -> tuple[DataPlane, m.Network]:
        make = functools.partial(
            link_making.make,
            self.settings,
            self._handed,
            self._link_store,
            self._os_settings.upstream,
        )
        if self._handed is not None or not self._notifier.is_heard:
            return make()
        waiting = WaitingStart(
            self.settings,
            self._run_directory.control_path,
            self._selector,
            self._notifier,
            lambda: self._stop_is_ordered,
        )
        return waiting.run(make)

    def _find_surroundings(self, book_path: Path) -> Surroundings:
        settings, handed, directory = self.settings, self._handed, self._run_directory
        proxies = settings.config.proxy.workers
        if handed is None:
            chosen = identities.choose([*configure.slots(proxies), METRICS], settings.user)
            self._identities = chosen.of
            keys = configure.make_keys(proxies)
            bus_dir = directory.make_bus(chosen.bus_group)
            prompts_dir = directory.make_prompts(settings.user, change_owner=os.geteuid() == 0)
        else:
            keys, bus_dir, prompts_dir = handed.keys, directory.bus_path, directory.prompts_path
        return Surroundings(
            network=self._host.network,
            upstream=self._host.upstream,
            keys=keys,
            bus_dir=bus_dir,
            book_path=book_path,
            prompts_dir=prompts_dir,
            data_plane=self._data_plane.kind,
            has_family_header=self._data_plane.has_family_header,
            max_listeners=self._listeners.share,
            access=self._host.access,
        )

    @property
    def _around(self) -> Surroundings:
        """As it is now."""
        return dataclasses.replace(
            self._surroundings,
            network=self._host.network,
            upstream=self._host.upstream,
            access=self._host.access,
        )

    def _close_data_plane(self) -> None:
        if self._ends_in_order:
            # The service manager has copies, and closes them in its own time.
            self._link_store.clear()
            self._data_plane.remove()
        else:
            self._data_plane.close()

    def _adopt(self, handed: Handover) -> None:
        limits = _limits(self.settings.config)
        self._identities = {
            slot: Identity(kept.uid, kept.gid, kept.extra_group)
            for slot, kept in handed.identities.items()
        }
        if METRICS not in self._identities:
            # An earlier version knew nothing of it.
            self._identities |= identities.choose([METRICS], self.settings.user).of
        self._listeners.adopt(handed.listeners)
        adopted = [
            Worker.adopt(
                kept,
                self._identities[kept.slot],
                limits,
                reach_of(kept.slot, self.settings, self._around),
                self._log_handler,
            )
            for kept in (*handed.workers, *handed.leavers)
        ]
        for worker in adopted[: len(handed.workers)]:
            self.workers[worker.slot] = worker
        self._crew.leavers += adopted[len(handed.workers) :]
        self.past_counters = handed.past_counters
        self.started_at = handed.started_at
        self.were_ready, self.was_healthy = handed.were_ready, handed.was_healthy
        self._host.clusters.adopt(handed.reports, handed.known_clusters)

    def _hand_over(self, *, lets_go: bool) -> Handover:
        """Everything that survives; `lets_go` ends the threads that read the logs of workers."""
        link = self._data_plane.keep()
        workers = [worker.keep(lets_go=lets_go) for worker in self.workers.values()]
        leavers = [worker.keep(lets_go=lets_go) for worker in self._crew.leavers]
        last, lines = self.log_book.keep()
        return Handover(
            pid=os.getpid(),
            version=version(),
            config=msgspec.to_builtins(self.settings.config),
            network=msgspec.structs.replace(link.network, ranges=self.network.ranges),
            keys=self._surroundings.keys,
            identities={
                slot: KeptIdentity(uid=who.uid, gid=who.gid, extra_group=who.extra_group)
                for slot, who in self._identities.items()
            },
            lock=self._run_directory.lock,
            control=self._control.fileno(),
            devices=KeptDevices(
                outer=link.outer, inner=link.inner, namespace=link.namespace, dns=list(link.dns)
            ),
            listeners=self._listeners.keep(),
            workers=workers,
            leavers=leavers,
            reports=self._host.clusters.keep(),
            known_clusters=self._host.clusters.known,
            past_counters=self.past_counters,
            metrics=self._metrics.keep(),
            started_at=self.started_at,
            were_ready=self.were_ready,
            was_healthy=self.was_healthy,
            log_level=self._log_level,
            log=KeptLog(name=self.log_book.name, last=last, lines=lines),
        )

    def _execute(self) -> None:
        """Has the installed version take over; returns only if it cannot be executed."""
        if not self._os_settings.hold():
            # In a moment: a change of the system's resolver must not be cut in two.
            return
        try:
            self._become()
        finally:
            self._os_settings.release()

    def _become(self) -> None:
        self._upgrade.begin()
        with upgrade.signals_blocked():
            # What has come until now; the rest waits for the new program.
            self._signals.hear()
            if self._stop_is_ordered:
                return
            state = self._hand_over(lets_go=True)
            try:
                upgrade.become(upgrade.command(), state, self._notifier.environment)
            except UpgradeError as error:
                log.error("VNet goes on as it is: %s", error)
                everyone = [*self.workers.values(), *self._crew.leavers]
                for worker, kept in zip(everyone, (*state.workers, *state.leavers), strict=True):
                    worker.hear_again(kept, self._log_handler)

    def _make_workers(self) -> None:
        for slot in configure.slots(self.settings.config.proxy.workers):
            self._make_worker(slot)

    def _make_worker(self, slot: str) -> Worker:
        reach = reach_of(slot, self.settings, self._around)
        limits = _limits(self.settings.config)
        self.workers[slot] = Worker(slot, self._identities[slot], limits, reach)
        return self.workers[slot]

    def _make_successor(self, worker: Worker) -> Worker:
        reach = reach_of(worker.slot, self.settings, self._around)
        return worker.successor(self._identities[worker.slot], reach)

    def _take_signal(self, number: int) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            self.order_stop()
        elif number == signal.SIGHUP:
            self._reload_is_ordered = True

    def _reloaded(self, status: ExitStatus, text: str) -> None:
        log.log(logging.INFO if status is ExitStatus.OK else logging.ERROR, "%s", text)
        self._service.reloaded()

    def _start(self, worker: Worker) -> None:
        worker.start(time.monotonic(), self._log_handler)
        worker.waits_for_take_over = self._crew.waits(worker)
        message = configure.configuration(
            worker.slot,
            self.settings,
            self._around,
            self._log_level,
            is_standby=worker.waits_for_take_over,
        )
        descriptors = {
            "tun": self._data_plane.tun_descriptors,
            "dns": self._data_plane.dns_descriptors,
        }
        if (endpoint := self._metrics.descriptor) is not None:
            descriptors[METRICS] = [endpoint]
        try:
            with lookup_socket(worker.slot, can_tell=self._host.access.can_tell) as kernel:
                worker.send(message, [*descriptors.get(worker.slot, []), *kernel])
        except OSError as error:
            worker.kill(f"there is no socket now to ask with which user connects ({error})")
            return
        if worker.slot == METRICS:
            # It takes no connection before it knows what to answer.
            self._tell_figures(worker, time.monotonic())
        if worker.slot == "tun" and self._data_plane.kind is m.DataPlaneKind.REWRITING:
            table = [*self._data_plane.dns_redirects, *self._listeners.redirects()]
            for part in configure.redirects(table):
                worker.send(part)

    def _tell_redirects(self, changed: list[m.Redirect]) -> None:
        for part in configure.redirects(changed):
            self._tell(part, {Role.TUN})

    def _take_over(self, worker: Worker) -> None:
        for address, port, descriptor in self._listeners.of(worker.slot):
            worker.send(m.ListenerOpened(address=address, port=port), [descriptor])
        if worker.waits_for_take_over:
            worker.waits_for_take_over = False
            worker.send(m.TakeOver())

    # -- one turn of the loop --

    def _turn(self, longest: float) -> None:
        self._channels.follow(self._crew)
        # A worker is silent only if it has said nothing until here: a supervisor that was stopped for a
        # while hears in the next turn what was said meanwhile.
        heard_until = time.monotonic()
        for key, events in self._selector.select(self._timeout(longest)):
            key.data(events)
        now = time.monotonic()
        if now - self._turned_at > GAP_SECONDS:
            self._awake_since = now
        self._turned_at = now
        self._reap(now)
        self._start_due(now)
        self._watch(now, heard_until)
        self._note_readiness(now)
        if not self._stop_is_ordered:
            self._serve_metrics(now)
            self._crew.tick(heard_until, awake_since=self._awake_since)
            self._probe(now)
        self._in_force.tick(now)
        self._control.drop_silent(now)
        tell_suppressed()
        if self._reload_is_ordered:
            self._reload_is_ordered = False
            self._service.reloading()
            self._commands.reload(self._reloaded)
        self._host.tick(now)
        if not self._stop_is_ordered:
            self._host.follow_network(now)
            are_well = not any(worker.is_unkillable(now) for worker in self._crew)
            self._service.tick(now, are_well=are_well)
            is_quiet = (
                self._crew.is_quiet and self._host.clusters.is_quiet and self._in_force.is_quiet
            )
            if self._upgrade.is_due(now, is_quiet=is_quiet):
                self._execute()

    def _probe(self, now: float) -> None:
        ready = {
            slot: Ready(worker.started_at, worker.counters)
            for slot, worker in self.workers.items()
            if worker.state is WorkerState.READY
            and slot != METRICS
            and not (worker.waits_for_take_over or worker.is_being_ended)
        }
        for suspect in self._prober.tick(now, ready):
            self.workers[suspect.slot].end_hung(now, suspect.why)

    def _serve_metrics(self, now: float) -> None:
        if not self._metrics.is_open(now):
            return
        worker = self.workers.get(METRICS)
        if worker is None:
            self._start(self._make_worker(METRICS))
        elif (
            worker.state is WorkerState.READY
            and self._metrics.is_push_due(now)
            # One that does not read is to find what is new then.
            and not worker.wants_to_write
        ):
            self._tell_figures(worker, now)

    def _tell_figures(self, worker: Worker, now: float) -> None:
        health, _ = self._commands.judge()
        worker.send(self._metrics.figures(self, health, now))

    def _timeout(self, longest: float) -> float:
        now = time.monotonic()
        longest = min(longest, self._service.longest_sleep or longest)
        steps = [at for worker in self._crew for at in (worker.restart_at, worker.next_step_at)]
        steps.append(self._in_force.next_step_at)
        if not self._stop_is_ordered:
            steps.append(self._host.watch.next_look_at)
        return max(0.0, min([longest, *(at - now for at in steps if at is not None)]))

    def _talk(self, worker: Worker, events: int) -> None:
        if not worker.is_talking:
            return
        if events & selectors.EVENT_WRITE:
            worker.flush()
        for message in worker.receive(time.monotonic()):
            self._conversation.take(worker, message)
        # Before the status is asked for in the same turn: it is not healthy while the system does not
        # know a zone.
        self._host.want_resolver()

    def _reap(self, now: float) -> None:
        for worker in [worker for worker in self._crew if worker.has_ended()]:
            # What it said before it ended still counts.
            self._talk(worker, selectors.EVENT_READ)
            self._channels.forget(worker)
            worker.reap(now)
            self._remember(worker)
            worker.counters = {}
            if self._crew.is_active(worker):
                self._host.clusters.forget(worker.slot)
            self._crew.ended(worker, now)

    def _remember(self, worker: Worker) -> None:
        # What a worker calls its counters is its own affair: only those that are known are kept.
        role = role_of(worker.slot)
        counters.add(self.past_counters, counters.totals(counters.served(role, worker.counters)))
        if role is Role.PROXY:
            shown = {name: worker.counters.get(name, 0) for name in TOTALS}
            counters.add(self.past_counters, shown)

    def _start_due(self, now: float) -> None:
        if self._stop_is_ordered:
            return
        for worker in self.workers.values():
            is_due = worker.restart_at is not None and worker.restart_at <= now
            if is_due or (worker.comes_back and worker.state is WorkerState.STOPPED):
                self._start(worker)

    def _note_readiness(self, now: float) -> None:
        if not self.were_ready and all(
            worker.state is WorkerState.READY
            for worker in self.workers.values()
            if worker.slot != METRICS
        ):
            self.were_ready = True
            log.info("VNet is ready after %.2f s", now - self.started_at)
        if self.were_ready and not self.was_healthy:
            health, _ = self._commands.judge()
            self.was_healthy = health is Health.HEALTHY

    def _watch(self, now: float, heard_until: float) -> None:
        hang_seconds = self.settings.config.supervisor.hang_seconds
        for worker in self._crew:
            worker.watch(now, hang_seconds, heard_until=heard_until, awake_since=self._awake_since)

    def _tell(self, message: m.Message, roles: Collection[Role]) -> None:
        for worker in self._crew:
            if worker.is_alive and role_of(worker.slot) in roles:
                worker.send(message)

    # -- the end --

    def _stop_workers(self) -> None:
        """Ends all workers; after a fault of the loop none stays behind either."""
        self._stop_is_ordered = True
        try:
            self._stop_in_order()
        finally:
            left = [worker for worker in self._crew if worker.pid is not None]
            put_down(left, "VNet ends after an internal error")

    def _stop_in_order(self) -> None:
        """Ends dns, then the proxies, then tun: nobody is asked for what is gone already."""
        for role in (Role.METRICS, Role.DNS, Role.PROXY, Role.TUN):
            group = [worker for worker in self._crew if role_of(worker.slot) is role]
            for worker in group:
                worker.order_stop(time.monotonic())
            while any(worker.is_alive for worker in group):
                self._turn(0.1)


def _limits(config: Config) -> RestartLimits:
    return RestartLimits(config.supervisor.restart_max, config.supervisor.restart_window_seconds)

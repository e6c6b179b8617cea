"""The supervisor: one loop that waits, looks at its workers, and carries out what follows.

What follows is decided elsewhere (`worker_states`, `restart_policy`, `clusters`, `status`); this
module joins the decisions to processes and sockets. Signal handlers only write to a pipe, so all
work happens in the loop.
"""

import contextlib
import dataclasses
import logging
import math
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from ipc import messages as m
from ipc.cluster_report import Assembly, ReportOrderError
from supervisor import clusters, configure, network, places, privileges
from supervisor.cluster_memory import ClusterMemory
from supervisor.clusters import ClusterView
from supervisor.commands import Commands
from supervisor.configure import Surroundings
from supervisor.confinement import identities
from supervisor.confinement.reach import reach_of
from supervisor.control import ControlSocket
from supervisor.dataplane import NamespaceDataPlane
from supervisor.listeners import ListenerRefusedError, Listeners
from supervisor.nameservers import Nameservers
from supervisor.notify import Notifier, watchdog_seconds
from supervisor.restart_policy import RestartLimits
from supervisor.service_link import ServiceLink
from supervisor.settings import Settings
from supervisor.worker import Worker
from supervisor.worker_states import WorkerState

log = logging.getLogger(__name__)

# The longest the loop sleeps: heartbeats and nameservers are looked at this often.
TICK_SECONDS = 0.5
# A worker that has not said READY by then never will; imports take about one second.
START_SECONDS = 30.0
# How long workers may take to end before they are killed.
GRACE_SECONDS = 3.0
# Refused listeners of one worker are told this often at most.
WARN_SECONDS = 1.0
# Listening sockets of all proxies: descriptors and kernel memory.
MAX_LISTENERS = 16384


class Supervisor:
    """One run of VNet; `run` returns when it was told to stop."""

    def __init__(
        self, settings: Settings, log_handler: logging.Handler, notifier: Notifier | None = None
    ) -> None:
        self.settings = settings
        self.workers: dict[str, Worker] = {}
        self.zones: list[str] = []
        self.reports: dict[str, ClusterView] = {}
        self.range_problems: list[str] = []
        self.were_ready = False
        self.started_at = time.monotonic()
        # Counters of worker processes that have ended, so that totals never fall.
        self.past_counters: dict[str, int] = {}
        self._assemblies: dict[str, Assembly] = {}
        # Monotonic seconds of the latest warning about a listener, by slot.
        self._warned_at: dict[str, float] = {}
        self._known_clusters: list[m.Cluster] = []
        self._log_handler = log_handler
        self._selector = selectors.DefaultSelector()
        self._registered: dict[str, int] = {}
        self._stop_is_ordered = False
        self._reload_is_ordered = False
        self._commands = Commands(self)
        self._service = ServiceLink(
            notifier or Notifier({}),
            watchdog_seconds(os.environ, os.getpid()),
            self._commands.judge,
        )

    @property
    def network(self) -> m.Network:
        return self._around.network

    def run(self) -> None:
        """Runs until SIGINT, SIGTERM or `vnet stop`.

        Raises:
            StartupError: VNet cannot run here; nothing is left behind.
        """
        with contextlib.ExitStack() as closing:
            self._set_up(closing)
            log.info("VNet starts for %s on %s", self.settings.user.name, self.network.interface)
            for worker in self.workers.values():
                self._start(worker)
            while not self._stop_is_ordered:
                self._turn(TICK_SECONDS)
            self._service.stopping()
            log.info("VNet stops")

    # -- what commands and signals ask for --

    def order_stop(self) -> None:
        """The loop ends after this turn."""
        self._stop_is_ordered = True

    def restart(self, worker: Worker) -> None:
        """Restarts a worker; this never counts as a crash."""
        worker.forget_crashes()
        if worker.is_alive:
            worker.comes_back = True
            worker.order_stop(time.monotonic(), GRACE_SECONDS)
        else:
            self._start(worker)

    def use_upstream(self, configured: Sequence[str]) -> None:
        """Takes over `dns.upstream` of a reloaded configuration."""
        self._nameservers.configure(configured)

    def use_log_level(self, message: m.SetLogLevel) -> None:
        """Every worker takes over the level, and each that is started from now on."""
        self._log_level = message.level
        self._broadcast(message, set(self.workers))

    def cluster_report(self) -> ClusterView | None:
        """What the proxies that have spoken say of the clusters."""
        views = [self.reports[slot] for slot in sorted(self.reports)]
        return clusters.combine(views) if views else None

    # -- set-up --

    def _set_up(self, closing: contextlib.ExitStack) -> None:
        settings = self.settings
        config = settings.config
        self._log_level = logging.getLevelName(logging.getLogger().level)
        # First: a signal in the middle of this must not leave half of it behind.
        self._watch_signals(closing)
        run_directory = places.RunDirectory(settings.run_dir)
        closing.callback(run_directory.close)
        is_root = os.geteuid() == 0
        user_state = places.make_state_directory(
            settings.state_dir, settings.user, change_owner=is_root
        )
        self._cluster_memory = ClusterMemory(
            settings.state_dir / f"clusters-{settings.user.name}.json"
        )
        self._known_clusters = self._cluster_memory.read()
        if config.teleport.insecure:
            log.warning(
                "teleport.insecure is set: the certificates of Teleport proxies are not verified"
            )
        prefix = places.ipv6_prefix(settings.state_dir) if self._wants_ipv6() else None
        plan = network.plan(config.network, prefix)
        self._data_plane = NamespaceDataPlane(plan)
        closing.callback(self._data_plane.close)
        # Half of the descriptors is for everything else, copies on their way to a worker included.
        limit = min(MAX_LISTENERS, privileges.raise_file_limit() // 2)
        self._listeners = Listeners(self._data_plane, config.proxy.workers, limit)
        closing.callback(self._listeners.close_all)
        self._nameservers = Nameservers(config.dns.upstream, network.dns_addresses(plan))
        chosen = identities.choose(configure.slots(config.proxy.workers), settings.user)
        self._around = Surroundings(
            network=plan,
            upstream=self._nameservers.upstream,
            keys=configure.make_keys(config.proxy.workers),
            bus_dir=run_directory.make_bus(chosen.bus_group),
            book_path=user_state / "book.sqlite",
            prompts_dir=run_directory.make_prompts(settings.user, change_owner=is_root),
        )
        self._make_workers(chosen)
        self._control = ControlSocket(
            run_directory.control_path, self._selector, self._commands.answer
        )
        closing.callback(self._control.close)
        # Last in, first out: the workers end before what they borrow is closed.
        closing.callback(self._stop_workers)

    def _wants_ipv6(self) -> bool:
        wish = self.settings.config.network.ipv6
        if wish == "off":
            return False
        has_it = Path("/proc/net/if_inet6").exists() and not any(
            _is_set(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6") for name in ("all", "default")
        )
        if not has_it:
            level = logging.WARNING if wish == "on" else logging.INFO
            log.log(level, "this host has IPv6 switched off; VNet uses IPv4 only")
        return has_it

    def _make_workers(self, chosen: identities.Identities) -> None:
        config = self.settings.config
        limits = RestartLimits(
            config.supervisor.restart_max, config.supervisor.restart_window_seconds
        )
        for slot, identity in chosen.of.items():
            reach = reach_of(slot, self.settings, self._around)
            self.workers[slot] = Worker(slot, identity, limits, reach)

    def _watch_signals(self, closing: contextlib.ExitStack) -> None:
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
            closing.callback(end.close)
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        closing.callback(signal.set_wakeup_fd, previous)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            closing.callback(signal.signal, number, signal.signal(number, _do_nothing))
        self._selector.register(
            reader, selectors.EVENT_READ, lambda _events: self._take_signals(reader)
        )

    def _take_signals(self, reader: socket.socket) -> None:
        for number in reader.recv(4096):
            if number in (signal.SIGINT, signal.SIGTERM):
                self.order_stop()
            elif number == signal.SIGHUP:
                self._reload_is_ordered = True

    def _start(self, worker: Worker) -> None:
        worker.start(time.monotonic(), self._log_handler)
        message = configure.configuration(worker.slot, self.settings, self._around, self._log_level)
        descriptors = {
            "tun": self._data_plane.tun_descriptors,
            "dns": self._data_plane.dns_descriptors,
        }
        worker.send(message, descriptors.get(worker.slot, []))

    # -- one turn of the loop --

    def _turn(self, longest: float) -> None:
        self._register_channels()
        for key, events in self._selector.select(self._timeout(longest)):
            key.data(events)
        now = time.monotonic()
        self._reap(now)
        self._start_due(now)
        self._kill_silent(now)
        self._control.drop_silent(now)
        if self._reload_is_ordered:
            self._reload_is_ordered = False
            self._service.reloading()
            log.info("%s", self._commands.reload())
        if self._nameservers.has_changed(now):
            self._use_nameservers()
        if not self._stop_is_ordered:
            are_well = not any(w.is_unkillable(now) for w in self.workers.values())
            self._service.tick(now, are_well=are_well)

    def _timeout(self, longest: float) -> float:
        now = time.monotonic()
        longest = min(longest, self._service.longest_sleep or longest)
        due = [w.restart_at - now for w in self.workers.values() if w.restart_at is not None]
        return max(0.0, min([longest, *due]))

    def _register_channels(self) -> None:
        """Brings the selector in line with which workers live and which wait to be written to."""
        for slot, worker in self.workers.items():
            if not worker.is_talking:
                if self._registered.pop(slot, None) is not None:
                    self._selector.unregister(worker)
                continue
            wanted = selectors.EVENT_READ
            if worker.wants_to_write:
                wanted |= selectors.EVENT_WRITE
            if slot not in self._registered:
                self._selector.register(worker, wanted, self._channel_handler(worker))
            elif wanted != self._registered[slot]:
                self._selector.modify(worker, wanted, self._channel_handler(worker))
            self._registered[slot] = wanted

    def _channel_handler(self, worker: Worker) -> Callable[[int], None]:
        return lambda events: self._talk(worker, events)

    def _talk(self, worker: Worker, events: int) -> None:
        if not worker.is_talking:
            return
        if events & selectors.EVENT_WRITE:
            worker.flush()
        for message in worker.receive(time.monotonic()):
            self._take(worker, message)

    def _reap(self, now: float) -> None:
        for slot, worker in self.workers.items():
            if not worker.has_ended():
                continue
            # What it said before it ended still counts.
            self._talk(worker, selectors.EVENT_READ)
            if self._registered.pop(slot, None) is not None:
                self._selector.unregister(worker)
            worker.reap(now)
            self._remember(worker.counters)
            worker.counters = {}
            self.reports.pop(slot, None)
            self._assemblies.pop(slot, None)

    def _remember(self, counters: dict[str, int]) -> None:
        for name, value in counters.items():
            if not name.endswith("_now"):
                self.past_counters[name] = self.past_counters.get(name, 0) + value

    def _start_due(self, now: float) -> None:
        if self._stop_is_ordered:
            return
        for worker in self.workers.values():
            is_due = worker.restart_at is not None and worker.restart_at <= now
            if is_due or (worker.comes_back and worker.state is WorkerState.STOPPED):
                self._start(worker)

    def _kill_silent(self, now: float) -> None:
        hang_seconds = self.settings.config.supervisor.hang_seconds
        for worker in self.workers.values():
            if worker.state is WorkerState.READY and now - worker.last_heartbeat > hang_seconds:
                worker.last_heartbeat = now
                worker.kill(f"no heartbeat for {hang_seconds:g} s")
            elif worker.state is WorkerState.STARTING and now - worker.started_at > START_SECONDS:
                worker.kill(f"not ready after {START_SECONDS:g} s")
            elif worker.kill_at is not None and now > worker.kill_at:
                worker.kill_at = None
                worker.kill("it did not end in time")

    def _use_nameservers(self) -> None:
        self._around = dataclasses.replace(self._around, upstream=self._nameservers.upstream)
        self._broadcast(m.UpstreamChanged(upstream=self._around.upstream), {"dns"})
        self._follow_clusters()  # a range may cover the new ones

    # -- what workers say --

    def _take(self, worker: Worker, message: m.AnyMessage) -> None:
        now = time.monotonic()
        match message:
            case m.Confined():
                worker.was_confined(message)
            case m.NeedsRestart():
                # Once: a repeated wish must not put off the end of the process.
                if worker.state in (WorkerState.STARTING, WorkerState.READY):
                    log.info("%s is restarted: %s", worker.slot, message.reason)
                    worker.comes_back = True
                    worker.order_stop(now, GRACE_SECONDS)
            case m.Ready():
                self._became_ready(worker, now)
            case m.Heartbeat():
                worker.heard(now, message.counters)
            case m.OpenListener():
                self._open_listener(worker, message.address, message.port)
            case m.CloseListener():
                self._listeners.close(worker.slot, message.address, message.port)
            case m.ClustersReported():
                self._hear_of_clusters(worker, message)
            case m.PeerMisbehaved():
                self._replace_accused(worker, message)
            case _:
                worker.kill(f"it sent {type(message).__name__}")

    def _became_ready(self, worker: Worker, now: float) -> None:
        if worker.state not in (WorkerState.STARTING, WorkerState.DRAINING):
            worker.kill("it became ready twice")
            return
        worker.became_ready(now)
        log.info("%s is ready after %.2f s", worker.slot, now - worker.started_at)
        for address, port, descriptor in self._listeners.of(worker.slot):
            worker.send(m.ListenerOpened(address=address, port=port), [descriptor])
        all_ready = all(w.state is WorkerState.READY for w in self.workers.values())
        if all_ready and not self.were_ready:
            self.were_ready = True
            log.info("VNet is ready after %.2f s", now - self.started_at)

    def _replace_accused(self, reporter: Worker, message: m.PeerMisbehaved) -> None:
        if message.slot not in self._around.keys[reporter.slot].peers:
            reporter.kill(f"it accuses {message.slot}, with whom it does not talk")
            return
        accused = self.workers[message.slot]
        if accused.state is WorkerState.STARTING:
            # It has said nothing yet: its predecessor is meant, which is gone.
            log.info("%s says of %s's predecessor: %s", reporter.slot, accused.slot, message.reason)
        else:
            accused.kill(f"{reporter.slot} says: {message.reason}")

    def _open_listener(self, worker: Worker, address: bytes, port: int) -> None:
        try:
            descriptor = self._listeners.open(worker.slot, self.network, address, port)
        except ListenerRefusedError as error:
            self._warn_of_listener(worker.slot, port, str(error))
            reason = str(error)[:500]
            worker.send(m.ListenerRefused(address=address, port=port, reason=reason))
        else:
            worker.send(m.ListenerOpened(address=address, port=port), [descriptor])

    def _warn_of_listener(self, slot: str, port: int, why: str) -> None:
        # A worker that asks for nonsense by the thousand must not fill the log as well.
        now = time.monotonic()
        if now - self._warned_at.get(slot, -math.inf) >= WARN_SECONDS:
            self._warned_at[slot] = now
            log.warning("%s gets no listener on port %d: %s", slot, port, why)

    def _hear_of_clusters(self, worker: Worker, message: m.ClustersReported) -> None:
        assembly = self._assemblies.setdefault(worker.slot, Assembly())
        try:
            found = assembly.take(message)
        except ReportOrderError as error:
            worker.kill(str(error))
            return
        if found is None:
            return
        before, view = self.reports.get(worker.slot), ClusterView(found, message.problem)
        if before == view:
            return
        self.reports[worker.slot] = view
        self._follow_clusters()
        # For each proxy: one that has not noticed yet may answer dns as before.
        if clusters.names_of(before) != clusters.names_of(view):
            self._broadcast(m.NamesChanged(), {"dns"})

    def _follow_clusters(self) -> None:
        report = self.cluster_report()
        if report is None:
            return
        upstream = [server.address for server in self._nameservers.upstream]
        self._known_clusters = clusters.complete(report.clusters, self._known_clusters)
        self._cluster_memory.write(self._known_clusters)
        accepted = clusters.accept(
            self._known_clusters, self.network, upstream, self._data_plane.host_addresses()
        )
        self.zones = accepted.zones
        if accepted.problems != self.range_problems:
            self.range_problems = accepted.problems
            for problem in accepted.problems:
                log.warning("%s", problem)
        if accepted.ranges != self.network.ranges:
            self._use_ranges(accepted.ranges)

    def _use_ranges(self, ranges: list[str]) -> None:
        failed = self._data_plane.set_ranges(ranges)
        for text, error in failed.items():
            # Tried again with the next report; until then its addresses would lead nowhere.
            problem = (
                f"The range {text} cannot be routed ({error.strerror}): another interface may have"
                " it; change vnet_config, or stop the other program."
            )
            log.error("%s", problem)
            self.range_problems = [*self.range_problems, problem]
        ranges = [text for text in ranges if text not in failed]
        if ranges == self.network.ranges:
            return
        changed = msgspec.structs.replace(self.network, ranges=ranges)
        self._around = dataclasses.replace(self._around, network=changed)
        log.info("virtual ranges: %s", ", ".join(ranges))
        self._broadcast(m.NetworkChanged(network=changed), set(self.workers))

    def _broadcast(self, message: m.Message, slots: set[str]) -> None:
        for slot in slots:
            worker = self.workers[slot]
            if worker.state in (WorkerState.STARTING, WorkerState.READY):
                worker.send(message)

    # -- the end --

    def _stop_workers(self) -> None:
        """Ends dns, then the proxies, then tun: nobody is asked for what is gone already."""
        self._stop_is_ordered = True
        for group in self._stop_order():
            for worker in group:
                worker.order_stop(time.monotonic(), GRACE_SECONDS)
            while any(worker.is_alive for worker in group):
                self._turn(0.1)

    def _stop_order(self) -> Iterator[list[Worker]]:
        yield [self.workers["dns"]]
        yield [worker for slot, worker in self.workers.items() if slot.startswith("proxy-")]
        yield [self.workers["tun"]]


def _do_nothing(_number: int, _frame: object) -> None:
    """The wake-up descriptor tells the loop."""


def _is_set(path: str) -> bool:
    try:
        return Path(path).read_text().strip() == "1"
    except OSError:
        return False

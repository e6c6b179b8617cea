"""Follows what the proxies say of the clusters: which zones are VNet's, which ranges are routed."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ipc import messages as m
from ipc.cluster_report import Assembly, ReportOrderError
from supervisor import clusters
from supervisor.cluster_memory import ClusterMemory
from supervisor.clusters import ClusterView, InTheWay
from supervisor.dataplane import DataPlane
from supervisor.handover import KeptReport
from supervisor.worker import Worker

log = logging.getLogger(__name__)


class ClusterFollower:
    """See the module. Reports are taken from the present worker of a slot only.

    `network()` is what is in force, `upstream()` the packed addresses of the nameservers,
    `in_the_way` as in `clusters.accept`. `use_ranges(ranges)` puts ranges into force that the data
    plane has routed; `forget_names()` has dns ask again.
    """

    def __init__(
        self,
        memory_path: Path,
        data_plane: DataPlane,
        *,
        network: Callable[[], m.Network],
        upstream: Callable[[], Sequence[bytes]],
        in_the_way: InTheWay,
        use_ranges: Callable[[list[str]], None],
        forget_names: Callable[[], None],
    ) -> None:
        self.zones: list[str] = []
        self.range_problems: list[str] = []
        self.reports: dict[str, ClusterView] = {}
        self._memory = ClusterMemory(memory_path)
        self.known = self._memory.read()
        self._data_plane = data_plane
        self._network = network
        self._upstream = upstream
        self._in_the_way = in_the_way
        self._use_ranges = use_ranges
        self._forget_names = forget_names
        self._assemblies: dict[str, Assembly] = {}
        # Since when (monotonic) a proxy asks a root cluster for the first time: by slot, profile, name.
        self._asked_since: dict[tuple[str, str, str], float] = {}

    @property
    def is_quiet(self) -> bool:
        """Whether no report has come in part only."""
        return not any(assembly.is_begun for assembly in self._assemblies.values())

    @property
    def report(self) -> ClusterView | None:
        """What the proxies that have spoken say of the clusters."""
        views = [self.reports[slot] for slot in sorted(self.reports)]
        if not views:
            return None
        return dataclasses.replace(clusters.combine(views), awaited=self._awaited())

    def _awaited(self) -> tuple[str, ...]:
        begun = time.monotonic() - clusters.FIRST_ANSWER_SECONDS
        names = {name for (*_, name), since in self._asked_since.items() if since > begun}
        return tuple(sorted(names))

    def keep(self) -> dict[str, KeptReport]:
        """What the proxies have said, for another program of this process."""
        return {
            slot: KeptReport(clusters=view.clusters, problem=view.problem)
            for slot, view in self.reports.items()
        }

    def adopt(self, reports: Mapping[str, KeptReport], known: list[m.Cluster]) -> None:
        """Goes on with what an earlier program of this process knew."""
        self.reports = {
            slot: ClusterView(kept.clusters, kept.problem) for slot, kept in reports.items()
        }
        self.known = known
        for slot in reports:
            self._note_unasked(slot)
        self.follow()

    def hear(self, worker: Worker, message: m.ClustersReported) -> None:
        """A proxy has said what it sees; nonsense costs its life."""
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
        self._note_unasked(worker.slot)
        self.follow()
        # For each proxy: one that has not noticed yet may answer dns as before.
        if clusters.names_of(before) != clusters.names_of(view):
            self._forget_names()

    def forget(self, slot: str) -> None:
        """The process of this slot has ended."""
        self.reports.pop(slot, None)
        self._assemblies.pop(slot, None)
        self._note_unasked(slot)

    def _note_unasked(self, slot: str) -> None:
        """Brings up to date which clusters the proxy of this slot asks for the first time."""
        view, now = self.reports.get(slot), time.monotonic()
        keys = [(slot, *cluster) for cluster in (clusters.unasked(view) if view else ())]
        since = {key: self._asked_since.get(key, now) for key in keys}
        others = {key: at for key, at in self._asked_since.items() if key[0] != slot}
        self._asked_since = others | since

    def follow(self) -> None:
        """Decides anew which zones and ranges are in force: a report or the host has changed."""
        report = self.report
        if report is None:
            return
        network = self._network()
        self.known = clusters.complete(report.clusters, self.known)
        self._memory.write(self.known)
        accepted = clusters.accept(self.known, network, list(self._upstream()), self._in_the_way)
        self.zones = accepted.zones
        if accepted.problems != self.range_problems:
            self.range_problems = accepted.problems
            for problem in accepted.problems:
                log.warning("%s", problem)
        if accepted.ranges != network.ranges:
            self._route(accepted.ranges, network.ranges)

    def _route(self, ranges: list[str], before: list[str]) -> None:
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
        if ranges != before:
            log.info("virtual ranges: %s", ", ".join(ranges))
            self._use_ranges(ranges)

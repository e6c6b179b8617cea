"""The proxy worker: answers dns, gives verdicts to tun, relays what was admitted."""

import asyncio
import logging
import os
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

from ipc import messages as m
from ipc.bus import Sender
from ipc.cluster_report import split
from ipc.errors import BusyError, PeerGoneError
from ipc.messages import AnyMessage, ConfigureProxy
from ipc.probe_ports import probed_proxy
from ipc.slots import SSH
from workers.proxy.admission import Admission, OpenSsh
from workers.proxy.book import Book, BookError
from workers.proxy.connection_server import ConnectionServer
from workers.proxy.desktop import DesktopNotifier
from workers.proxy.listeners import ProxyListeners
from workers.proxy.long_waits import MAX_OF_ALL_PROXIES
from workers.proxy.naming import Naming
from workers.proxy.prompts import PromptServer
from workers.proxy.reactor import Reactor
from workers.proxy.teleport.client import Teleport, default_settings
from workers.proxy.teleport.issue_tally import IssueTally
from workers.proxy.who import make_doorbell
from workers.runtime import Runtime

if TYPE_CHECKING:
    from workers.proxy.ssh.housekeeping import SshHousekeeping

log = logging.getLogger(__name__)

# Questions of dns that are worked on at once; dns has its own limit, this one is for its faults.
MAX_QUESTIONS = 2000
COUNT_SECONDS = 0.5
# A successor's first answers are as quick as its predecessor's if the clusters have answered it before
# it begins; one that is slower is not waited for.
WARM_UP_SECONDS = 2.0
# A proxy that is replaced may finish its dials for so long; until it has handed over, its successor
# cannot accept, and what programs begin meanwhile waits.
HANDOVER_SECONDS = 3.0

_WITHOUT_LOGIN = (m.ClusterState.NO_LOGIN, m.ClusterState.HARDWARE_KEY)


class ProxyWorker:
    """Joins the parts to the bus and to the supervisor."""

    def __init__(self, runtime: Runtime[ConfigureProxy]) -> None:
        config = runtime.config
        reserved = [config.network.tun_ipv4, config.network.dns_ipv4]
        self._runtime = runtime
        self._loop = asyncio.get_running_loop()
        self._questions: set[asyncio.Task[None]] = set()
        self._is_reporting = False
        self._clusters_changed = asyncio.Event()
        self._book = Book(
            Path(config.book_path), reserved=[IPv4Address(address) for address in reserved]
        )
        self._notifier = DesktopNotifier()
        self._prompts = PromptServer(
            Path(config.prompts_dir), config.common.slot, notify=self._notifier
        )
        self._teleport = Teleport(
            Path(config.teleport_home),
            default_settings(
                ca_file=config.ca_file,
                insecure=config.insecure,
                environment=dict(os.environ),
                prompter=self._prompts,
                prompt_seconds=config.mfa_seconds,
                tally=IssueTally(runtime.counters),
            ),
            on_change=self._change,
        )
        self._naming = Naming(self._teleport, self._book, config.network)
        self._ssh_files: SshHousekeeping | None = None
        self._doorbell = make_doorbell(config.network, config.access, runtime.descriptors)
        self._admission = Admission(
            doorbell=self._doorbell,
            naming=self._naming,
            teleport=self._teleport,
            reactor=Reactor(asyncio.get_running_loop()),
            answer=self._answer_tun,
            is_probe=self._is_probe,
            counters=runtime.counters,
            max_connections=config.max_connections,
            max_long_waits=max(1, MAX_OF_ALL_PROXIES // config.common.proxies),
            open_ssh=self._ssh_opener() if config.common.slot == SSH else None,
            http=config.http,
        )
        self._teleport.on_owner_gone = self._admission.cut
        self._listeners = ProxyListeners(
            runtime.send,
            self._admission.accepted,
            self._admission.is_expected,
            config.max_listeners,
        )
        self._admission.listeners = self._listeners
        self._connection_server = ConnectionServer(
            Path(config.prompts_dir), config.common.slot, self._admission.ledger
        )

    async def run(self) -> None:
        """Until the supervisor says stop, or has another proxy follow and no connection is left."""
        runtime = self._runtime
        runtime.on_message = self._hear_supervisor
        try:
            self._book.open()
        except BookError as error:
            # It is tried again with each name; without it there are no addresses.
            log.error("the address book cannot be opened: %s", error)
        await self._teleport.start()
        self._dns = runtime.serve_bus(self._hear_dns)
        self._count()
        try:
            await runtime.until_stopped(self._work())
        finally:
            await self._close()

    async def _work(self) -> None:
        runtime = self._runtime
        if runtime.config.common.is_standby:
            await self._warm_up()
        await runtime.taken_over()
        await self._prompts.start()
        await self._connection_server.start()
        if self._ssh_files is not None:
            await self._ssh_files.start()
        self._tun = runtime.join_bus("tun", self._hear_tun, self._greet_tun)
        self._is_reporting = True
        self._report()
        runtime.ready()
        await runtime.draining.wait()
        await self._hand_over()
        await self._admission.finished()

    async def _warm_up(self) -> None:
        """Returns when each cluster has answered or failed, or after a while."""
        with suppress(TimeoutError):
            async with asyncio.timeout(WARM_UP_SECONDS):
                while not all(_has_been_asked(cluster) for cluster in self._teleport.states()):
                    self._clusters_changed.clear()
                    await self._clusters_changed.wait()

    async def _hand_over(self) -> None:
        """Gives up all that a successor needs, and keeps the connections that are relayed.

        Teleport is still watched, because the end of a login cuts them.
        """
        self._is_reporting = False
        if self._ssh_files is not None:
            # The successor writes its own as soon as it may.
            await self._ssh_files.close(remove=False)
        await self._admission.hand_over(min(HANDOVER_SECONDS, self._runtime.drain_seconds))
        self._listeners.close()
        self._tun.close()
        self._dns.close()
        await self._stop_answering()
        if self._ssh_files is None:
            await self._stop_asking()
        else:
            # A login to a host begins when its connection is here, and may take a second factor.
            self._prompts.step_aside()
        self._runtime.handed_over()
        log.info("a successor takes new connections; left here: %d", self._admission.connections)

    async def _stop_answering(self) -> None:
        for task in list(self._questions):
            task.cancel()
        await asyncio.gather(*self._questions, return_exceptions=True)
        self._book.close()

    async def _stop_asking(self) -> None:
        await self._prompts.close()
        await self._notifier.close()

    async def _close(self) -> None:
        await self._admission.close()
        self._listeners.close()
        if self._ssh_files is not None:
            await self._ssh_files.close(remove=True)
        await self._teleport.close()
        await self._stop_answering()
        await self._stop_asking()
        await self._connection_server.close()
        self._doorbell.close()
        self._counting.cancel()

    # -- SSH --

    def _ssh_opener(self) -> OpenSsh:
        """For the worker of SSH alone: the others must not load what this imports."""
        from workers.proxy.ssh.housekeeping import SshHousekeeping  # noqa: PLC0415
        from workers.proxy.ssh.opening import opener  # noqa: PLC0415

        home = Path(self._runtime.config.teleport_home)
        files = SshHousekeeping(
            home,
            self._ssh_clusters,
            is_successor=self._runtime.config.common.is_standby,
            on_change=self._report_if_due,
        )
        self._ssh_files = files
        return opener(files.identity)

    def _ssh_clusters(self) -> list[str]:
        """The clusters with hosts that SSH clients may be configured for."""
        return [c.name for c in self._teleport.states() if c.state not in _WITHOUT_LOGIN]

    # -- supervisor --

    def _hear_supervisor(self, message: AnyMessage, descriptors: list[int]) -> None:
        match message:
            case m.ListenerOpened() if descriptors:
                self._listeners.opened(message, descriptors[0])
            case m.ListenerOpened():
                # The kernel takes it back when this process has no number left for it.
                full = "this worker has no descriptor left"
                self._listeners.refused(
                    m.ListenerRefused(address=message.address, port=message.port, reason=full)
                )
            case m.ListenerRefused():
                self._listeners.refused(message)
            case m.NetworkChanged():
                self._naming.use_network(message.network)
                self._doorbell.use_network(message.network)
            case m.SecurityChanged():
                self._doorbell.use_access(message.access)
                self._admission.http = message.http
            case _:
                log.error("unexpected %s from the supervisor", type(message).__name__)

    def _change(self) -> None:
        self._clusters_changed.set()
        if self._ssh_files is not None:
            self._ssh_files.changed()
        self._report_if_due()

    def _report_if_due(self) -> None:
        if self._is_reporting:
            self._report()

    def _report(self) -> None:
        problem = self._teleport.problem
        if not problem and self._ssh_files is not None:
            problem = self._ssh_files.problem
        for part in split(self._teleport.states(), problem):
            self._runtime.send(part)

    def _count(self) -> None:
        self._admission.count()
        counters = self._runtime.counters
        counters["listeners_now"] = len(self._listeners)
        counters["questions_now"] = len(self._questions)
        counters["prompts_now"] = self._prompts.waiting
        self._counting = self._loop.call_later(COUNT_SECONDS, self._count)

    # -- tun --

    def _greet_tun(self) -> None:
        # One that is about to leave must not be taken for the successor.
        if not self._runtime.draining.is_set():
            self._tun.send(m.ProxyHello())

    def _hear_tun(self, message: AnyMessage) -> None:
        if isinstance(message, m.DialRequest):
            self._admission.request(message)
        elif isinstance(message, m.DialAbandoned):
            self._admission.abandon(message.flow_id)

    def _is_probe(self, address: bytes, port: int) -> bool:
        config = self._runtime.config
        dns_ipv4 = config.network.dns_ipv4
        return probed_proxy(dns_ipv4, config.common.proxies, address, port) is not None

    def _answer_tun(self, verdict: m.DialVerdict) -> None:
        try:
            self._tun.send(verdict)
        except BusyError as error:
            log.error("a verdict was lost: %s", error)

    # -- dns --

    def _hear_dns(self, sender: Sender, message: AnyMessage) -> None:
        if isinstance(message, m.ResolveAddress):
            self._answer_dns(sender, self._address_resolved(message))
        elif isinstance(message, m.ResolveName):
            if len(self._questions) >= MAX_QUESTIONS:
                failed = m.NameResolved(request_id=message.request_id, outcome=m.NameOutcome.FAILED)
                self._answer_dns(sender, failed)
                return
            task = self._loop.create_task(self._resolve(sender, message))
            self._questions.add(task)
            task.add_done_callback(self._questions.discard)

    async def _resolve(self, sender: Sender, question: m.ResolveName) -> None:
        try:
            answer = await self._naming.resolve(question.name)
        except Exception:  # the outermost frame of the task; dns is told something
            log.exception("%s could not be resolved", question.name)
            resolved = m.NameResolved(request_id=question.request_id, outcome=m.NameOutcome.FAILED)
        else:
            resolved = m.NameResolved(
                request_id=question.request_id,
                outcome=answer.outcome,
                ipv4=answer.ipv4,
                valid_seconds=answer.valid_seconds,
            )
        self._answer_dns(sender, resolved)

    def _address_resolved(self, question: m.ResolveAddress) -> m.AddressResolved:
        try:
            name = self._naming.name_of(question.ipv4)
        except BookError as error:
            log.error("the address book cannot be read: %s", error)
            name = None
        return m.AddressResolved(request_id=question.request_id, name=name)

    def _answer_dns(self, sender: Sender, message: m.Message) -> None:
        try:
            self._dns.send(sender, message)
        except (BusyError, PeerGoneError) as error:
            # It asks another proxy, or the program asks again.
            log.debug("an answer to %s was lost: %s", sender.slot, error)


def _has_been_asked(cluster: m.Cluster) -> bool:
    """Whether it has answered, or cannot."""
    return cluster.is_configured or cluster.state is not m.ClusterState.OK


async def main(runtime: Runtime[ConfigureProxy]) -> None:
    """Runs the proxy worker until it has to stop, or has handed over and finished."""
    await ProxyWorker(runtime).run()

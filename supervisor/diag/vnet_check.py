"""Whether VNet runs, as what, and how its workers fare. Pure."""

from collections.abc import Iterator

from supervisor.diag.facts import VnetFacts
from supervisor.diag.findings import Finding, FindingId, finding
from supervisor.diag.model import CheckReport, Detail, checked
from supervisor.status import LastExitStatus, WorkerStatus
from supervisor.worker_states import WorkerState


def check_vnet(vnet: VnetFacts | None, error: str, *, is_silent: bool, version: str) -> CheckReport:
    """`error` says why there are no facts; `version` is that of this command."""
    details = [Detail(name="Version of this command", value=version)]
    if vnet is None:
        if is_silent:
            advice = "Look at its log; if it hangs, restart its service."
            return checked([finding(FindingId.VNET_SILENT, f"{error}.", advice)], details)
        advice = "Start it with sudo vnet-supervisor, or as a service (vnet service)."
        text = "VNet is not running, so much of the rest could not be checked."
        return checked([finding(FindingId.VNET_NOT_RUNNING, text, advice)], details)
    status = vnet.status
    findings = [*_reasons(vnet)]
    supervisor = status.supervisor
    if supervisor is not None:
        details += [
            Detail(name="Version of the running VNet", value=supervisor.version),
            Detail(name="Health", value=status.health.value),
            Detail(name="User", value=supervisor.user),
            Detail(name="Up", value=f"{supervisor.uptime_seconds:.0f} s"),
        ]
        if supervisor.version != version:
            findings.append(
                finding(
                    FindingId.VERSIONS_DIFFER,
                    f"VNet {supervisor.version} is running, and {version} is installed.",
                    "Have the installed version take over: vnet restart all --drain",
                )
            )
    if status.network is not None:
        details.append(Detail(name="Data plane", value=status.network.data_plane))
    for worker in status.workers or ():
        details.append(Detail(name=worker.name, value=_state(worker)))
        findings += _of_worker(worker)
    findings += _unconfined(status.workers or [])
    return checked(findings, details)


def _reasons(vnet: VnetFacts) -> Iterator[Finding]:
    told = {*vnet.network_problems, *vnet.os_problems, *vnet.login_problems}
    for reason in vnet.status.reasons:
        # These stand with what they are about; a worker that is down has a finding of its own.
        if reason in told or reason.startswith("The worker "):
            continue
        advice = "Do what the sentence says; vnet logs may tell more."
        yield finding(FindingId.VNET_DEGRADED, reason, advice)


def _of_worker(worker: WorkerStatus) -> Iterator[Finding]:
    ended = _ended(worker.last_exit)
    if worker.state in (WorkerState.FAILED, WorkerState.BACKOFF):
        given_up = "is given up" if worker.state is WorkerState.FAILED else "is restarted soon"
        yield finding(
            FindingId.WORKER_DOWN,
            f"The worker {worker.name} does not run and {given_up}; its last process {ended}.",
            f"Read vnet logs --worker {worker.name}, then run: vnet restart {worker.name}",
        )
    elif worker.restarts:
        yield finding(
            FindingId.WORKER_RESTARTED,
            f"The worker {worker.name} was restarted {worker.restarts} times; the last process {ended}.",
            f"If you did not do that, read vnet logs --worker {worker.name}",
        )


def _unconfined(workers: list[WorkerStatus]) -> Iterator[Finding]:
    names: dict[str, list[str]] = {}
    for worker in workers:
        for text in worker.confinement.missing if worker.confinement else ():
            names.setdefault(text, []).append(worker.name)
    for text, concerned in names.items():
        yield finding(
            FindingId.CONFINEMENT_INCOMPLETE,
            f"A part of the confinement of {', '.join(concerned)} is not in force: {text}.",
            "VNet works without it; install or allow what is named to have it.",
        )


def _state(worker: WorkerStatus) -> str:
    confinement = worker.confinement
    words = [worker.state.value, f"{worker.restarts} restarts"]
    if worker.last_exit is not None:
        words.append(f"last process {_ended(worker.last_exit)}")
    if confinement is not None:
        landlock = f"Landlock {confinement.landlock}" if confinement.landlock else "no Landlock"
        seccomp = f"seccomp {confinement.seccomp}" if confinement.seccomp else "no seccomp"
        privileges = "no_new_privs" if confinement.no_new_privs else "privileges can be gained"
        held = f"holds {', '.join(confinement.capabilities)}" if confinement.capabilities else ""
        words += [f"uid {confinement.uid}", landlock, seccomp, privileges, held]
    return ", ".join(filter(None, words))


def _ended(last_exit: LastExitStatus | None) -> str:
    if last_exit is None:
        return "has not ended"
    if last_exit.signal is not None:
        return f"ended with {last_exit.signal}"
    return f"ended with status {last_exit.status}"

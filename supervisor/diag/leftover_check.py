"""What a VNet that did not end well has left in the system's settings. Pure."""

from supervisor.diag.facts import LeftoverFacts
from supervisor.diag.findings import FindingId, finding
from supervisor.diag.model import CheckReport, Detail, checked

MAX_SHOWN = 20


def check_leftovers(facts: LeftoverFacts, backend: str | None, *, is_running: bool) -> CheckReport:
    """`backend` is what a running VNet uses; None if none runs, or it does not say.

    A file that is marked as VNet's belongs to the back end in use, or to nobody.
    """
    is_running = is_running or facts.is_in_use
    changes = facts.changes
    if changes is None:
        shown = "not readable for this user: run as root"
    else:
        more = [f"and {len(changes) - MAX_SHOWN} more"] if len(changes) > MAX_SHOWN else []
        shown = ", ".join([*changes[:MAX_SHOWN], *more]) or "none"
    details = [
        Detail(name="State directory", value=str(facts.state_dir)),
        Detail(name="Changes in force" if is_running else "Changes left", value=shown),
        Detail(name="Files with VNet's mark", value=", ".join(facts.marks.values()) or "none"),
    ]
    findings = []
    advice = "Start VNet, which undoes it, or run: sudo vnet repair"
    if str(facts.state_dir) != "/var/lib/vnet":
        advice += f" --state-dir {facts.state_dir}"
    if changes and not is_running:
        findings.append(
            finding(
                FindingId.LEFTOVER_CHANGES,
                f"A VNet that was killed has left changes in the system's settings ({shown}).",
                advice,
            )
        )
    # Of a VNet whose back end is not known all of them may be.
    stale = {
        owner: path
        for owner, path in facts.marks.items()
        if not is_running or (backend is not None and owner != backend)
    }
    for path in stale.values():
        if not is_running and changes and path in changes:
            continue  # said above
        findings.append(
            finding(
                FindingId.LEFTOVER_FILE,
                f"{path} is still as a VNet has left it, and sends names to nobody.",
                advice if changes else f"Take VNet's addresses out of {path}, or remove it.",
            )
        )
    return checked(findings, details)

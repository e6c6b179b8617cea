"""Whether OpenSSH reads VNet's file. Pure. Source: lib/vnet/diag/ssh.go of Teleport."""

import re

from supervisor.diag.facts import SshFacts
from supervisor.diag.findings import FindingId, finding
from supervisor.diag.model import CheckReport, SshConfigurationReport, checked
from supervisor.ssh_config_include import Inclusion

MAX_CONFIG_BYTES = 1 << 20  # a file of this size or more is not read
MAX_LINES = 200
MAX_LINE_LENGTH = 300
# What decides whether the Include counts. Other lines may hold secrets, and are left out.
_SHOWN = ("include", "host", "match")


def check_ssh(facts: SshFacts) -> CheckReport:
    """Never a problem by itself: who does not use SSH needs no Include."""
    text = facts.text
    findings = []
    if facts.inclusion is not Inclusion.FOR_ALL_HOSTS:
        said = f"{facts.config_path} does not include {facts.wanted_path}"
        if facts.inclusion is Inclusion.FOR_SOME_HOSTS:
            said = f"{facts.config_path} includes {facts.wanted_path} below a Host or Match line"
        findings.append(
            finding(
                FindingId.SSH_INCLUDE_MISSING,
                f"{said}, so ssh does not know VNet's hosts.",
                "If you use SSH through VNet, run: vnet ssh-config --install",
            )
        )
    report = SshConfigurationReport(
        user_openssh_config_path=str(facts.config_path),
        vnet_ssh_config_path=str(facts.wanted_path),
        user_openssh_config_includes_vnet_ssh_config=facts.inclusion is not Inclusion.NOT,
        user_openssh_config_exists=text is not None,
        user_openssh_config_contents=outline(text or ""),
    )
    return checked(findings, ssh=report)


def outline(text: str) -> str:
    """The lines that decide whether an Include counts; of others only how many there are."""
    kept: list[str] = []
    others = 0
    for line in [*text.splitlines(), "include"]:
        word = re.split(r"[\s=]", line.strip(), maxsplit=1)[0].lower()
        if word not in _SHOWN:
            others += 1
            continue
        if others:
            kept.append(f"# {others} other line{'s' if others > 1 else ''}")
        # A Match may run a command, with whatever in it.
        kept.append("Match ..." if word == "match" else line.strip()[:MAX_LINE_LENGTH])
        others = 0
    kept.pop()
    left = len(kept) - MAX_LINES
    return "\n".join([*kept[:MAX_LINES], *([f"# {left} more"] if left > 0 else [])])

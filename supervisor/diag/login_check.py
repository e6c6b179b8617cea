"""The logins of the tsh home, and when they end. Pure."""

from datetime import datetime

from supervisor.diag.facts import HomeFacts
from supervisor.diag.findings import FindingId, finding
from supervisor.diag.model import CheckReport, Detail, checked

SOON_SECONDS = 600.0
_OK, _EXPIRED = "ok", "login_expired"


def check_logins(home: HomeFacts, now: datetime) -> CheckReport:
    """Each profile by its state."""
    details = [Detail(name="tsh home", value=home.directory)]
    findings = []
    if home.problem:
        advice = "Log in as the VNet user: tsh login --proxy=<address>"
        findings.append(finding(FindingId.LOGIN_MISSING, f"{home.problem}.", advice))
    for login in home.logins:
        ends = login.not_after.strftime("%Y-%m-%d %H:%M UTC") if login.not_after else "unknown"
        value = f"{login.state}, user {login.user or 'unknown'}, until {ends}"
        details.append(Detail(name=login.profile, value=value))
        again = f"Log in again: vnet login {login.profile}"
        if login.state == _EXPIRED:
            text = f"The login at {login.profile} expired at {ends}."
            findings.append(finding(FindingId.LOGIN_EXPIRED, text, again))
        elif login.state != _OK:
            advice = "Do what the sentence says."
            text = f"The profile {login.profile} cannot be used: {login.problem}."
            findings.append(finding(FindingId.LOGIN_UNUSABLE, text, advice))
        elif login.not_after and (left := (login.not_after - now).total_seconds()) < SOON_SECONDS:
            text = f"The login at {login.profile} ends in {left / 60:.0f} minutes."
            findings.append(finding(FindingId.LOGIN_ENDS_SOON, text, again))
    return checked(findings, details)

"""Whether this machine's clock is right, by the clocks of proxies and by certificates. Pure."""

from collections.abc import Sequence
from datetime import datetime

from supervisor.diag.facts import HomeFacts, ProxyFacts
from supervisor.diag.findings import FindingId, finding
from supervisor.diag.model import CheckReport, Detail, checked

# Certificates are issued a minute back; one-time passwords are good for half a minute or so.
LIMIT_SECONDS = 60.0


def check_clock(
    home: HomeFacts | None, proxies: Sequence[ProxyFacts], now: datetime
) -> CheckReport:
    """The clock counts as wrong when a proxy, or the begin of a certificate, says so."""
    details = [Detail(name="This machine", value=now.strftime("%Y-%m-%d %H:%M:%S UTC"))]
    findings = []
    advice = (
        "Set the clock, best by NTP (timedatectl set-ntp true): one-time passwords and TLS need it."
    )
    for proxy in proxies:
        if proxy.skew_seconds is None:
            continue
        ahead = "ahead of" if proxy.skew_seconds < 0 else "behind"
        apart = abs(proxy.skew_seconds)
        details.append(
            Detail(
                name=proxy.address,
                value=f"{apart:.0f} s {ahead} it, give or take {proxy.skew_error_seconds:.0f} s",
            )
        )
        if apart - proxy.skew_error_seconds > LIMIT_SECONDS:
            text = f"This machine's clock is {apart:.0f} s {ahead} that of {proxy.address}."
            findings.append(finding(FindingId.CLOCK_WRONG, text, advice))
    for login in home.logins if home else ():
        if login.not_before is not None and now < login.not_before:
            late = (login.not_before - now).total_seconds()
            text = (
                f"By this machine's clock the login at {login.profile} begins only in {late:.0f} s:"
                " the clock is behind."
            )
            findings.append(finding(FindingId.CLOCK_WRONG, text, advice))
    if len(details) == 1:
        details.append(Detail(name="Proxies", value="none could be asked for the time"))
    return checked(findings, details)

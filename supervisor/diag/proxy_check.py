"""Whether Teleport proxies and clusters can be reached, as this command and as VNet. Pure."""

from collections.abc import Iterator, Sequence

from supervisor.diag.facts import ProxyFacts, VnetFacts
from supervisor.diag.findings import Finding, FindingId, finding
from supervisor.diag.model import CheckReport, Detail, checked

MAX_ADDRESSES_NAMED = 4
# How the error of a connection begins that was neither accepted nor refused.
NO_ANSWER = "no answer"


def check_proxies(vnet: VnetFacts | None, proxies: Sequence[ProxyFacts]) -> CheckReport:
    """The proxies of all logins that are good."""
    findings: list[Finding] = []
    details = []
    for proxy in proxies:
        details.append(Detail(name=proxy.profile, value=_said(proxy)))
        findings += _of_proxy(proxy)
    findings += _only_for_vnet(vnet, proxies)
    if not proxies:
        details.append(Detail(name="Proxies", value="no login is good, so none was asked"))
    return checked(findings, details)


def _of_proxy(proxy: ProxyFacts) -> Iterator[Finding]:
    where = proxy.address
    if proxy.lookup_error:
        yield finding(
            FindingId.PROXY_NOT_FOUND,
            f"The name of the Teleport proxy {where} is not found: {proxy.lookup_error}.",
            "Look whether other names are found; VNet never answers for the names of proxies.",
        )
        return
    failed = {address: error for address, error in proxy.connects if error}
    worked = [address for address, error in proxy.connects if not error]
    if proxy.connects and not worked:
        named = [f"{a}: {e}" for a, e in failed.items()][:MAX_ADDRESSES_NAMED]
        yield finding(
            FindingId.PROXY_UNREACHABLE,
            f"The Teleport proxy {where} cannot be reached ({'; '.join(named)}).",
            "Look at the network, the firewall, and whether a forward proxy is needed (HTTPS_PROXY).",
        )
        return
    # Without any IPv6 the kernel says so at once, and nobody waits.
    silent = [a for a, error in failed.items() if ":" in a and error.startswith(NO_ANSWER)]
    if silent and any(":" not in a for a in worked):
        yield finding(
            FindingId.PROXY_IPV6_BLACK_HOLE,
            f"The Teleport proxy {where} answers over IPv4 and not over IPv6"
            f" ({', '.join(silent[:MAX_ADDRESSES_NAMED])}).",
            "Mend or switch off this machine's IPv6; until then connections may begin slowly.",
        )
    if proxy.is_untrusted:
        yield finding(
            FindingId.PROXY_UNTRUSTED,
            f"The certificate of {where} is not trusted: {proxy.web_error}.",
            "For a private authority set teleport.ca_file; otherwise somebody may be in between.",
        )
    if proxy.auth_error:
        yield finding(
            FindingId.CLUSTER_UNREACHABLE,
            f"The cluster {proxy.cluster} does not answer: {proxy.auth_error}.",
            "If it is in operation, look at what is between: load balancer, forward proxy, firewall.",
        )


def _only_for_vnet(vnet: VnetFacts | None, proxies: Sequence[ProxyFacts]) -> Iterator[Finding]:
    well = {proxy.profile: proxy for proxy in proxies if proxy.server_version}
    for cluster in (vnet.status.clusters or ()) if vnet else ():
        proxy = well.get(cluster.profile)
        is_root = cluster.leaf_of is None
        if cluster.state.value == "unreachable" and proxy is not None and is_root:
            yield finding(
                FindingId.CLUSTER_UNREACHABLE_FOR_VNET,
                f"The cluster {cluster.name} answers this command, but not VNet.",
                "Wait half a minute; if it stays, compare HTTPS_PROXY and NO_PROXY of this shell with"
                " those VNet was started with.",
            )


def _said(proxy: ProxyFacts) -> str:
    words = [proxy.address, f"cluster {proxy.cluster}"]
    if proxy.forward_proxy:
        words.append(f"through {proxy.forward_proxy}")
    words += [f"{address} {error or 'answers'}" for address, error in proxy.connects]
    if proxy.web_error:
        words.append(f"web: {proxy.web_error}")
    words.append(f"Teleport {proxy.server_version}" if proxy.server_version else "no answer")
    return ", ".join(words)

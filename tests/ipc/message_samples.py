"""One or more valid values of every message, with every optional part both there and absent."""

from typing import get_args

from ipc import messages as m

PREFIX = b"\xfd" + bytes(15)
NETWORK = m.Network(
    interface="vnet0",
    mtu=65535,
    ranges=["100.64.0.0/10", "10.1.0.0/16"],
    tun_ipv4=b"\x64\x40\0\1",
    dns_ipv4=b"\x64\x40\0\2",
    ipv6_prefix=PREFIX,
    tun_ipv6=PREFIX[:15] + b"\1",
    dns_ipv6=PREFIX[:15] + b"\2",
)
WITHOUT_IPV6 = m.Network(
    interface="v",
    mtu=1280,
    ranges=["100.64.0.0/27"],
    tun_ipv4=b"\x64\x40\0\1",
    dns_ipv4=b"\x64\x40\0\2",
    ipv6_prefix=None,
    tun_ipv6=None,
    dns_ipv6=None,
)
COMMON = m.Common(
    slot="proxy-12",
    proxies=13,
    bus_dir="/run/vnet/bus",
    keys=m.BusKeys(public="p" * 40, secret="s" * 40, peers={"tun": "t" * 40, "dns": "d" * 40}),
    heartbeat_seconds=0.5,
    log_level="INFO",
)
UPSTREAM = [m.Upstream(address=b"\x7f\0\0\1"), m.Upstream(address=PREFIX, port=5353, scope="eth0")]
CLUSTER = m.Cluster(
    name="leaf.example.test",
    profile="teleport.example.test",
    leaf_of="example.test",
    state=m.ClusterState.LOGIN_EXPIRED,
    user="alice",
    expires="2026-11-22T21:00:00Z",
    zones=["leaf.example.test"],
    ranges=["100.64.0.0/10"],
    problem="The login has expired: run tsh login.",
)
ADDRESSES = (b"\x64\x40\3\4", PREFIX[:12] + b"\x64\x40\3\4")

SAMPLES: list[m.AnyMessage] = [
    m.ProxyHello(),
    *(
        m.DialRequest(
            flow_id=2**63 - 1,
            source=address,
            source_port=65535,
            destination=address,
            destination_port=1,
        )
        for address in ADDRESSES
    ),
    m.DialVerdict(flow_id=0),
    *(m.DialVerdict(flow_id=7, refusal=refusal) for refusal in m.Refusal),
    m.DialAbandoned(flow_id=7),
    m.ResolveName(request_id=1, name="n" * 253),
    *(
        m.NameResolved(request_id=1, outcome=outcome, ipv4=ipv4, valid_seconds=5.0)
        for outcome in m.NameOutcome
        for ipv4 in (None, b"\x64\x40\3\4")
    ),
    m.ResolveAddress(request_id=1, ipv4=b"\x64\x40\3\4"),
    m.AddressResolved(request_id=1, name="pg.example.test"),
    m.AddressResolved(request_id=1, name=None),
    m.ConfigureTun(common=COMMON, network=NETWORK, max_pending=1024, pending_seconds=30.0),
    m.ConfigureTun(
        common=COMMON,
        network=NETWORK,
        max_pending=1024,
        pending_seconds=30.0,
        data_plane=m.DataPlaneKind.REWRITING,
        has_family_header=True,
    ),
    m.ConfigureDns(
        common=COMMON,
        network=WITHOUT_IPV6,
        upstream=UPSTREAM,
        ttl_seconds=10,
        access=m.Access(uids=[0, 1000], user="alice"),
    ),
    m.ConfigureProxy(
        common=COMMON,
        network=NETWORK,
        teleport_home="/home/alice/.tsh",
        book_path="/var/lib/vnet/alice/book.sqlite",
        prompts_dir="/run/vnet/mfa",
        max_connections=5000,
        max_listeners=3333,
        ca_file="",
        insecure=False,
        mfa_seconds=110.0,
        http=m.HttpRules(hosts={"app.demo.test": ["*"]}, origins={"x.demo.test": ["https://y"]}),
    ),
    m.ConfigureMetrics(common=COMMON),
    m.MetricsSnapshot(
        taken_at=1795381200.5,
        started_at=1795381100.25,
        version="0.1.0",
        health="degraded",
        resident_bytes=21_000_000,
        cpu_seconds=0.5,
        workers=[
            m.WorkerFigures(
                slot="proxy-63",
                is_up=True,
                restarts=2**63 - 1,
                heartbeat_age_seconds=0.5,
                resident_bytes=38_000_000,
                cpu_seconds=0.0,
            ),
            m.WorkerFigures(
                slot="tun",
                is_up=False,
                restarts=0,
                heartbeat_age_seconds=None,
                resident_bytes=0,
                cpu_seconds=3.5,
            ),
        ],
        clusters=[
            m.ClusterFigures(
                name="leaf.example.test",
                profile="teleport.example.test",
                state=m.ClusterState.LOGIN_EXPIRED,
                expires=expires,
            )
            for expires in (None, 1795381200.0)
        ],
        cluster_count=1000,
        counters={"tun.refused_unknown_app": 2**63 - 1, "dns.in_flight_now": 0},
    ),
    m.MetricsSnapshot(
        taken_at=0.0,
        started_at=0.0,
        version="",
        health="",
        resident_bytes=0,
        cpu_seconds=0.0,
        workers=[],
        clusters=[],
        cluster_count=0,
        counters={},
    ),
    m.NetworkChanged(network=WITHOUT_IPV6),
    m.RedirectsChanged(
        redirects=[
            *(m.Redirect(address=address, port=443, local_port=40000) for address in ADDRESSES),
            m.Redirect(address=ADDRESSES[0], port=53, local_port=0, is_udp=True),
        ],
        is_complete=True,
    ),
    m.SecurityChanged(access=m.Access(uids=[0, 1000]), http=m.HttpRules()),
    m.SecurityChanged(
        access=m.Access(
            uids=[], user="alice", resolvers=[990], interface=4, can_tell=False, is_checked=False
        ),
        http=m.HttpRules(
            is_checked=False, hosts={"app.demo.test": ["*"]}, origins={"app.demo.test": []}
        ),
    ),
    m.UpstreamChanged(upstream=[]),
    m.UpstreamChanged(upstream=UPSTREAM),
    m.NamesChanged(),
    *(m.ListenerOpened(address=address, port=443) for address in ADDRESSES),
    m.ListenerRefused(address=ADDRESSES[0], port=443, reason="it is no virtual address"),
    m.SetLogLevel(level="DEBUG"),
    m.Sync(number=2**63 - 1),
    m.Drain(deadline_seconds=3600.0),
    m.TakeOver(),
    m.Stop(grace_seconds=3.0),
    m.Confined(
        uid=64_500,
        no_new_privs=True,
        capabilities=["cap_net_admin"] * 64,
        landlock=7,
        seccomp="allow-list",
        missing=["m" * 500] * 20,
    ),
    m.Confined(uid=0, no_new_privs=False, capabilities=[], landlock=None, seccomp=None, missing=[]),
    m.NeedsRestart(reason="r" * 500),
    m.Ready(),
    m.HandedOver(),
    m.Heartbeat(counters={"queries": 2**63 - 1, "in_flight_now": 0}),
    m.Synced(number=2**63 - 1),
    *(m.OpenListener(address=address, port=443) for address in ADDRESSES),
    *(m.CloseListener(address=address, port=443) for address in ADDRESSES),
    m.PeerMisbehaved(slot="dns", reason="r" * 500),
    m.ClustersReported(clusters=[CLUSTER]),
    m.ClustersReported(clusters=[], problem="There is no profile in /home/alice/.tsh."),
]

KINDS: tuple[type[m.Message], ...] = get_args(m.AnyMessage)

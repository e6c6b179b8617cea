"""The metrics as text: right for those who read it, bounded, and as documented."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from metrics_samples import snapshot
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from ipc import codec, counters
from ipc import messages as m
from ipc.permits import Role
from workers.metrics.families import families
from workers.metrics.page import Page

ROOT = Path(__file__).parents[3]
DASHBOARD = ROOT / "packaging/grafana/vnet.json"
RULES = ROOT / "packaging/prometheus/vnet.rules.yml"
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"


def page_of(shown: m.MetricsSnapshot) -> Page:
    page = Page()
    page.use(shown)
    return page


def values(shown: m.MetricsSnapshot) -> dict[tuple[str, frozenset], float]:
    _, body = page_of(shown).render("")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_text(body.decode())
        for sample in family.samples
    }


def value(shown: m.MetricsSnapshot, name: str, **labels: str) -> float:
    return values(shown)[name, frozenset(labels.items())]


def names_served() -> set[str]:
    """Names of samples; a histogram has several."""
    return {name for name, _ in values(snapshot())}


def base(name: str) -> str:
    return re.sub(r"(vnet_dns_answer_seconds)_(bucket|count|sum)$", r"\1", name)


def test_both_formats_are_read_and_say_the_same():
    page = page_of(snapshot())
    plain_type, _ = page.render("")
    type_, body = page.render(OPENMETRICS)
    assert plain_type.startswith("text/plain; version=0.0.4")
    assert type_.startswith("application/openmetrics-text; version=1.0.0")
    found = {
        (s.name, *sorted(s.labels.items())): s.value
        for f in parse_openmetrics(body.decode())
        for s in f.samples
    }
    assert found == {(name, *sorted(labels)): v for (name, labels), v in values(snapshot()).items()}


def test_each_counter_that_leaves_the_supervisor_is_shown_once():
    shown = snapshot()
    found = sorted(values(shown).values())
    for name, number in shown.counters.items():
        expected = number / 1e6 if name == "dns.latency_us" else number
        assert expected in found, name
    nothing = snapshot(counters={})
    assert len(values(nothing)) == len(values(shown))  # all from the start, as zeros


def test_connections_by_result():
    counted = {"proxy.connections_total": 70, "tun.refused_not_logged_in": 3}
    shown = snapshot(counters=counted)
    assert value(shown, "vnet_connections_total", result="accepted") == 70
    assert value(shown, "vnet_connections_total", result="not_logged_in") == 3
    results = {
        dict(labels).get("result") for name, labels in values(shown) if "connections_total" in name
    }
    assert results == {"accepted", "orphaned", *m.Refusal} - {"probe"}


def test_latencies_are_a_histogram_in_seconds():
    counted = {"dns.latency_le_1ms": 5, "dns.latency_le_5000ms": 8, "dns.latency_count": 9}
    shown = snapshot(counters=counted | {"dns.latency_us": 2_500_000})
    assert value(shown, "vnet_dns_answer_seconds_bucket", le="0.001") == 5
    assert value(shown, "vnet_dns_answer_seconds_bucket", le="5.0") == 8
    assert value(shown, "vnet_dns_answer_seconds_bucket", le="+Inf") == 9
    assert value(shown, "vnet_dns_answer_seconds_count") == 9
    assert value(shown, "vnet_dns_answer_seconds_sum") == 2.5


def test_workers_and_health():
    shown = snapshot(health="healthy")
    assert value(shown, "vnet_health", state="healthy") == 1
    assert value(shown, "vnet_health", state="degraded") == 0
    assert value(shown, "vnet_worker_up", worker="proxy-0") == 1
    assert value(shown, "vnet_worker_up", worker="proxy-1") == 0
    assert value(shown, "vnet_worker_restarts_total", worker="proxy-1") == 1
    ages = [dict(labels) for name, labels in values(shown) if name.endswith("age_seconds")]
    assert ages == [{"worker": "proxy-0"}]


def test_cluster_without_a_login_has_no_expiry():
    cluster = m.ClusterFigures(name="c", profile="p", state=m.ClusterState.NO_LOGIN, expires=None)
    shown = snapshot(clusters=[cluster])
    assert value(shown, "vnet_cluster_state", cluster="c", profile="p", state="no_login") == 1
    assert value(shown, "vnet_cluster_state", cluster="c", profile="p", state="ok") == 0
    assert not [name for name, _ in values(shown) if "expiry" in name]


def test_names_of_clusters_can_neither_break_nor_forge_a_line():
    hostile = 'x"} 1\nvnet_health{state="healthy"} 7\\'
    twice = [
        m.ClusterFigures(name=hostile, profile="\x1b[2J", state=state, expires=None)
        for state in (m.ClusterState.OK, m.ClusterState.UNREACHABLE)
    ]
    shown = snapshot(clusters=twice)
    assert value(shown, "vnet_health", state="healthy") == 0
    labels = {"cluster": hostile, "profile": "\x1b[2J", "state": "unreachable"}
    assert value(shown, "vnet_cluster_state", **labels) == 1
    _, body = page_of(shown).render(OPENMETRICS)
    list(parse_openmetrics(body.decode()))  # two samples with the same labels would be an error


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        ("*/*", False),
        ("application/openmetrics-text;version=x.y", True),
        (f"Application/OpenMetrics-Text;version={'9' * 5000}", True),
        ("text/plain;version=1.0.0\r\nX: y", False),
        # What Prometheus 3 sends.
        (
            "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=1.0.0;q=0.4",
            True,
        ),
        (";;;,,,==\xe4", False),
    ],
)
def test_format_follows_from_what_is_accepted_and_nothing_else_does(accept, is_openmetrics):
    content_type, body = page_of(snapshot()).render(accept)
    assert content_type in {
        "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores",
        "text/plain; version=0.0.4; charset=utf-8",
    }
    assert content_type.startswith("application") == is_openmetrics
    assert body.endswith(b"# EOF\n") == is_openmetrics


def test_page_is_made_once_for_all_who_ask_and_anew_for_new_figures():
    page = page_of(snapshot())
    first = page.render("")
    assert page.render("")[1] is first[1]
    assert page.render("text/plain")[1] is first[1]
    page.use(snapshot(health="healthy"))
    assert page.render("") != first


# -- what is served, and what the workers count --


def test_largest_snapshot_fits_into_a_message():
    whole = snapshot(
        workers=100,
        clusters=[
            m.ClusterFigures(
                name="n" * 249 + f"{number:04}",
                profile="p" * 253,
                state=m.ClusterState.LOGIN_EXPIRED,
                expires=1.5,
            )
            for number in range(100)
        ],
    )
    data = codec.encode(whole)
    assert codec.decode(data, Role.SUPERVISOR, Role.METRICS) == whole
    assert len(whole.counters) < 500


def test_number_of_time_series_is_as_documented():
    def count(**sizes: int) -> int:
        return sum(len(family.samples) for family in families(snapshot(**sizes)))

    none = count(workers=0, logins=0)
    # One of the two workers has no process, and so no heartbeat.
    each = count(workers=2, logins=0) - count(workers=1, logins=0) + 1
    cluster = count(workers=0, logins=1) - none
    words = {4: "four", 5: "five", 6: "six"}
    text = (ROOT / "docs/metrics.md").read_text().replace("\n", " ")
    assert f"{none}, {words[each]} for each worker and {words[cluster]} for each cluster" in text


def test_what_dns_counts_is_what_is_served():
    from workers.dns import tally

    assert [f"answers_{o}" for o in counters.DNS_OUTCOMES] == [str(o) for o in tally.Outcome]
    assert counters.LATENCY_MS == tally.BUCKETS_MS
    counted: dict[str, int] = {}
    tally.Tally(counted)
    assert set(counters.SERVED[Role.DNS]) <= set(counted)


def test_drops_are_added_up_and_unknown_or_mad_counters_left_out():
    counted = {
        "dropped_a": 2,
        "dropped_device_b": 3,
        "own": 9,
        "syns": 1,
        "packets_to_inner": 2**70,
    }
    found = counters.served(Role.TUN, counted)
    assert found["tun.dropped"] == 5
    assert found["tun.packets_to_inner"] == counters.MOST
    assert not {"tun.own", "tun.dropped_a"} & set(found)
    counters.add(found, found)
    assert found["tun.packets_to_inner"] == counters.MOST
    assert "tun.pending_now" not in counters.totals(found)
    assert counters.served(Role.METRICS, {"answered": 3}) == {}


@pytest.mark.parametrize("role", [Role.TUN, Role.PROXY])
def test_what_is_served_is_what_tun_and_proxies_count(role):
    """A counter that is not made any more would be served as 0 for ever."""
    text = "".join(path.read_text() for path in (ROOT / "workers" / role).rglob("*.py"))
    made = set(re.findall(r'"(\w+)"', text)) | {f"refused_{reason}" for reason in m.Refusal}
    for pattern in (r"packets_to_{name}", r"bytes_to_{name}", r"dropped_{drop}"):
        assert role is not Role.TUN or pattern in text
    pieces = ("packets_to_", "bytes_to_", "certificates_", "dropped")
    for name in counters.SERVED[role]:
        assert name in made or name.startswith(pieces), name


# -- documentation, dashboard, alerts --


def test_documentation_lists_every_metric_with_its_labels_and_no_other():
    rows = re.findall(
        r"^\| `(vnet_\w+)` \| (.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE
    )
    documented = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    served: dict[str, set[str]] = {}
    for name, labels in values(snapshot()):
        served.setdefault(base(name), set()).update(dict(labels))
    assert documented == served
    assert len(rows) == len(documented)


def metrics_in(expression: str) -> set[str]:
    assert expression.count("(") == expression.count(")")
    return set(re.findall(r"\bvnet_\w+", expression))


def dashboard_expressions() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    found += [each["expr"] for each in board["annotations"]["list"]]
    found += [v["definition"] for v in board["templating"]["list"] if "definition" in v]
    return found


def rules() -> list[dict]:
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def test_dashboard_asks_for_metrics_that_exist_of_the_chosen_machine():
    expressions = dashboard_expressions()
    assert len(expressions) > 30
    for expression in expressions:
        used = metrics_in(expression)
        assert used, expression
        assert used <= names_served(), expression
        if not expression.startswith("label_values"):
            assert expression.count('instance=~"$instance"') == len(
                re.findall(r"\bvnet_\w+", expression)
            )
    missing = {base(name) for name in names_served()} - {
        base(name) for expression in expressions for name in metrics_in(expression)
    }
    assert missing == {"vnet_snapshot_timestamp_seconds", "vnet_clusters", "vnet_tun_bytes_total"}


def test_dashboard_can_be_imported():
    board = json.loads(DASHBOARD.read_text())
    assert (board["id"], board["uid"], board["title"]) == (None, "vnet", "VNet")
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"


def test_alerts_use_metrics_that_exist_and_say_what_to_do():
    assert len(rules()) >= 10
    for rule in rules():
        used = metrics_in(rule["expr"])
        assert used <= names_served(), rule["alert"]
        assert used or "up{" in rule["expr"]
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert "$labels.instance" in rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith(".")


def test_values_that_alerts_and_dashboard_look_for_are_there():
    present: dict[tuple[str, str], set[str]] = {}
    for name, labels in values(snapshot()):
        for label, text in labels:
            present.setdefault((name, label), set()).add(text)
    looked_for = 0
    for expression in [*dashboard_expressions(), *(rule["expr"] for rule in rules())]:
        for name, selector in re.findall(r"(vnet_\w+)\{([^}]*)\}", expression):
            for label, wanted in re.findall(r'(\w+)!?=~?"([^"]*)"', selector):
                if label != "instance":
                    assert set(wanted.split("|")) <= present[name, label], expression
                    looked_for += 1
    assert looked_for > 5


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed"
)


@needs_promtool
def test_prometheus_takes_alerts_dashboard_and_page(tmp_path):
    def check(*arguments: str, stdin: bytes = b"") -> None:
        done = subprocess.run(
            ["promtool", *arguments], input=stdin, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()

    check("check", "rules", str(RULES))
    check("check", "metrics", stdin=page_of(snapshot()).render("")[1])
    # As recording rules, for there is no other check of expressions.
    recorded = [
        {
            "record": f"panel:{number}",
            "expr": expression.replace("$__rate_interval", "1m").replace("$instance", ".*"),
        }
        for number, expression in enumerate(dashboard_expressions())
        if not expression.startswith("label_values")
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    check("check", "rules", str(path))


@needs_promtool
def test_alerts_fire_when_they_should_and_not_before(tmp_path):
    def series(name: str, values: str, **labels: str) -> dict:
        shown = ",".join(f'{key}="{text}"' for key, text in ({"instance": "m"} | labels).items())
        return {"series": f"{name}{{{shown}}}", "values": values}

    quiet = [
        series("up", "1x40", job="vnet"),
        series("vnet_health", "0x40", state="degraded"),
        series("vnet_worker_up", "1x40", worker="tun"),
        series("vnet_worker_restarts_total", "3x40", worker="tun"),
        series("vnet_dns_answers_total", "0+600x40", outcome="own"),
        series("vnet_dns_answers_total", "0+1x40", outcome="servfail"),
        series("vnet_users_refused_total", "0+1x40", service="dns"),
        series("vnet_login_expiry_timestamp_seconds", "36000x40", cluster="c", profile="p"),
    ]
    loud = [
        series("up", "0x40", job="vnet"),
        series("vnet_health", "1x40", state="degraded"),
        series("vnet_worker_up", "0x40", worker="tun"),
        series("vnet_worker_restarts_total", "0+1x40", worker="tun"),
        series("vnet_dns_answers_total", "0+600x40", outcome="own"),
        series("vnet_dns_answers_total", "0+100x40", outcome="servfail"),
        series("vnet_users_refused_total", "0+5x40", service="dns"),
        series("vnet_http_requests_refused_total", "0+1x40"),
        series("vnet_login_expiry_timestamp_seconds", "2400x40", cluster="c", profile="p"),
        series("vnet_cluster_state", "1x40", cluster="c", profile="p", state="unreachable"),
        series("vnet_cluster_state", "1x40", cluster="d", profile="p", state="login_expired"),
        series("vnet_connections_total", "0+5x40", result="timed_out"),
        series("vnet_certificates_failed_total", "0+5x40", kind="app"),
        series("vnet_queue_length", "1x40", queue="second_factors"),
        series("vnet_snapshot_timestamp_seconds", "0x40"),
        series("vnet_dns_answer_seconds_bucket", "0x40", le="1.0"),
        series("vnet_dns_answer_seconds_bucket", "0+100x40", le="5.0"),
        series("vnet_dns_answer_seconds_bucket", "0+100x40", le="+Inf"),
    ]
    names = [rule["alert"] for rule in rules()]

    def firing(inputs: list[dict]) -> list[str]:
        tests = {
            "rule_files": [str(RULES)],
            "evaluation_interval": "1m",
            "tests": [
                {
                    "interval": "1m",
                    "input_series": inputs,
                    # None is expected, so promtool names those that fire.
                    "alert_rule_test": [
                        {"eval_time": "30m", "alertname": name, "exp_alerts": []} for name in names
                    ],
                }
            ],
        }
        path = tmp_path / "tests.yml"
        path.write_text(yaml.safe_dump(tests))
        done = subprocess.run(
            ["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False
        )
        text = done.stdout + done.stderr
        return [name for name in names if f"alertname: {name}," in text]

    assert firing(quiet) == []
    assert firing(loud) == names


def test_nothing_but_the_worker_loads_the_library():
    program = "import sys, supervisor.supervisor, supervisor.main; print('prometheus_client' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "False\n"

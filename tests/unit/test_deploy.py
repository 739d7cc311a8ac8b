"""What deploy/ ships fits the code: settings, metrics, labels, paths and files that it names exist.

Each file is parsed as what it is. Where promtool and systemd-analyze are installed they judge too:
every expression of the dashboard goes through promtool as a recording rule.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvstore.config import DaemonConfig, load_daemon_config
from kvstore.metrics import METRICS, Metric

DEPLOY = Path(__file__).parents[2] / "deploy"
BY_NAME = {metric.name: metric for metric in METRICS}
# Of Prometheus and its client, not ours.
OTHERS = {"up", "process_resident_memory_bytes"}
OTHER_LABELS = {"instance", "job", "le"}


def example() -> DaemonConfig:
    config, _ = load_daemon_config(DEPLOY / "kvstore.toml", {})
    return config


def metric_of(name: str) -> Metric:
    if name not in BY_NAME:
        base = re.sub(r"_(bucket|count|sum)$", "", name)
        assert base in BY_NAME, f"{name}: not declared in kvstore/metrics.py"
        assert BY_NAME[base].kind == "histogram"
        return BY_NAME[base]
    return BY_NAME[name]


def check_expression(expression: str) -> None:
    """Every metric exists; a counter is under rate or increase; every label is of a metric here."""
    names = set(re.findall(r"\b(?:kvstore|process)_[a-z_]+\b", expression))
    assert names or "up{" in expression, expression
    labels = set(OTHER_LABELS)
    for name in names - OTHERS:
        metric = metric_of(name)
        labels |= set(metric.labels)
        if metric.kind in ("counter", "histogram"):
            uses = re.findall(rf"(\w+)\({name}\b", expression)
            assert len(uses) == expression.count(name), f"{name}: not inside rate(): {expression}"
            assert set(uses) <= {"rate", "increase"}, expression
    grouped = re.findall(r"\b(?:by|ignoring|without|on) \(([^)]*)\)", expression)
    used = {label.strip() for group in grouped for label in group.split(",")}
    used |= set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)\"", expression))
    assert used <= labels, f"{used - labels}: no such label: {expression}"


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((DEPLOY / "grafana" / "kvstore.json").read_text())
    found: list[dict[str, Any]] = dashboard["panels"]
    return found


def expressions() -> Iterator[str]:
    for panel in panels():
        for target in panel.get("targets", ()):
            yield target["expr"]


@pytest.mark.parametrize("expression", list(expressions()))
def test_the_dashboard_asks_for_declared_metrics(expression: str) -> None:
    check_expression(expression)


def test_the_dashboard_is_whole() -> None:
    found = panels()
    identities = [panel["id"] for panel in found]
    assert len(set(identities)) == len(identities)
    cells: set[tuple[int, int]] = set()
    for panel in found:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        area = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & area, f"{panel['title']} lies over another panel"
        cells |= area
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"]["uid"] == "${datasource}"
            for target in panel["targets"]:
                shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                assert all(label in target["expr"] or label == "instance" for label in shown) or (
                    "kvstore_tier" in target["expr"]
                )


def test_every_counter_that_tells_of_trouble_is_on_the_dashboard() -> None:
    text = "\n".join(expressions())
    for name in BY_NAME:
        if re.search(r"failures|missed|refused|dropped|deadline|errors", name):
            if name.startswith(("kvstore_protocol", "kvstore_prefetch", "kvstore_connections")):
                continue
            assert name in text, f"{name}: on no panel"


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_alerts_ask_for_declared_metrics(rule: dict[str, Any]) -> None:
    check_expression(rule["expr"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"]


def test_prometheus_scrapes_where_the_daemon_listens() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    http = example().http
    assert job["static_configs"] == [{"targets": [http]}]
    assert job["job_name"] == "kvstored", "alerts and panels select it"
    for name in config["rule_files"]:
        assert (DEPLOY / name).exists()


# --- the configuration


def test_the_example_configuration_loads() -> None:
    config = example()
    assert config.cpu_bytes == 8 << 30
    assert config.tenants["research"].cpu_quota_bytes == 2 << 30


def test_what_the_example_calls_a_default_is_one() -> None:
    default, _ = load_daemon_config(None, {})
    config = example()
    changed = set()
    for line in (DEPLOY / "kvstore.toml").read_text().splitlines():
        if "=" not in line or line.startswith("#"):
            if line.startswith("[tenants"):
                break
            continue
        name = line.partition("=")[0].strip()
        if getattr(default, name) != getattr(config, name):
            changed.add(name)
            assert "default" in line, f"{name}: say what the default is"
    assert changed == {"cpu", "ssd", "ssd_capacity", "listen", "state", "log_format"}


# --- systemd


def unit() -> RawConfigParser:
    parser = RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "kvstored.service")
    return parser


def test_the_unit_lets_the_holder_live_and_finds_it_again() -> None:
    service = unit()["Service"]
    assert service["KillMode"] == "process", "control-group and mixed kill the holder"
    assert service["RuntimeDirectoryPreserve"] == "yes", "its socket is in the runtime directory"
    assert service["Type"] == "notify"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID", "keeps DRAM content"


def test_the_units_directories_are_those_of_the_configuration() -> None:
    service = unit()["Service"]
    config = example()
    runtime = Path("/run") / service["RuntimeDirectory"]
    assert config.socket_path.parent == runtime
    assert Path(config.state).parent == runtime
    assert config.ssd == f"/var/lib/{service['StateDirectory']}"
    assert service["ExecStart"].endswith("--config /etc/kvstore/kvstore.toml")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "kvstored.service").read_text()
    there = tmp_path / "kvstored.service"
    there.write_text(text.replace("/usr/bin/kvstore", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(there)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- containers


def test_the_image_copies_what_exists_and_does_not_run_as_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    root = DEPLOY.parent
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (root / source).exists(), f"{source}: COPY of what is not there"
    assert re.findall(r"^USER (\w+)$", text, re.MULTILINE) == ["kvstore"]
    assert text.count("FROM python:3.11-slim") == 2
    assert text.index("USER kvstore") > text.rindex("FROM")


def test_the_image_builds_with_extras_that_exist() -> None:
    text = (DEPLOY.parent / "pyproject.toml").read_text()
    (extras,) = re.findall(r"pip install --no-cache-dir '\.\[([a-z,]+)\]'", dockerfile())
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE)


def dockerfile() -> str:
    return (DEPLOY / "Dockerfile").read_text()


def test_the_health_check_asks_where_the_daemon_listens() -> None:
    http = example().http
    assert f"http://{http}/ready" in dockerfile()


def test_compose_mounts_what_exists_and_is_bound_to_loopback() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    for name, service in compose["services"].items():
        assert "ports" not in service, f"{name}: on the host's network there are none"
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in compose["volumes"]
    assert compose["services"]["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert "--web.listen-address=127.0.0.1:9090" in compose["services"]["prometheus"]["command"]
    limit = compose["services"]["kvstored"]["mem_limit"]
    config = example()
    assert int(limit.removesuffix("g")) << 30 >= config.cpu_bytes + (1 << 30)


def test_grafana_is_provisioned_with_what_the_dashboard_needs() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://127.0.0.1:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/kvstore.yml").read_text())["providers"]
    mounts = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]["grafana"]["volumes"]
    assert any(f":{provider['options']['path']}/" in mount for mount in mounts)


# --- Prometheus's own judgement

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool")


def promtool(*arguments: str) -> str:
    done = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@needs_promtool
def test_promtool_takes_configuration_and_alerts() -> None:
    assert "6 rules found" in promtool("check", "config", str(DEPLOY / "prometheus.yml"))


@pytest.mark.slow
@needs_promtool
def test_promtool_takes_each_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {
            "record": f"panel:{number}",
            "expr": expression.replace("$__rate_interval", "1m").replace("$instance", ".*"),
        }
        for number, expression in enumerate(expressions())
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(path))

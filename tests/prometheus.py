"""What the monitoring component asks of Prometheus, and a real Prometheus that scrapes what a test points it at.

with prometheus.scraping({"metrics": server.metrics_url, "health": server.health_url}) as running:
    running.value("millibert:answered:rate5m")
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import yaml

COMPONENTS = Path(__file__).parents[1] / "k8s" / "components"
MONITORING = COMPONENTS / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
# As Kubernetes would name it: KEDA's query and the dashboard find Pods by such a name.
POD = "millibert-6d8f9c7b5d-x2k4z"
NAMESPACE = "millibert"
# What service discovery tells of a Pod of the base, and what the operator makes of it before any relabelling of ours.
DISCOVERED = {
    "__meta_kubernetes_pod_label_app_kubernetes_io_name": "millibert",
    "__meta_kubernetes_pod_label_millibert_io_track": "stable",
    "__meta_kubernetes_pod_label_millibert_io_pool": "default",
    "namespace": NAMESPACE,
    "pod": POD,
    "container": "triton",
}
VARIABLES = {"namespace": NAMESPACE, "track": ".*", "model": ".*", "__rate_interval": "1m"}
# Slow machines start slowly; nothing waits for as long where all is well.
PATIENCE_SECONDS = 60
STOP_SECONDS = 20


@dataclass(frozen=True)
class Query:
    """A PromQL expression and where it stands."""

    where: str
    expression: str


def objects(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Every object of that kind in a component's files, in the order of their names."""
    found = [it for path in sorted(folder.glob("*.yaml")) for it in yaml.safe_load_all(path.read_text())]
    return [it for it in found if it["kind"] == kind]


def rule_files(folder: Path) -> list[Path]:
    """The component's rules, written to files that Prometheus and promtool read."""
    paths = []
    for rules in objects(MONITORING, "PrometheusRule"):
        paths.append(folder / f"{rules['metadata']['name']}.yaml")
        paths[-1].write_text(yaml.safe_dump(rules["spec"]))
    return paths


def rules() -> list[dict[str, Any]]:
    groups = [group for it in objects(MONITORING, "PrometheusRule") for group in it["spec"]["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def queries_of_rules() -> list[Query]:
    return [Query(rule.get("record") or rule["alert"], str(rule["expr"])) for rule in rules()]


def queries_of_scalers() -> list[Query]:
    scaled = objects(COMPONENTS / "keda", "ScaledObject")
    return [
        Query("keda", it["metadata"]["query"])
        for one in scaled
        for it in one["spec"]["triggers"]
        if it["type"] == "prometheus"
    ]


def queries_of_dashboard() -> list[Query]:
    """Of panels, annotations and template variables, with values in the place of variables."""
    written = [(it["name"], it["expr"]) for it in DASHBOARD["annotations"]["list"]]
    for panel in DASHBOARD["panels"]:
        written += [(panel["title"], target["expr"]) for target in panel.get("targets", ())]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            written.append((f"${variable['name']}", selector_of(variable["query"]["query"])))
    return [Query(where, substituted(expression)) for where, expression in written]


def selector_of(variable: str) -> str:
    match = re.fullmatch(r"label_values\((.+), *\w+\)", variable)
    assert match, f"{variable} is no label_values(selector, label)"
    return match[1]


def substituted(expression: str) -> str:
    """The expression as Grafana would send it; a variable that does not exist is a KeyError."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: VARIABLES[found[1] or found[2]], expression)


_STRING = re.compile(r"""(["'])(?:\\.|(?!\1).)*\1""")
# Lists of labels, matchers and ranges.
_CLAUSE = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)|\{[^}]*\}|\[[^\]]*\]")
_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\()(?![\w:])")
_WORDS = {"and", "or", "unless", "bool", "offset"}


def metrics_of(expression: str) -> set[str]:
    """The names of all series that an expression selects."""
    # Strings first: they may hold brackets.
    without_strings = _STRING.sub("''", expression)
    return set(_NAME.findall(_CLAUSE.sub(" ", without_strings))) - _WORDS


def scrape_configs(urls: dict[str, str]) -> list[dict[str, Any]]:
    """What the operator makes of our PodMonitor, for one Pod whose ports' `/metrics` are at these urls."""
    (monitor,) = objects(MONITORING, "PodMonitor")
    spec = monitor["spec"]
    job = {"sourceLabels": [_pod_label(spec["jobLabel"])], "targetLabel": "job"}
    return [
        {
            "job_name": endpoint["port"],
            "scrape_interval": "1s",
            "scrape_timeout": "1s",
            "sample_limit": spec["sampleLimit"],
            "static_configs": [
                {
                    "targets": [urlsplit(urls[endpoint["port"]]).netloc],
                    "labels": {**DISCOVERED, "endpoint": endpoint["port"]},
                }
            ],
            "relabel_configs": [_snake_case(it) for it in (job, *endpoint.get("relabelings", ()))],
            "metric_relabel_configs": [_snake_case(it) for it in endpoint.get("metricRelabelings", ())],
        }
        for endpoint in spec["podMetricsEndpoints"]
    ]


def _pod_label(name: str) -> str:
    return f"__meta_kubernetes_pod_label_{re.sub('[^a-zA-Z0-9_]', '_', name)}"


def _snake_case(relabelling: dict[str, Any]) -> dict[str, Any]:
    return {re.sub("([A-Z])", r"_\1", key).lower(): value for key, value in relabelling.items()}


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that runs."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def samples(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series, now."""
        result = self.get("query", query=expression)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, expression: str) -> float | None:
        """Of the only series; None where there is none."""
        found = self.samples(expression)
        assert len(found) <= 1, f"{expression} has {len(found)} series"
        return found[0][1] if found else None

    def catch_up(self) -> None:
        """Wait until all that was counted so far is scraped, and seen by rules that read what other rules recorded."""
        for last in (self._scrapes, self._evaluations, self._evaluations):
            self._wait_for_newer(last)

    def _wait_for_newer(self, last: Callable[[], list[datetime]]) -> None:
        now = datetime.now(UTC)
        # Before its first turn there is no target.
        until(lambda: all(it > now for it in last() or [now]), lambda: f"{self.url} does not go on")

    def _scrapes(self) -> list[datetime]:
        return [datetime.fromisoformat(it["lastScrape"]) for it in self.get("targets")["activeTargets"]]

    def _evaluations(self) -> list[datetime]:
        return [datetime.fromisoformat(it["lastEvaluation"]) for it in self.get("rules")["groups"]]


def until(condition: Callable[[], bool], complaint: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.2)


@contextlib.contextmanager
def scraping(urls: dict[str, str]) -> Iterator[Prometheus]:
    """A Prometheus with the component's rules that scrapes one Pod every second, for as long as the `with`."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("there is no prometheus on the PATH (Debian's package has that name)")
    with tempfile.TemporaryDirectory(prefix="prometheus-") as made:
        folder = Path(made)
        config = {
            "global": {"evaluation_interval": "1s"},
            "rule_files": [str(path) for path in rule_files(folder)],
            "scrape_configs": scrape_configs(urls),
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*command, "--web.listen-address=127.0.0.1:0"], stdout=log, stderr=subprocess.STDOUT
            )
        try:
            yield Prometheus(_url(process, folder / "log"))
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where it listens, once it answers."""
    found: list[str] = []

    def answers() -> bool:
        assert process.poll() is None, f"prometheus ended with {process.returncode}:\n{log.read_text()}"
        listening = [it for it in psutil.Process(process.pid).net_connections() if it.status == psutil.CONN_LISTEN]
        if not listening:
            return False
        url = f"http://127.0.0.1:{listening[0].laddr.port}"
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
                found.append(url)
        except OSError:
            # Listening comes before it is ready, which it says with 503.
            return False
        return True

    until(answers, lambda: f"prometheus is not ready after {PATIENCE_SECONDS} s:\n{log.read_text()}")
    return found[0]

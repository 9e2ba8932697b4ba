"""A real Prometheus scrapes a real Triton and its supervisor as the PodMonitor says, with all rules loaded."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from tests import prometheus
from tests.conftest import RunningServer
from tests.prometheus import DASHBOARD, NAMESPACE, POD, Prometheus, substituted

import millibert
from millibert_ensemble import contract

pytestmark = pytest.mark.e2e

LOAD_SECONDS = 4.0
THREADS = 12
# Of the requests, one in so many is a client's mistake.
MISTAKE_EVERY = 3
BUSY = 40

# What neither Triton nor its supervisor exposes on a machine like this: each by what does expose it.
ELSEWHERE = {
    # kube-state-metrics
    "kube_deployment_created",
    "kube_deployment_spec_replicas",
    "kube_deployment_status_replicas_available",
    "kube_horizontalpodautoscaler_spec_max_replicas",
    "kube_horizontalpodautoscaler_spec_min_replicas",
    "kube_horizontalpodautoscaler_status_condition",
    "kube_horizontalpodautoscaler_status_current_replicas",
    "kube_horizontalpodautoscaler_status_desired_replicas",
    "kube_pod_container_resource_limits",
    "kube_pod_container_status_restarts_total",
    "kube_pod_init_container_status_restarts_total",
    # cAdvisor, in the kubelet
    "container_cpu_cfs_periods_total",
    "container_cpu_cfs_throttled_periods_total",
    "container_cpu_usage_seconds_total",
    "container_memory_working_set_bytes",
    # KEDA's operator
    "keda_scaled_object_errors_total",
    # Triton with a GPU
    "nv_gpu_memory_total_bytes",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_utilization",
    # Prometheus itself
    "ALERTS",
    "up",
}


@pytest.fixture(scope="module")
def server(release, triton) -> Iterator[RunningServer]:
    with triton(release.repository, "--health-port=0", "--", "--metrics-config=summary_latencies=true") as running:
        yield running


@dataclass
class Observed:
    """A Prometheus that has seen answers and mistakes, then refusals of a busy server; and what it said in between."""

    prometheus: Prometheus
    answered: int
    mistaken: int
    error_ratio_before_busy: float | None


@pytest.fixture(scope="module")
def observed(server) -> Iterator[Observed]:
    with prometheus.scraping({"metrics": server.metrics_url, "health": server.health_url}) as running:
        # Counters start to be watched before anything is counted.
        running.catch_up()
        answered, mistaken = load(server)
        running.catch_up()
        before = running.value("millibert:error_ratio:rate5m")
        refuse_as_busy(server)
        running.catch_up()
        yield Observed(running, answered, mistaken, before)


def load(server: RunningServer) -> tuple[int, int]:
    """Several threads send for some seconds; how many requests were answered, and how many were mistakes."""
    end = time.monotonic() + LOAD_SECONDS

    def send(_: int) -> tuple[int, int]:
        answered = mistaken = 0
        while time.monotonic() < end:
            client.classify(["where is my parcel", "I want my money back, and soon"])
            answered += 1
            if answered % MISTAKE_EVERY == 0:
                with pytest.raises(millibert.InvalidRequest):
                    client.classify("hello", top_k=1000)
                mistaken += 1
        return answered, mistaken

    with (
        millibert.connect(server.grpc_url, server.models[0], timeout=30) as client,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        counts = list(pool.map(send, range(THREADS)))
    return sum(answered for answered, _ in counts), sum(mistaken for _, mistaken in counts)


def refuse_as_busy(server: RunningServer) -> None:
    """Send what may wait for less time than any text takes to be tokenized."""
    tensor = {"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["where is my parcel"]}
    body = json.dumps({"parameters": {contract.QUEUE_TIMEOUT_PARAMETER: 0.001}, "inputs": [tensor]}).encode()
    for _ in range(BUSY):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.http_url}/v2/models/{server.models[0]}/infer", body, timeout=30)
        assert caught.value.code == 503
        caught.value.close()


@pytest.fixture(scope="module")
def exposed(server) -> set[str]:
    """The names of all series of the server and of its supervisor."""
    scraped = ""
    for url in (server.metrics_url, f"{server.health_url}/metrics"):
        with urllib.request.urlopen(url, timeout=10) as answer:
            scraped += answer.read().decode()
    # By hand: prometheus_client's parser appends _total to what is called a counter without it.
    return set(re.findall(r"^[a-zA-Z_:][\w:]*", scraped, re.MULTILINE))


def queries() -> list[prometheus.Query]:
    return [*prometheus.queries_of_rules(), *prometheus.queries_of_scalers(), *prometheus.queries_of_dashboard()]


def test_every_metric_that_is_named_exists(exposed):
    recorded = {rule["record"] for rule in prometheus.rules() if "record" in rule}
    for query in queries():
        named = prometheus.metrics_of(query.expression)
        assert named <= exposed | recorded | ELSEWHERE, query


def test_what_is_said_to_be_exposed_elsewhere_is_needed_and_is_not_here(exposed):
    named = {name for query in queries() for name in prometheus.metrics_of(query.expression)}
    assert named >= ELSEWHERE
    assert not exposed & ELSEWHERE


def test_names_are_found_wherever_they_stand():
    expression = """
        max by (a) (rate(b_total{c="}d", e=~'f(g'}[5m]) offset 1h) / on (h) group_left (i) (j:k:rate5m > bool 1e6)
        or absent(l) unless m
    """
    assert prometheus.metrics_of(expression) == {"b_total", "j:k:rate5m", "l", "m"}


def test_both_endpoints_are_scraped_with_the_labels_that_everything_relies_on(observed):
    targets = observed.prometheus.get("targets")["activeTargets"]
    assert {it["health"] for it in targets} == {"up"}, [it["lastError"] for it in targets]
    expected = {"job": "millibert", "namespace": NAMESPACE, "pod": POD, "track": "stable", "pool": "default"}
    assert {it["labels"]["endpoint"] for it in targets} == {"metrics", "health"}
    for target in targets:
        assert expected.items() <= target["labels"].items()


def test_few_series_are_stored_and_none_that_is_dropped(observed):
    (count,) = [
        value
        for labels, value in observed.prometheus.samples('scrape_samples_post_metric_relabeling{endpoint="metrics"}')
    ]
    (monitor,) = prometheus.objects(prometheus.MONITORING, "PodMonitor")
    assert 50 < count < monitor["spec"]["sampleLimit"] / 5
    assert observed.prometheus.samples('{__name__=~"nv_inference_compute_.*_summary_us.*"}') == []


def test_no_rule_is_in_error(observed):
    rules = [rule for group in observed.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(prometheus.rules())
    assert [(it["name"], it.get("lastError")) for it in rules if it["health"] != "ok"] == []


def test_what_is_answered_is_counted(observed):
    assert observed.answered > 0
    answered = f'nv_inference_request_success{{model!~"{"|".join(contract.COMPOSING_MODELS)}"}}'
    # The canary's and those of the warm-up are in it too.
    assert observed.prometheus.value(answered) >= observed.answered
    assert observed.prometheus.value("millibert:answered:rate5m") > 0


def test_clients_mistakes_are_no_errors_and_are_counted(observed):
    assert observed.mistaken > THREADS
    invalid = 'sum(millibert_refused_requests_total{reason="invalid"})'
    assert observed.prometheus.value(invalid) == observed.mistaken
    assert observed.error_ratio_before_busy == 0


def test_refusals_of_a_busy_server_are_errors(observed):
    assert observed.prometheus.value('sum(millibert_refused_requests_total{reason="busy"})') == BUSY
    sent = observed.answered + BUSY
    # The canary's texts are among the answered ones; rates are extrapolated.
    assert observed.prometheus.value("millibert:error_ratio:rate5m") == pytest.approx(BUSY / sent, rel=0.5)


def test_stages_and_pods_have_their_figures(observed):
    running = observed.prometheus
    assert running.value("millibert:p99_seconds:pod") > 0
    assert running.value("millibert:waiting:pod") > 0
    assert 0 <= running.value("millibert:padding:ratio") < 1
    assert running.value("millibert:canary_failures:ratio5m") == 0
    texts = {labels["model"]: value for labels, value in running.samples("millibert:texts_per_execution:stage")}
    assert set(texts) == {*contract.COMPOSING_MODELS, "support"}
    # Requests have two texts, the canary's and the busy ones have one; under load the engine executes several together.
    assert 1 < texts["support"] <= 2 < texts[contract.BERT]


def test_an_ensemble_adds_next_to_nothing_to_the_queues(observed):
    """So a sum over all models is the queue of an ensemble as well as of a fused release, which has one model."""
    queue = "nv_inference_queue_duration_us"
    share = observed.prometheus.value(f'sum({queue}{{model="support"}}) / sum({queue})')
    assert share < 0.01


def test_the_autoscaler_finds_the_queues(observed):
    queries = prometheus.queries_of_scalers()
    assert queries
    for query in queries:
        assert observed.prometheus.value(query.expression) > 0, query


def test_the_dashboard_finds_data_and_the_labels_of_its_legends(observed):
    looked_at = 0
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            expression = substituted(target["expr"])
            if prometheus.metrics_of(expression) & ELSEWHERE:
                continue
            looked_at += 1
            found = observed.prometheus.samples(expression)
            assert found, (panel["title"], expression)
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert all(legend <= set(labels) for labels, _ in found), (panel["title"], legend)
    assert looked_at >= 20

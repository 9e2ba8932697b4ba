"""Queries in the manifests name metrics and models that a real server has, and autoscaling looks at queues."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from tests.manifests import OVERLAYS, SUBJECTS, Document, Rendered, parse, render, render_subject

from millibert_ensemble import contract
from millibert_ensemble.health import Health

METRIC = re.compile(r"\b(?:nv|millibert)_[a-z0-9_]+")
RECORDED = re.compile(r"\bmillibert:[a-z0-9_:]+")
MODEL = re.compile(r"""\bmodel\s*(?:=~|!~|!=|=)\s*["']([^"']+)["']""")
# Triton's on a machine with a GPU, from its documentation.
ON_GPUS = {
    "nv_gpu_utilization",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_power_usage",
    "nv_gpu_power_limit",
    "nv_energy_consumption",
}
QUEUES = {"nv_inference_queue_duration_us", "nv_inference_pending_request_count"}


def queries(rendered: Rendered) -> Iterator[str]:
    """Yield every PromQL expression: of rules, of scalers, of dashboards."""
    for group in (group for it in rendered.of("PrometheusRule") for group in it["spec"]["groups"]):
        yield from (str(rule["expr"]) for rule in group["rules"])
    yield from scaler_queries(rendered)
    for config in rendered.of("ConfigMap"):
        for name, text in config["data"].items():
            if name.endswith(".json"):
                yield from expressions(json.loads(text))


def scaler_queries(rendered: Rendered) -> Iterator[str]:
    for trigger in (trigger for it in rendered.of("ScaledObject") for trigger in it["spec"]["triggers"]):
        yield trigger["metadata"]["query"]


def expressions(node: Document) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("expr"), str):
            yield node["expr"]
        for child in node.values():
            yield from expressions(child)
    for child in node if isinstance(node, list) else ():
        yield from expressions(child)


@pytest.fixture(scope="module")
def real(release, triton) -> set[str]:
    """The name of every series of a real server with the manifests' options for metrics, and of its supervisor."""
    (pods,) = render(OVERLAYS["prod-cpu"]).servers()
    arguments = parse(pods.main["args"])
    options = [it for it in arguments.triton_options if it.startswith("--metrics-")] if arguments else []
    with (
        triton(release.repository, "--", *options) as server,
        urllib.request.urlopen(server.metrics_url, timeout=10) as answer,
    ):
        scraped = answer.read().decode()
    health, registry = Health(), CollectorRegistry()
    health.watch([contract.BERT])
    registry.register(health)
    return set(re.findall(r"^[a-z_0-9]+", scraped + generate_latest(registry).decode(), re.MULTILINE))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_metrics_that_queries_name_exist(subject, real):
    rendered = render_subject(subject)
    rules = [rule for it in rendered.of("PrometheusRule") for group in it["spec"]["groups"] for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for query in queries(rendered):
        assert set(METRIC.findall(query)) <= real | ON_GPUS, query
        assert set(RECORDED.findall(query)) <= recorded, query


def test_a_metric_that_does_not_exist_is_found_out(real):
    assert "nv_inference_queue_duration_us" in real
    assert "nv_inference_queue_duration_ms" not in real
    assert METRIC.findall("sum(rate(nv_inference_queue_duration_ms{a='b'}[1m]))") == ["nv_inference_queue_duration_ms"]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_models_that_queries_name_are_those_of_every_release(subject):
    """Of the ensemble nobody but its owner knows the name, and its queue is always empty."""
    for query in queries(render_subject(subject)):
        named = {model for matcher in MODEL.findall(query) for model in matcher.split("|")}
        assert named <= {*contract.COMPOSING_MODELS, "$model"}, query


@pytest.mark.parametrize("overlay", ["prod-cpu", "prod-gpu-mig", "canary"])
def test_autoscaling_looks_at_queues(overlay):
    """Not at the use of a GPU, which says nothing about who waits."""
    found = list(scaler_queries(render(OVERLAYS[overlay])))
    assert found
    for query in found:
        assert set(METRIC.findall(query)) <= QUEUES
        assert "DCGM" not in query

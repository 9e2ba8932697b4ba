"""Parameters read from manifests: a kustomization, rendered by kubectl, or a file of what was rendered before."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from load.scaling.parameters import (
    DEFAULT_DOWN,
    DEFAULT_UP,
    Autoscaler,
    Behaviour,
    CpuSignal,
    Fallback,
    Parameters,
    Pods,
    Policy,
    QueueSignal,
    Rules,
    Select,
)
from millibert._errors import UsageError

CONTAINER = "triton"
# The one query whose answer is simulated: what waits in the queues of all models, in requests.
_QUERY = re.compile(
    r"\s*sum\s*\(\s*rate\s*\(\s*nv_inference_queue_duration_us\s*(?:\{[^}]*\})?\s*\[(?P<window>\w+)\]\s*\)\s*\)\s*/\s*1e6\s*"
)
_DURATION = re.compile(r"(\d+)(ms|s|m|h)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
# What tolerates the loss of a node for how long, where a Pod does not say: the API server adds it.
_EVICTION_SECONDS = 300.0
_LOST = "node.kubernetes.io/unreachable"
# KEDA's own defaults.
_POLLING_SECONDS = 30.0

Document = Mapping[str, Any]


def read_parameters(path: Path) -> Parameters:
    """Read the parameters of the one autoscaled Deployment; raises `UsageError`."""
    documents = load(path)
    scalers = [it for it in documents if it["kind"] in ("ScaledObject", "HorizontalPodAutoscaler")]
    if len(scalers) != 1:
        raise UsageError(f"{path}: {len(scalers)} autoscalers (ScaledObject, HorizontalPodAutoscaler), not one")
    (scaler,) = scalers
    try:
        autoscaler = _keda(scaler) if scaler["kind"] == "ScaledObject" else _hpa(scaler)
        target = scaler["spec"]["scaleTargetRef"]["name"]
        pods = _pods(documents, target)
        return Parameters(autoscaler, pods, _scrape(documents))
    except KeyError as error:
        raise UsageError(
            f"{path}: {scaler['kind']} {scaler['metadata']['name']}: no {error} where one is needed"
        ) from error


def load(path: Path) -> list[Document]:
    """The objects of a kustomization (a folder) or of a YAML file; raises `UsageError`."""
    try:
        text = _rendered(path) if path.is_dir() else path.read_text(encoding="utf-8")
        return [document for document in yaml.safe_load_all(text) if document]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {error}") from error


def _rendered(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        raise UsageError(f"{folder}: kubectl is needed to render it; or give a file of what `kubectl kustomize` prints")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{folder}: {done.stderr.strip()}")
    return done.stdout


def _keda(scaled: Document) -> Autoscaler:
    spec = scaled["spec"]
    triggers = spec["triggers"]
    if len(triggers) != 1 or triggers[0]["type"] != "prometheus":
        raise UsageError(f"ScaledObject {scaled['metadata']['name']}: only one Prometheus trigger can be simulated")
    (trigger,) = triggers
    if trigger.get("metricType", "AverageValue") != "AverageValue":
        raise UsageError(f"a trigger with metricType {trigger['metricType']} cannot be simulated")
    facts = trigger["metadata"]
    query = _QUERY.fullmatch(facts["query"])
    if query is None:
        raise UsageError(f"this query cannot be simulated: {facts['query']}")
    polling = float(spec.get("pollingInterval", _POLLING_SECONDS))
    signal = QueueSignal(
        float(facts["threshold"]),
        seconds(query["window"]),
        polling if trigger.get("useCachedMetrics") else None,
        _fallback(spec.get("fallback")),
    )
    behaviour = spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior", {})
    floor = int(spec.get("minReplicaCount", 0))
    if floor < 1:
        raise UsageError("minReplicaCount is 0: nothing waits in the queue of a Pod that is not there")
    return _autoscaler(scaled, floor, int(spec.get("maxReplicaCount", 100)), signal, behaviour)


def _fallback(spec: Document | None) -> Fallback | None:
    if spec is None:
        return None
    behaviour = Behaviour(spec.get("behavior", Behaviour.STATIC))
    return Fallback(int(spec["failureThreshold"]), int(spec["replicas"]), behaviour)


def _hpa(hpa: Document) -> Autoscaler:
    spec = hpa["spec"]
    if len(spec["metrics"]) != 1 or spec["metrics"][0]["type"] != "ContainerResource":
        raise UsageError(
            f"HorizontalPodAutoscaler {hpa['metadata']['name']}: only one ContainerResource can be simulated"
        )
    resource = spec["metrics"][0]["containerResource"]
    if resource["name"] != "cpu" or resource["container"] != CONTAINER or resource["target"]["type"] != "Utilization":
        raise UsageError(f"only the utilisation of the CPUs of {CONTAINER} can be simulated, not {resource}")
    signal = CpuSignal(resource["target"]["averageUtilization"] / 100)
    return _autoscaler(hpa, int(spec.get("minReplicas", 1)), int(spec["maxReplicas"]), signal, spec.get("behavior", {}))


def _autoscaler(
    scaler: Document, floor: int, ceiling: int, signal: QueueSignal | CpuSignal, behaviour: Document
) -> Autoscaler:
    up, down = _rules(behaviour.get("scaleUp"), DEFAULT_UP), _rules(behaviour.get("scaleDown"), DEFAULT_DOWN)
    return Autoscaler(f"{scaler['kind']} {scaler['metadata']['name']}", floor, ceiling, signal, up, down)


def _rules(spec: Document | None, default: Rules) -> Rules:
    if spec is None:
        return default
    policies = tuple(Policy(it["type"], it["value"], it["periodSeconds"]) for it in spec.get("policies", ()))
    return Rules(
        float(spec.get("stabilizationWindowSeconds", default.window)),
        policies or default.policies,
        Select(spec.get("selectPolicy", Select.MAX)),
        float(spec.get("tolerance", default.tolerance)),
    )


def _pods(documents: Iterable[Document], name: str) -> Pods:
    found = [it for it in documents if it["kind"] == "Deployment" and it["metadata"]["name"] == name]
    if not found:
        raise UsageError(f"the autoscaler's Deployment {name} is not there")
    spec = found[0]["spec"]["template"]["spec"]
    (triton,) = [it for it in spec["containers"] if it["name"] == CONTAINER]
    probes = [triton[probe] for probe in ("startupProbe", "readinessProbe") if probe in triton]
    behind_gateway = any(it["kind"] == "GRPCRoute" for it in documents)
    return Pods(
        pre_stop=_pre_stop(triton),
        probing=float(sum(probe.get("periodSeconds", 10) for probe in probes)),
        connection_age=None if behind_gateway else _connection_age(triton.get("args", ())),
        eviction=_eviction(spec.get("tolerations", ())),
    )


def _pre_stop(container: Document) -> float:
    """How long the hook sleeps; both forms of it."""
    hook = container.get("lifecycle", {}).get("preStop", {})
    if "sleep" in hook:
        return float(hook["sleep"]["seconds"])
    command = hook.get("exec", {}).get("command", ())
    return float(command[1]) if len(command) == 2 and command[0] == "sleep" else 0.0


def _connection_age(arguments: Sequence[str]) -> float:
    """Triton's option; without it connections live until their servers end."""
    ages = [text.partition("=")[2] for text in arguments if text.startswith("--grpc-max-connection-age=")]
    return int(ages[-1]) / 1000 if ages else float("inf")


def _eviction(tolerations: Iterable[Document]) -> float:
    own = [it["tolerationSeconds"] for it in tolerations if it.get("key") == _LOST and "tolerationSeconds" in it]
    return float(own[0]) if own else _EVICTION_SECONDS


def _scrape(documents: Iterable[Document]) -> float | None:
    for monitor in (it for it in documents if it["kind"] == "PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint.get("port") == "metrics" and "interval" in endpoint:
                return seconds(endpoint["interval"])
    return None


def seconds(text: str) -> float:
    """A duration of Prometheus (`90s`, `1m30s`) in seconds; raises `UsageError`."""
    parts = _DURATION.findall(text)
    if "".join(number + unit for number, unit in parts) != text or not parts:
        raise UsageError(f"not a duration: {text}")
    return sum(int(number) * _SECONDS[unit] for number, unit in parts)

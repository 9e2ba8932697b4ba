"""The autoscaler in simulation: cases whose answers are known, with parameters from the manifests, and the command."""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
from xml.etree import ElementTree

import pytest
import yaml
from tests import manifests
from tests.manifests import ROOT
from tests.test_scaling_parts import DELAYS, KEPT, LINEAR, PODS, queue, scaler

from load import autoscaling
from load.scaling import parameters as p
from load.scaling.manifests import read_parameters, seconds
from load.scaling.scenarios import SCENARIOS, Scenario, lines, steps
from load.scaling.simulation import Setting, simulate, summarise
from millibert._errors import UsageError

# All together.


def setting(signal, rate=3000.0, curve=LINEAR, **changes):
    changed = {"floor": 2, "ceiling": 100, **changes}
    return Setting(curve, p.Parameters(scaler(signal, **changed), PODS, 10.0), rate, 50.0, DELAYS)


CONSTANT = Scenario("constant", "nothing happens", 600, steps((0, 1)))


# 3,000 requests/s keep 3 CPUs busy and let 30 requests wait, however many replicas there are.
@pytest.mark.parametrize(
    ("signal", "analytic"),
    [(p.CpuSignal(target), 3 / target) for target in (0.3, 0.5, 0.6, 0.75, 0.9)]
    + [(queue(target), 30 / target) for target in (1, 2, 3, 5, 10)],
)
def test_under_constant_load_it_converges_to_the_analytic_number(signal, analytic):
    """And stays there; what is within the HPA's tolerance of it is as good."""
    (replicas,) = {moment.replicas for moment in simulate(setting(signal), CONSTANT)}
    assert replicas == pytest.approx(analytic, rel=0.1) or replicas == math.ceil(analytic)


def test_a_step_takes_as_long_as_its_parts():
    """Twice as many replicas at the first sync that sees it, no more for a minute, and a start for each lot of Pods."""
    scenario = Scenario("step", "", 400, steps((0, 1), (100, 2.5)))
    moments = list(simulate(setting(queue(8), rate=2700.0), scenario))
    assert {moment.replicas for moment in moments[:100]} == {4}
    first = next(moment.at for moment in moments if moment.replicas > 4)
    # Prometheus looks every 10 s, the HPA every 15.
    assert 100 < first <= 125
    assert [moments[at].replicas for at in (first, first + 59, first + 60)] == [8, 8, 16]
    assert next(moment.at for moment in moments if moment.ready == 8) == first + 20
    assert next(moment.at for moment in moments if moment.ready == 16) == first + 60 + 20


def test_cpu_time_cannot_ask_for_more_than_its_target_leaves():
    """Full is full: with a target of 0.9 each look at the CPUs adds a ninth, however much more comes."""
    scenario = Scenario("step", "", 400, steps((0, 1), (100, 3)))
    moments = list(simulate(setting(p.CpuSignal(0.9), rate=2700.0), scenario))
    grown = sorted({moment.replicas for moment in moments})
    assert grown[:4] == [3, 4, 5, 6]


def test_lost_metrics_leave_what_there_is_or_the_fallback():
    scenario = Scenario("lost", "", 900, steps((0, 1), (300, 3)), metrics_lost=(200, 800))
    held = list(simulate(setting(queue(10)), scenario))
    assert {moment.replicas for moment in held[200:800]} == {3}
    fallen_back = list(simulate(setting(queue(10, fallback=p.Fallback(3, 12, p.Behaviour.HIGHER))), scenario))
    # The fourth failure is 45 s after the first; twice three, then 12 within a minute more.
    assert {moment.replicas for moment in fallen_back[200:245]} == {3}
    assert {moment.replicas for moment in fallen_back[330:800]} == {12}


def test_the_summary_of_a_lost_zone():
    scenario = Scenario("loss", "", 120, steps((0, 1)), zone_lost=60)
    about = setting(queue(5))
    found = summarise(about, scenario, list(simulate(about, scenario)))
    assert found.seconds == 120
    assert found.requests == 120 * 3000
    # 6 replicas, two of them in the zone: a third of the requests of ten seconds.
    assert found.failed == pytest.approx(10 * 1000)
    assert (found.seconds_out, found.longest_out) == (10, 10)
    assert found.requests_out == pytest.approx(10 / 120)
    assert found.mean_ideal == 3
    assert found.over_provision == pytest.approx(found.mean_replicas / 3 - 1)
    assert found.beyond_measured == 0


def test_every_scenario_is_what_it_says():
    assert set(SCENARIOS) == {"step", "ramp", "spike", "node-loss", "lost-metrics", "day"}
    for scenario in SCENARIOS.values():
        loads = [scenario.load(now) for now in range(-10, int(scenario.seconds), 10)]
        assert all(0 < load < 6 for load in loads)
    assert lines((0, 1), (10, 3))(5) == 2
    assert [SCENARIOS["spike"].load(now) for now in (299, 300, 359, 360)] == [1, 5, 5, 1]
    assert SCENARIOS["day"].load(4 * 3600) < 0.5 < 1.5 < SCENARIOS["day"].load(20 * 3600)


# The manifests.


@pytest.fixture(scope="module", params=["keda", "hpa-cpu"])
def component(request):
    return request.param


@pytest.fixture(scope="module")
def rendered(component, tmp_path_factory):
    """The base, a gateway and one of the autoscalers, as documents."""
    manifests.need("kubectl")
    names = manifests.complete([component, "gateway-grpc"])
    return manifests.render(manifests.overlay_of(names, tmp_path_factory.mktemp(component)))


def written(documents, folder):
    path = folder / "rendered.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    return path


def test_parameters_are_read(rendered, component, tmp_path):
    found = read_parameters(written(rendered.documents, tmp_path))
    assert found.autoscaler.floor >= 2
    assert found.autoscaler.up.window == 0
    assert found.autoscaler.up.policies == (p.Policy("Percent", 100, 60), p.Policy("Pods", 4, 60))
    assert (found.autoscaler.down.window, found.autoscaler.down.policies) == (300, (p.Policy("Percent", 10, 60),))
    pods = rendered.servers()[0]
    assert found.pods.pre_stop == 10
    assert found.pods.probing == sum(pods.main[it]["periodSeconds"] for it in ("startupProbe", "readinessProbe"))
    assert found.pods.connection_age is None
    assert found.pods.eviction == 300
    signal = found.autoscaler.signal
    if component == "keda":
        assert isinstance(signal, p.QueueSignal)
        assert (signal.window, signal.cached) == (60, None)
        assert signal.fallback is not None
        assert signal.fallback.behaviour is p.Behaviour.HIGHER
    else:
        assert isinstance(signal, p.CpuSignal)
        assert 0 < signal.target < 1


def scaled_object(documents):
    (found,) = [it for it in documents if it["kind"] == "ScaledObject"]
    return found["spec"]


def deployment(documents):
    (found,) = [it for it in documents if it["kind"] == "Deployment"]
    return found["spec"]["template"]["spec"]


def behaviour(documents):
    return scaled_object(documents)["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]


def trigger(documents):
    return scaled_object(documents)["triggers"][0]


PATHS = {
    "floor": (lambda it: scaled_object(it).update(minReplicaCount=5), lambda it: it.autoscaler.floor, 5),
    "ceiling": (lambda it: scaled_object(it).update(maxReplicaCount=9), lambda it: it.autoscaler.ceiling, 9),
    "target": (lambda it: trigger(it)["metadata"].update(threshold="7"), lambda it: it.autoscaler.signal.target, 7),
    "window": (
        lambda it: trigger(it)["metadata"].update(query=trigger(it)["metadata"]["query"].replace("[1m]", "[90s]")),
        lambda it: it.autoscaler.signal.window,
        90,
    ),
    "cached": (
        lambda it: (trigger(it).update(useCachedMetrics=True), scaled_object(it).update(pollingInterval=20)),
        lambda it: it.autoscaler.signal.cached,
        20,
    ),
    "fallback": (
        lambda it: scaled_object(it).update(fallback={"failureThreshold": 1, "replicas": 6}),
        lambda it: it.autoscaler.signal.fallback,
        p.Fallback(1, 6, p.Behaviour.STATIC),
    ),
    "up": (
        lambda it: behaviour(it).pop("scaleUp"),
        lambda it: it.autoscaler.up,
        p.DEFAULT_UP,
    ),
    "down": (
        lambda it: behaviour(it)["scaleDown"].update(stabilizationWindowSeconds=60, selectPolicy="Disabled"),
        lambda it: (it.autoscaler.down.window, it.autoscaler.down.select),
        (60, p.Select.DISABLED),
    ),
    "tolerance": (
        lambda it: behaviour(it)["scaleDown"].update(tolerance="0.2"),
        lambda it: it.autoscaler.down.tolerance,
        0.2,
    ),
    "pre_stop": (
        lambda it: deployment(it)["containers"][0]["lifecycle"].update(preStop={"sleep": {"seconds": 3}}),
        lambda it: it.pods.pre_stop,
        3,
    ),
    "probing": (
        lambda it: deployment(it)["containers"][0].update(startupProbe={"periodSeconds": 20}, readinessProbe={}),
        lambda it: it.pods.probing,
        30,
    ),
    "eviction": (
        lambda it: deployment(it).update(
            tolerations=[{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 30}]
        ),
        lambda it: it.pods.eviction,
        30,
    ),
    "connection_age": (
        lambda it: it.remove(next(each for each in it if each["kind"] == "GRPCRoute")),
        lambda it: it.pods.connection_age,
        300,
    ),
    "scrape": (
        lambda it: it.append(
            {
                "kind": "PodMonitor",
                "metadata": {"name": "millibert"},
                "spec": {
                    "podMetricsEndpoints": [
                        {"port": "health", "interval": "1m"},
                        {"port": "metrics", "interval": "30s"},
                    ]
                },
            }
        ),
        lambda it: it.scrape,
        30,
    ),
}


@pytest.mark.parametrize("component", ["keda"], indirect=True)
@pytest.mark.parametrize("name", PATHS)
def test_a_parameter_is_what_the_manifest_says(rendered, tmp_path, name):
    change, read, expected = PATHS[name]
    before = read(read_parameters(written(rendered.documents, tmp_path)))
    documents = copy.deepcopy(rendered.documents)
    change(documents)
    assert read(read_parameters(written(documents, tmp_path))) == expected != before


@pytest.mark.parametrize("component", ["keda"], indirect=True)
@pytest.mark.parametrize("name", ["ceiling", "target", "window", "up", "down", "probing", "connection_age", "scrape"])
def test_a_changed_manifest_changes_the_simulation(rendered, tmp_path, name):
    def outcome(documents):
        arguments = ["--curve", str(KEPT), "--manifests", str(written(documents, tmp_path)), "--scenario", "step"]
        return autoscaling.run(_parsed(arguments))["outcomes"]

    documents = copy.deepcopy(rendered.documents)
    PATHS[name][0](documents)
    assert outcome(documents) != outcome(rendered.documents)


def _parsed(arguments):
    parser = argparse.ArgumentParser()
    autoscaling.configure(parser)
    parser.set_defaults(json=False)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("component", ["keda"], indirect=True)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda it: it.append(next(each for each in it if each["kind"] == "ScaledObject")), "2 autoscalers"),
        (lambda it: it.remove(next(each for each in it if each["kind"] == "ScaledObject")), "0 autoscalers"),
        (
            lambda it: it.remove(next(each for each in it if each["kind"] == "Deployment")),
            "Deployment millibert is not",
        ),
        (lambda it: trigger(it)["metadata"].update(query="avg(DCGM_FI_DEV_GPU_UTIL)"), "query cannot be simulated"),
        (lambda it: trigger(it).update(metricType="Value"), "metricType Value"),
        (lambda it: trigger(it).update(type="cpu"), "only one Prometheus trigger"),
        (lambda it: trigger(it)["metadata"].pop("threshold"), "no 'threshold'"),
        (lambda it: scaled_object(it).update(minReplicaCount=0), "nothing waits in the queue of a Pod that is not"),
    ],
)
def test_manifests_that_cannot_be_simulated_are_told(rendered, tmp_path, change, reason):
    documents = copy.deepcopy(rendered.documents)
    change(documents)
    with pytest.raises(UsageError, match=reason):
        read_parameters(written(documents, tmp_path))


def test_what_is_no_manifest_is_told(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_parameters(tmp_path / "none.yaml")
    (tmp_path / "wrong.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="not YAML"):
        read_parameters(tmp_path / "wrong.yaml")
    manifests.need("kubectl")
    with pytest.raises(UsageError, match="kustomization"):
        read_parameters(tmp_path)


@pytest.mark.parametrize(("text", "expected"), [("1m", 60), ("90s", 90), ("1m30s", 90), ("500ms", 0.5), ("2h", 7200)])
def test_durations(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "5", "m", "5 s", "1d"])
def test_what_is_no_duration_is_told(text):
    with pytest.raises(UsageError, match="not a duration"):
        seconds(text)


@pytest.mark.parametrize("component", ["keda"], indirect=True)
def test_the_query_counts_the_pods_of_the_deployment_and_no_others(rendered):
    """Names of a Deployment's Pods: its own, a hash of 8 to 10 characters, 5 more. Prometheus anchors its patterns."""
    (pattern,) = re.findall(r'pod=~"([^"]+)"', trigger(rendered.documents)["metadata"]["query"])
    assert re.fullmatch(pattern, "millibert-7d9c5b8f6d-x2x9z")
    for other in ("millibert-canary-7d9c5b8f6d-x2x9z", "millibert-l4-7d9c5b8f6d-x2x9z", "other-7d9c5b8f6d-x2x9z"):
        assert not re.fullmatch(pattern, other)


@pytest.mark.parametrize("component", ["keda"], indirect=True)
def test_a_canary_keeps_its_own_number(rendered, tmp_path):
    del rendered
    found = manifests.render(manifests.overlay_of(manifests.complete(["canary", "keda"]), tmp_path))
    replicas = {pods.owner["metadata"]["name"]: pods.owner["spec"].get("replicas") for pods in found.servers()}
    assert replicas == {"millibert": None, "millibert-canary": 2}


# The command.


@pytest.mark.parametrize("component", ["keda"], indirect=True)
def test_the_command_simulates_and_draws(rendered, tmp_path, capsys):
    path = written(rendered.documents, tmp_path)
    arguments = ["--curve", str(KEPT), "--manifests", str(path)]
    assert autoscaling.main([*arguments, "--scenario", "spike", "--plot", str(tmp_path / "spike.svg"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (outcome,) = found["outcomes"]
    assert outcome["scenario"] == "spike"
    assert [it["at"] for it in outcome["course"]] == list(range(0, 1800, 15))
    assert max(it["replicas"] for it in outcome["course"]) == outcome["peak_replicas"]
    kinds = [it.tag.rpartition("}")[2] for it in ElementTree.parse(tmp_path / "spike.svg").getroot().iter()]
    assert kinds.count("polyline") == 5
    assert autoscaling.main([*arguments, "--scenario", "step", "--target", "2", "8"]) == 0
    few, many = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert (few[:2], many[:2]) == (["step", "2"], ["step", "8"])
    # Mean replicas: the lower the target, the more.
    assert float(few[9]) > float(many[9])


@pytest.mark.parametrize("component", ["keda"], indirect=True)
def test_wrong_usage_is_told(rendered, tmp_path, capsys):
    path = written(rendered.documents, tmp_path)
    plot = ["--plot", str(tmp_path / "a.svg"), "--target", "2"]
    assert autoscaling.main(["--curve", str(KEPT), "--manifests", str(path), *plot]) == 1
    assert "--plot draws one target" in capsys.readouterr().err
    assert autoscaling.main(["--curve", str(KEPT), "--manifests", str(path), "--p99-ms", "1"]) == 1
    assert "no measured rate is within" in capsys.readouterr().err


@pytest.mark.parametrize("manifests_of", ["keda", "hpa-cpu"])
def test_the_page_shows_what_the_command_prints(manifests_of, capsys):
    manifests.need("kubectl")
    place = {"keda": "k8s/overlays/prod-cpu", "hpa-cpu": "docs/scaling/hpa-cpu"}[manifests_of]
    assert autoscaling.main(["--curve", str(KEPT), "--manifests", str(ROOT / place)]) == 0
    page = (ROOT / "docs" / "scaling.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line in page

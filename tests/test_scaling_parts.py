"""The parts of the autoscaler's simulation: the HPA's decisions, what it is told, and Pods that come, serve and go."""

from __future__ import annotations

import subprocess

import pytest
import yaml
from tests import manifests
from tests.manifests import ROOT
from tests.test_service_curve import curve_of, figures

from load.scaling import parameters as p
from load.scaling.cluster import Cluster, Delays, Replica
from load.scaling.controller import Controller, wanted_for_cpu, wanted_for_total
from load.scaling.curve import read_curve
from load.scaling.signals import KedaSignal, MetricsServerSignal, Samples, Seen

KEPT = ROOT / "docs" / "scaling" / "curve.json"
UP = p.Rules(0, (p.Policy("Percent", 100, 60), p.Policy("Pods", 4, 60)))
DOWN = p.Rules(300, (p.Policy("Percent", 10, 60),))


def scaler(signal=None, floor=2, ceiling=100, up=UP, down=DOWN):
    return p.Autoscaler("ScaledObject test", floor, ceiling, signal or queue(), up, down)


def queue(target=4.0, window=60.0, cached=None, fallback=None):
    return p.QueueSignal(target, window, cached, fallback)


# What the HPA wants.


@pytest.mark.parametrize(
    ("total", "replicas", "wanted"),
    # 0.1 of tolerance around 4 each: 36 to 44 for ten replicas.
    [(40, 10, 10), (44, 10, 10), (36, 10, 10), (44.1, 10, 12), (35.9, 10, 9), (400, 10, 100), (0, 10, 0), (80, 10, 20)],
)
def test_replicas_for_what_waits(total, replicas, wanted):
    assert wanted_for_total(total, 4.0, replicas, scaler()) == wanted


def test_tolerances_may_differ():
    careful = scaler(up=p.Rules(0, UP.policies, tolerance=0.0), down=p.Rules(0, DOWN.policies, tolerance=0.5))
    assert wanted_for_total(40.1, 4.0, 10, careful) == 11
    assert wanted_for_total(21, 4.0, 10, careful) == 10


@pytest.mark.parametrize(
    ("used", "unready", "replicas", "wanted"),
    [
        ([0.6] * 10, 0, 10, 10),
        ([0.9] * 10, 0, 10, 15),
        ([0.3] * 10, 0, 10, 5),
        # Those on their way count as idle when more are wanted: 9 / 15 is 0.6.
        ([0.9] * 10, 5, 15, 15),
        ([0.9] * 10, 2, 12, 15),
        # The direction does not change because of them.
        ([0.7] * 10, 10, 20, 20),
        # When fewer are wanted they do not count.
        ([0.3] * 10, 2, 12, 5),
        ([], 4, 4, 4),
    ],
)
def test_replicas_for_cpu_time(used, unready, replicas, wanted):
    assert wanted_for_cpu(used, unready, 0.6, replicas, scaler(p.CpuSignal(0.6))) == wanted


# What it does.


def course(controller, replicas, wanted, syncs, start=0.0):
    """Replicas after each of so many syncs, 15 s apart."""
    found = []
    for number in range(syncs):
        replicas = controller.sync(start + 15 * number, replicas, wanted)
        found.append(replicas)
    return found


def test_policies_bound_a_step_up():
    # Doubled at once, then not before a minute has passed: 4, 8, 16, 32, 64, 100.
    assert course(Controller(scaler()), 4, 100, 21) == [8] * 4 + [16] * 4 + [32] * 4 + [64] * 4 + [100] * 5


def test_the_larger_of_two_policies_counts_unless_the_smaller_is_selected():
    assert course(Controller(scaler()), 2, 100, 1) == [6]
    smaller = scaler(up=p.Rules(0, UP.policies, p.Select.MIN))
    assert course(Controller(smaller), 2, 100, 1) == [4]
    disabled = scaler(up=p.Rules(0, UP.policies, p.Select.DISABLED))
    assert course(Controller(disabled), 2, 100, 9) == [2] * 9


def test_kubernetes_own_rules_double_at_every_sync():
    usual = scaler(up=p.DEFAULT_UP, down=p.DEFAULT_DOWN)
    assert course(Controller(usual), 4, 100, 5) == [8, 16, 32, 64, 100]


def test_fewer_only_after_the_window_and_step_by_step():
    controller = Controller(scaler())
    assert course(controller, 20, 20, 1) == [20]
    # What was wanted 300 s ago still counts at 285 s, and no longer at 300 s.
    assert course(controller, 20, 5, 20, start=15) == [20] * 19 + [18]
    # From 18: a tenth a minute, rounded so that something happens.
    assert course(controller, 18, 5, 12, start=315) == [18] * 3 + [16] * 4 + [14] * 4 + [12]


def test_a_window_for_more_waits_for_the_lowest_proposal():
    controller = Controller(scaler(up=p.Rules(60, UP.policies)))
    assert course(controller, 4, 4, 1) == [4]
    assert course(controller, 4, 8, 4, start=15) == [4, 4, 4, 8]


def test_without_a_metric_nothing_changes():
    assert course(Controller(scaler()), 7, None, 50) == [7] * 50


def test_floor_and_ceiling_hold_whatever_is_wanted():
    assert course(Controller(scaler(floor=3, ceiling=10)), 4, 1000, 5)[-1] == 10
    assert course(Controller(scaler(floor=3)), 4, 0, 40)[-1] == 3
    # Also without a metric.
    assert Controller(scaler(floor=3)).sync(0, 1, None) == 3
    assert Controller(scaler(ceiling=10)).sync(0, 12, None) == 10


# What it is told.


def sampled(values, every=10.0, keep=60.0):
    """Samples of a counter, of whatever names, at each scrape."""
    samples = Samples(keep)
    for index, each in enumerate(values):
        samples.scrape(index * every, each)
    return samples


def test_a_steady_counter_has_its_rate():
    samples = sampled([{1: 30.0 * index, 2: 1000 + 20.0 * index} for index in range(10)])
    assert samples.rate(94, 60) == pytest.approx(5)
    assert sampled([{1: 5.0}]).rate(0, 60) is None
    assert Samples(60).rate(0, 60) is None


SERIES: dict[str, list[int | None]] = {
    "steady": [30 * index for index in range(20)],
    "young": [None] * 15 + [0, 40, 90, 100, 160],
    "gone": [100 * index for index in range(14)] + [None] * 6,
    "idle": [7] * 20,
    "erratic": [0, 1, 1, 50, 51, 400, 400, 401, 500, 520, 530, 530, 530, 900, 1000, 1001, 1010, 1500, 1600, 1700],
}


# Never where the window begins at a sample: versions of Prometheus differ about whether that one is in it.
@pytest.mark.parametrize("at", [61, 104, 154, 165, 172, 188])
@pytest.mark.parametrize("names", [("steady",), ("young", "gone"), tuple(SERIES)])
def test_rates_are_those_of_prometheus(tmp_path, at, names):
    promtool = manifests.need("promtool")
    samples = Samples(60)
    for index in range(at // 10 + 1):
        here = {number: SERIES[name][index] for number, name in enumerate(names)}
        samples.scrape(index * 10, {number: float(it) for number, it in here.items() if it is not None})
    ours = samples.rate(at, 60)
    written = [
        {"series": f'waited{{pod="{name}"}}', "values": " ".join("_" if it is None else str(it) for it in SERIES[name])}
        for name in names
    ]
    # promtool has no tolerance: what it is to agree with is rounded on its side.
    expected = [] if ours is None else [{"labels": "{}", "value": round(ours, 6)}]
    asked = {"expr": "round(sum(rate(waited[1m])), 1e-6)", "eval_time": f"{at}s", "exp_samples": expected}
    test = {"interval": "10s", "input_series": written, "promql_expr_test": [asked]}
    # promtool reads series no further than the last evaluation of rules, of which there are none.
    document = {"rule_files": [], "evaluation_interval": "1s", "tests": [test]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(document))
    done = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def keda(fallback=None, cached=None, each=40.0):
    """KEDA's signal, with 4 Pods that have waited so long in the last two minutes."""
    signal = queue(cached=cached, fallback=fallback)
    made = KedaSignal(scaler(signal), signal, scrape_seconds=15)
    watch(made, 0, 120, each)
    return made


def watch(signal, start, stop, each):
    for now in range(start, stop):
        signal.observe(now, [Seen(pod, now * each / 4, 0.0, True) for pod in range(4)])


def test_keda_hands_on_what_waits():
    # 40 wait, 4 for each: 10 replicas.
    assert keda().wanted(120, 4, lost=False) == 10


def test_lost_metrics_end_in_the_fallback():
    signal = keda(p.Fallback(3, 12, p.Behaviour.HIGHER))
    # Failures up to the threshold leave everything as it is; then, the floor of the fallback, or what there is.
    assert [signal.wanted(120 + 15 * sync, 4, lost=True) for sync in range(5)] == [None, None, None, 12, 12]
    assert signal.wanted(200, 20, lost=True) == 20
    # One answer, and the count begins anew.
    watch(signal, 200, 300, 40.0)
    assert signal.wanted(300, 20, lost=False) == 10
    assert signal.wanted(315, 20, lost=True) is None


@pytest.mark.parametrize(
    ("behaviour", "wanted"),
    [
        ("static", (12, 12)),
        ("currentReplicas", (4, 20)),
        ("currentReplicasIfHigher", (12, 20)),
        ("currentReplicasIfLower", (4, 12)),
    ],
)
def test_behaviours_of_the_fallback(behaviour, wanted):
    fallback = p.Fallback(0, 12, p.Behaviour(behaviour))
    assert tuple(keda(fallback).wanted(120, current, lost=True) for current in (4, 20)) == wanted


def test_without_a_fallback_lost_metrics_change_nothing():
    assert [keda().wanted(120 + 15 * sync, 4, lost=True) for sync in range(9)] == [None] * 9


def test_a_cached_answer_is_kept_for_the_polling_interval():
    signal = keda(cached=60)
    assert signal.wanted(120, 4, lost=False) == 10
    assert signal.wanted(165, 4, lost=True) == 10
    assert signal.wanted(180, 4, lost=True) is None


def test_the_metrics_server_sees_cpu_time_of_ready_pods():
    signal = MetricsServerSignal(scaler(p.CpuSignal(0.5)), p.CpuSignal(0.5))
    for now in range(40):
        signal.observe(now, [Seen(0, 0, 1.0 * now, True), Seen(1, 0, 0.8 * now, True), Seen(2, 0, 0.1 * now, False)])
    # (1 + 0.8 + 0 for the one that starts) / 0.5 = 3.6
    assert signal.wanted(40, 3, lost=False) == 4
    assert signal.wanted(40, 3, lost=True) is None


# The Pods.

# 100 requests/s in 20 ms, 1,000 at most; CPU and what waits are linear in the rate.
LINEAR = curve_of(
    *((rate, figures(rate, p99_ms=20, waiting=rate / 100, cpu=rate / 1000)) for rate in (100, 500, 1000)),
    (2000, figures(2000, p99_ms=1020, refused=0.55, waiting=900, cpu=1)),
)
PODS = p.Pods(pre_stop=10, probing=5, connection_age=None, eviction=300)
DELAYS = Delays(schedule=10, start=5, notice=2, failures=10, node=50)


def cluster(replicas, pods=PODS, zones=3):
    made = Cluster(Replica(LINEAR), pods, DELAYS, zones)
    made.begin(-100, replicas)
    return made


def test_within_what_it_sustains_a_replica_is_as_measured():
    served = Replica(LINEAR).serve(500, 0)
    assert (served.answered, served.refused, served.p99_ms, served.backlog) == (500, 0, 20, 0)
    assert (served.waited, served.cpu) == (5, 0.5)


def test_what_cannot_be_answered_waits_and_then_is_refused():
    replica, backlog, refused = Replica(LINEAR), 0.0, []
    for _ in range(6):
        served = replica.serve(1500, backlog)
        # Nothing is lost and nothing comes from nowhere.
        assert served.answered + served.refused + served.backlog == pytest.approx(1500 + backlog)
        backlog = served.backlog
        refused.append(served.refused)
    # 950 a second (between 1,000 at 1,000 and 900 at 2,000); as many may wait, and the queue is full after 2 seconds.
    assert served.answered == pytest.approx(950)
    assert backlog == pytest.approx(950)
    assert refused == pytest.approx([0, 150, 550, 550, 550, 550])
    assert served.p99_ms == pytest.approx(20 + 1000)
    assert served.cpu == 1
    # And it is worked off at full speed.
    after = replica.serve(100, backlog)
    assert after.answered == 1000
    assert after.backlog == pytest.approx(50)


def test_the_model_of_overload_is_near_what_was_measured():
    """The kept curve: as long as it was measured, from an empty queue, at each rate above what is sustained."""
    curve = read_curve(KEPT)
    replica = Replica(curve)
    over = [point for point in curve.points if point.median.refused > 0.05]
    assert over
    for point in over:
        backlog, waited, refused = 0.0, 0.0, []
        for _ in range(int(curve.seconds)):
            served = replica.serve(point.rate, backlog)
            backlog, waited = served.backlog, waited + served.waited
            refused.append(served.refused / point.rate)
        assert served.p99_ms == pytest.approx(point.median.p99_ms, rel=0.1)
        assert sum(refused[1:]) / len(refused[1:]) == pytest.approx(point.median.refused, abs=0.1)
        # A second to work off what is left. Those that are refused in the end wait, too, before the tokenizer.
        waiting = (waited + backlog / 2) / (curve.seconds + 1)
        assert waiting == pytest.approx(point.median.waiting, rel=0.5)


def test_a_new_pod_takes_its_time():
    pods = cluster(3)
    pods.scale(0, 4)
    assert pods.replicas(0) == pods.there(0) == 4
    # 10 s to be scheduled, 5 to start, 5 for the probes, 2 until callers know.
    assert [pods.ready(now) for now in (0, 19, 20)] == [3, 3, 4]
    assert [pods.step(now, 1200).busiest for now in (0, 21, 22)] == [400, 400, 300]
    assert [len(pods.seen(now)) for now in (14, 15)] == [3, 4]


def test_without_a_gateway_callers_learn_of_a_new_pod_when_a_connection_is_closed():
    pods = cluster(3, p.Pods(pre_stop=10, probing=5, connection_age=300, eviction=300))
    pods.scale(0, 4)
    # One of three connections of all ages, each closed at 300 s: after 100.
    assert [pods.step(now, 1200).busiest for now in (22, 121, 122)] == [400, 400, 300]


def test_a_deleted_pod_serves_until_callers_know_and_ends_after_its_pre_stop():
    pods = cluster(4)
    pods.scale(0, 3)
    assert pods.replicas(0) == pods.ready(0) == 3
    assert [pods.step(now, 1200).busiest for now in (0, 1, 2)] == [300, 300, 400]
    assert [pods.there(now) for now in (9, 10)] == [4, 3]


def test_pods_that_are_not_ready_go_first():
    pods = cluster(3)
    pods.scale(0, 5)
    pods.scale(1, 3)
    assert pods.ready(30) == 3


def test_a_lost_zone_fails_until_it_is_noticed_and_counts_until_it_is_evicted():
    pods = cluster(6)
    pods.lose(0, zone=0)
    lost = [pods.step(now, 600).failed for now in range(12)]
    assert lost == [200] * 10 + [0] * 2
    assert pods.step(12, 600).busiest == 150
    assert (pods.ready(1), pods.there(1)) == (4, 4)
    # 50 s until the control plane knows, 300 s more.
    assert [pods.replicas(now) for now in (1, 349, 350)] == [6, 6, 4]
    pods.scale(350, 6)
    assert pods.ready(400) == 6
    assert {pod.zone for pod in pods.all if pod.is_there(400)} == {1, 2}


def test_with_nobody_there_everything_fails():
    assert cluster(0).step(0, 50).failed == 50

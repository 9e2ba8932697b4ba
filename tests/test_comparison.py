from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from load.comparison import BETWEEN_STAGES, Comparison, Judgement, compare, describe_arrival
from load.noise import quantile
from load.results import Answers, Arrival, Histogram, Outcome, Run, Stage, summarise


def stage(model: str, compute: float, queue: float = 0.2) -> Stage:
    total = queue + compute + 0.15
    return Stage(
        model=model,
        queue_ms=queue,
        input_ms=0.05,
        compute_ms=compute,
        output_ms=0.05,
        total_ms=total,
        texts_per_execution=4,
    )


def made(
    seed: int = 0,
    *,
    slower: float = 1.0,
    rate: float = 200,
    seconds: int = 20,
    wrong: float = 0.0,
    bert_ms: float = 2.0,
    **changed: object,
) -> Run:
    """A run whose latencies wander from second to second, as those of a shared machine do."""
    rng = np.random.default_rng(seed)
    due = np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))
    wander = np.zeros(seconds + 1)
    for at in range(1, len(wander)):
        wander[at] = 0.5 * wander[at - 1] + rng.normal(0, 0.03)
    latency = 0.004 * slower * np.exp(wander[due.astype(int)]) * rng.gamma(8, 1 / 8, len(due))
    outcome = np.where(rng.uniform(size=len(due)) < wrong, Outcome.WRONG, Outcome.ANSWERED)
    found = summarise(Answers(due, latency, outcome), seconds, 0.0)
    document = {
        "tool": "millibert",
        "url": "grpc://127.0.0.1:8001",
        "model": "support",
        "texts_per_request": 1,
        "arrival": Arrival(kind="open", rate=rate, spacing="poisson"),
        "started": "2026-11-25T10:00:00+00:00",
        "texts_per_second": found.requests_per_second,
        "stages": [stage("tokenizer", 0.3), stage("bert", bert_ms), stage("postprocess", 0.2)],
        "between_stages_ms": 0.2,
        "machine": {"cpu": "a processor", "cpus": 2},
        **found._asdict(),
        **changed,
    }
    return Run.model_validate(document)


def judgements(comparison: Comparison) -> dict[str, Judgement]:
    return {change.name: change.judgement for change in comparison.figures}


def test_a_run_is_the_same_as_itself() -> None:
    run = made()
    found = compare([run], [run])
    assert not found.regressed
    assert not found.improved
    assert {change.change for change in found.figures} == {0.0}
    assert set(judgements(found).values()) == {Judgement.SAME, Judgement.UNKNOWN}
    assert found.slowest is None
    assert found.warnings == ()


def test_a_slowed_stage_is_named_and_the_change_is_right() -> None:
    found = compare([made(1, slower=1.5, bert_ms=4.0)], [made(2)])
    assert found.regressed
    named = {change.name: change for change in found.figures}
    assert named["p50"].change == pytest.approx(0.5, abs=0.1)
    assert named["p50"].judgement is Judgement.WORSE
    assert named["requests/s"].judgement is Judgement.SAME
    assert found.slowest is not None
    assert found.slowest.name == "bert"
    assert found.slowest.change == pytest.approx(4.35 / 2.35 - 1)
    assert found.slowest.parts_ms["compute"] == pytest.approx(2.0)
    assert str(found.slowest) == "bert: +85 % (2.35 → 4.35 ms)"
    assert [each.name for each in found.stages if each.judgement is Judgement.WORSE] == ["bert"]


def test_the_stage_that_grew_most_in_time_is_named_not_the_one_that_doubled_from_nothing() -> None:
    previous = made(stages=[stage("tokenizer", 0.1), stage("bert", 3.0)])
    now = made(stages=[stage("tokenizer", 0.6), stage("bert", 4.5)])
    found = compare([now], [previous])
    changed = {each.name: each.change or 0.0 for each in found.stages}
    assert changed["tokenizer"] > changed["bert"]
    assert found.slowest is not None
    assert found.slowest.name == "bert"


def test_a_stage_whose_growth_no_request_would_notice_is_the_same() -> None:
    found = compare(
        [made(stages=[stage("tokenizer", 0.01, queue=0.03)])], [made(stages=[stage("tokenizer", 0.01, 0.0)])]
    )
    tokenizer = found.stages[0]
    assert tokenizer.change is not None
    assert tokenizer.change > 0.1
    assert tokenizer.judgement is Judgement.SAME


def test_faster_is_better_and_more_throughput_is_too() -> None:
    found = compare([made(1, slower=0.6)], [made(2)])
    assert found.improved
    assert judgements(found)["p99"] is Judgement.BETTER
    assert judgements(compare([made(1, rate=300)], [made(2)]))["requests/s"] is Judgement.BETTER
    assert judgements(compare([made(1, rate=150)], [made(2)]))["requests/s"] is Judgement.WORSE


def test_noise_is_called_the_same() -> None:
    """Each pair of runs differs by chance alone; of each figure about one in a hundred may be called different."""
    wrong = Counter(
        change.name
        for pair in range(40)
        for change in compare([made(2 * pair)], [made(2 * pair + 1)]).figures
        if change.judgement in (Judgement.BETTER, Judgement.WORSE)
    )
    assert max(wrong.values(), default=0) <= 4


def test_of_repeats_the_spread_between_them_counts() -> None:
    """Runs that differ by a fifth from one another hide a tenth, whatever each knows of itself."""
    wide = [made(seed, slower=slower) for seed, slower in enumerate((0.8, 1.0, 1.2))]
    wider = [made(10 + seed, slower=1.1 * slower) for seed, slower in enumerate((0.8, 1.0, 1.2))]
    assert judgements(compare(wider, wide))["p50"] is Judgement.SAME
    narrow = [made(seed, slower=slower) for seed, slower in enumerate((0.99, 1.0, 1.01))]
    slowed = [made(10 + seed, slower=1.3 * slower) for seed, slower in enumerate((0.99, 1.0, 1.01))]
    found = compare(slowed, narrow)
    assert judgements(found)["p50"] is Judgement.WORSE
    assert (found.runs, found.previous_runs) == (3, 3)


def test_errors_are_compared_by_their_difference() -> None:
    found = compare([made(1, wrong=0.02)], [made(2)])
    named = {change.name: change for change in found.figures}
    assert named["wrong"].previous == 0
    assert named["wrong"].change == pytest.approx(0.02, abs=0.008)
    assert named["errors"].judgement is Judgement.WORSE
    assert named["refused"].judgement is Judgement.SAME
    # Two of four thousand may be chance.
    assert judgements(compare([made(1, wrong=0.0005)], [made(2)]))["errors"] is Judgement.SAME


def test_what_hangs_on_one_request_is_not_judged() -> None:
    found = judgements(compare([made(1, slower=9, rate=20)], [made(2, rate=20)]))
    assert found["max"] is Judgement.UNKNOWN
    assert found["p99.9"] is Judgement.UNKNOWN
    assert found["p50"] is Judgement.WORSE


def test_a_run_without_an_answer_is_worse_in_throughput_and_errors() -> None:
    found = compare([made(1, wrong=1.1)], [made(2)])
    named = judgements(found)
    assert (named["requests/s"], named["errors"]) == (Judgement.WORSE, Judgement.WORSE)
    assert named["p99"] is Judgement.UNKNOWN
    assert found.regressed
    assert judgements(compare([made(2)], [made(1, wrong=1.1)]))["errors"] is Judgement.BETTER


def test_few_seconds_tell_no_noise() -> None:
    assert judgements(compare([made(1, seconds=3)], [made(2, seconds=3)]))["p50"] is Judgement.UNKNOWN


def test_what_makes_runs_hard_to_compare_is_told() -> None:
    other = made(
        model="banking",
        tool="locust",
        texts_per_request=8,
        arrival=Arrival(kind="closed", under_way=64),
        machine={"cpu": "a processor", "cpus": 8},
        steady=False,
        server={"bert": "a", "version": "1"},
    )
    found = compare([made(server={"bert": "b", "version": "1"})], [other])
    told = "\n".join(found.warnings)
    for word in ("cpus is 2, was 8", "support, was banking", "was locust", "was closed loop, 64 under way", "1, was 8"):
        assert word in told
    assert "1 of the previous runs not steady" in told
    assert found.reconfigured == ("bert",)


def test_stages_that_only_one_side_has_are_left_out() -> None:
    found = compare([made(stages=[stage("fused", 2.0)], between_stages_ms=None)], [made()])
    assert found.stages == ()
    assert BETWEEN_STAGES in [each.name for each in compare([made()], [made()]).stages]


def test_loads_in_words() -> None:
    assert describe_arrival(made(rate=200)) == "open loop, 200 requests/s, at random (Poisson)"
    assert describe_arrival(made(arrival=Arrival(kind="closed", under_way=1000))) == "closed loop, 1,000 under way"
    spike = Arrival(kind="open", rate=12345, shape="spike")
    assert describe_arrival(made(arrival=spike)) == "open loop, up to 12,345 requests/s, spike"


def test_quantiles_are_read_off_a_histogram() -> None:
    found = Histogram(edges_ms=[1, 10, 100, 1000, 10000], counts=[50, 0, 0, 50])
    assert quantile(found, 0.25) == pytest.approx(math.sqrt(10))
    assert quantile(found, 0.0) == pytest.approx(1)
    assert quantile(found, 0.75) == pytest.approx(1000 * math.sqrt(10))
    assert quantile(found, 1.0) == pytest.approx(10000)


def test_as_json_is_plain() -> None:
    document = compare([made(1, slower=1.5, bert_ms=4)], [made(2)]).as_json()
    assert document["regressed"] is True
    assert document["slowest_stage"] == "bert"
    assert document["stages"][1]["parts_ms"]["compute"] == pytest.approx(2.0)
    assert {each["name"] for each in document["figures"]} >= {"requests/s", "p50", "p99.9", "errors"}


def test_less_than_nothing_between_the_stages_is_not_judged() -> None:
    """Triton counts an ensemble and its stages at different moments."""
    found = compare([made(between_stages_ms=-0.1)], [made(between_stages_ms=-0.2)])
    (between,) = [each for each in found.stages if each.name == BETWEEN_STAGES]
    assert (between.change, between.judgement) == (None, Judgement.UNKNOWN)

"""Whether the objectives are kept: over several repeats their medians decide, and each repeat is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from load.repeats import medians
from load.results import Run
from load.slo import Objective, Verdict, judge


@dataclass(frozen=True)
class Result:
    """An objective over all repeats, and in each of them."""

    verdict: Verdict
    each: tuple[Verdict, ...]

    @property
    def kept_in(self) -> int:
        """In how many of the repeats."""
        return sum(verdict.held for verdict in self.each)

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**self.verdict.as_json(), "repeats": [verdict.measured for verdict in self.each]}


def judge_repeats(objectives: Sequence[Objective], runs: Sequence[Run]) -> tuple[Result, ...]:
    """Each objective over the repeats of one load, at least one."""
    over_all = judge(objectives, medians(runs))
    in_each = [judge(objectives, run.figures()) for run in runs]
    return tuple(Result(verdict, tuple(verdicts[at] for verdicts in in_each)) for at, verdict in enumerate(over_all))


def cautions(runs: Sequence[Run], results: Sequence[Result]) -> Iterator[str]:
    """What a reader should know before relying on the figures."""
    counted = min(run.counts.answered for run in runs)
    if not counted:
        yield "nothing was answered" if len(runs) == 1 else "in one run or more, nothing was answered"
    restless = [run for run in runs if not run.steady]
    if restless:
        drifts = ", ".join(f"{run.drift:+.0%}" for run in restless)
        yield (
            f"{_some(len(restless), len(runs))} not steady: the second half's median latency is {drifts} against the "
            "first half's, so the figures depend on how long the load lasted"
        )
    for result in results:
        if 0 < result.kept_in < len(runs):
            yield f"{result.verdict.objective} is kept in {result.kept_in} of {len(runs)} repeats: too close to tell"
    # A percentile of fewer answers than this hangs on one or two of them.
    for name, least in (("p99", 500), ("p99.9", 5000)):
        if 0 < counted < least and any(result.verdict.objective.name == name for result in results):
            yield f"{counted:,} answers are few for {name}: {least:,} make it more than a matter of single requests"


def _some(count: int, of: int) -> str:
    return "this run is" if of == 1 else f"{count} of {of} runs {'is' if count == 1 else 'are'}"

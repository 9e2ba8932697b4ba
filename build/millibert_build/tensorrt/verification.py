"""Is this release's plan right and fast on this GPU: one check after the other, each with a line of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from millibert._errors import MillibertError
from millibert._labelled_texts import LabelledText
from millibert_build.tensorrt.plan import PlanError, Recipe
from millibert_build.tensorrt.readable import GraphError
from millibert_build.tensorrt.release_plan import build_release_plan, checked_target
from millibert_build.tensorrt.run_graph import run_graph
from millibert_build.tensorrt.runner import PlanRunner
from millibert_build.tensorrt.target import Precision, Target
from millibert_ensemble import contract
from millibert_ensemble.machine import Machine
from millibert_ensemble.models.tokenizer.tokenization import load
from millibert_ensemble.plan_manifest import PLAN, TENSORRT_ONNX
from millibert_ensemble.preflight import Verdict, preflight

# The largest difference of a logit between the plan and its own graph on the CPU: sums in another order, and in a half
# type a rounding after each.
TOLERANCE: dict[Precision, float] = {"fp32": 5e-3, "fp16": 5e-2, "bf16": 0.3, "int8": 0.5}
# Accuracy may be this much below the graph's on the CPU, and that many texts must get the same label.
MAX_LOSS = 0.005
MIN_AGREEMENT: dict[Precision, float] = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.99, "int8": 0.985}
PARITY_TEXTS = 512
_PUBLISHED_TOKENS = 128
_ROUNDS = 50
# BERT-base, 128 tokens a text, fp16: milliseconds of a batch, from the tables of NVIDIA's demoBERT
# (github.com/NVIDIA/TensorRT, demo/BERT/README.md, TensorRT 10).
PUBLISHED: dict[str, dict[int, float]] = {
    "A100": {1: 0.62, 32: 3.85},
    "L40S": {1: 0.48, 32: 3.93},
    "T4": {1: 2.04, 32: 36.7},
}

Outcome = Literal["PASS", "FAIL", "SKIP", "INFO"]
Floats = npt.NDArray[np.float32]


class Line(NamedTuple):
    """The result of one check."""

    outcome: Outcome
    check: str
    detail: str
    figures: dict[str, Any]


class Skipped(Exception):  # noqa: N818 - not an error: a check that cannot be made here
    """Why a check cannot be made on this machine."""


@dataclass
class Bench:
    """What the checks share; each part is made when the first check asks for it."""

    repository: Path
    rows: Sequence[LabelledText]
    machine: Machine
    rebuild: bool

    @cached_property
    def target(self) -> Target:
        """What the release wants."""
        return checked_target(self.repository)

    @property
    def folder(self) -> Path:
        """Where the graph and the plan are."""
        return self.repository / contract.BERT / contract.VERSION

    @cached_property
    def verdict(self) -> Verdict:
        """What `millibert preflight` says; it reads every file, so it is asked once, and again behind a new plan."""
        return preflight(self.repository, self.machine)

    @cached_property
    def ids(self) -> list[list[int]]:
        """The texts through the release's own tokenizer."""
        tokenizer = load(self.repository / contract.TOKENIZER / contract.VERSION / "tokenizer.json")
        return [encoding.ids for encoding in tokenizer.encode_batch_fast([row.text for row in self.rows])]

    @cached_property
    def expected(self) -> Floats:
        """Logits of the plan's graph on the CPU."""
        target = self.target
        return run_graph(self.folder / TENSORRT_ONNX, target.precision, target.layout, self.ids, target.max_texts)

    @cached_property
    def logits(self) -> Floats:
        """Logits of the plan on the GPU."""
        with self.runner() as runner:
            return runner.run(self.ids)

    @cached_property
    def labels(self) -> list[str]:
        """The release's labels, in the order of the logits."""
        manifest = json.loads((self.repository / "release.json").read_text(encoding="utf-8"))
        return list(manifest["labels"])

    def runner(self) -> PlanRunner:
        """The plan, ready to run; raises `Skipped` where this machine has none that runs."""
        verdict = self.verdict
        if verdict.engine != "tensorrt":
            raise Skipped(f"no plan that runs here: {'; '.join(verdict.reasons)}")
        return PlanRunner(self.folder / PLAN, self.target)


Check = Callable[[Bench], Line]


def verify(bench: Bench, checks: Sequence[tuple[str, Check]]) -> list[Line]:
    """Make the checks in order; one that cannot be made or fails does not keep the others from being made."""
    lines = []
    for name, check in checks:
        try:
            line = check(bench)
        except Skipped as reason:
            line = Line("SKIP", name, str(reason), {})
        except (MillibertError, GraphError, PlanError, OSError) as error:
            line = Line("FAIL", name, str(error), {})
        lines.append(line)
    return lines


def check_graph(bench: Bench) -> Line:
    """The release has a graph, whole and readable for TensorRT."""
    target = bench.target
    return Line("PASS", "graph", f"{target.precision} {target.layout}, operators documented", target.as_json())


def check_machine(bench: Bench) -> Line:
    """There is a GPU."""
    if not bench.machine.gpus:
        raise Skipped("no NVIDIA GPU here (nvidia-smi is missing or lists none)")
    names = ", ".join(gpu.name for gpu in bench.machine.gpus)
    version = bench.machine.tensorrt or "not found"
    return Line("PASS", "machine", f"{names}; TensorRT {version}", bench.machine.as_json())


def check_plan(bench: Bench) -> Line:
    """The plan fits this machine; it is built if it does not, or if that is asked for."""
    verdict = bench.verdict
    if not bench.machine.gpus:
        raise Skipped("a plan is built and loaded on a GPU")
    if verdict.answer == "broken":
        raise MillibertError("; ".join(verdict.reasons))
    if verdict.answer == "rebuild" or bench.rebuild:
        manifest = build_release_plan(bench.repository, bench.target, Recipe(sparse=bench.target.sparse))
        del bench.verdict
        verdict = bench.verdict
        detail = f"built in {manifest.seconds:.0f} s"
    else:
        detail = "built before"
    if verdict.engine != "tensorrt":
        raise MillibertError(f"{verdict.answer}: {'; '.join(verdict.reasons)}")
    return Line("PASS", "plan", detail, verdict.plan.as_json() if verdict.plan else {})


def check_parity(bench: Bench) -> Line:
    """The plan computes what its graph says: logit by logit, single texts and full batches."""
    target, some = bench.target, bench.ids[:PARITY_TEXTS]
    with bench.runner() as runner:
        batched = runner.run(some)
        single = np.concatenate([runner.infer([row]) for row in some[:64]])
    difference = float(np.abs(batched - bench.expected[: len(some)]).max())
    alone = float(np.abs(single - bench.expected[: len(single)]).max())
    worst, allowed = max(difference, alone), TOLERANCE[target.precision]
    # A comparison with NaN is false: a plan that answers NaN does not pass.
    outcome: Outcome = "PASS" if worst <= allowed else "FAIL"
    detail = f"largest difference of a logit {worst:.1e} (at most {allowed:g}), {len(some)} texts"
    return Line(outcome, "parity", detail, {"batched": difference, "single": alone, "allowed": allowed})


def check_accuracy(bench: Bench) -> Line:
    """Labels and accuracy on all texts, against the graph on the CPU."""
    ours, theirs = (logits.argmax(axis=1) for logits in (bench.logits, bench.expected))
    agreement = float((ours == theirs).mean())
    accuracy, before = (_accuracy(bench, predicted) for predicted in (ours, theirs))
    wanted = MIN_AGREEMENT[bench.target.precision]
    passed = agreement >= wanted and accuracy >= before - MAX_LOSS and bool(np.isfinite(bench.logits).all())
    detail = (
        f"best label right in {accuracy:.2%} of {len(bench.rows)} texts (graph on the CPU: {before:.2%}), "
        f"same label in {agreement:.2%} (at least {wanted:.1%})"
    )
    figures = {"accuracy": accuracy, "graph_accuracy": before, "agreement": agreement}
    return Line("PASS" if passed else "FAIL", "accuracy", detail, figures)


def check_speed(bench: Bench) -> Line:
    """Milliseconds of a batch of 128-token texts, beside NVIDIA's published figures for BERT-base."""
    tokens = min(_PUBLISHED_TOKENS, bench.target.max_tokens)
    measured: dict[int, float] = {}
    with bench.runner() as runner:
        for texts in sorted({1, min(32, bench.target.max_texts)}):
            batch = [[101] + [2000] * (tokens - 2) + [102]] * texts
            times = []
            for _ in range(_ROUNDS):
                runner.infer(batch)
                times.append(1000 * runner.seconds())
            measured[texts] = float(np.median(times[_ROUNDS // 5 :]))
    ours = ", ".join(f"{ms:.2f} ms at batch {texts}" for texts, ms in measured.items())
    theirs = "; ".join(f"{gpu} {' / '.join(f'{ms:g}' for ms in of.values())} ms" for gpu, of in PUBLISHED.items())
    detail = f"{tokens} tokens: {ours}, copies included (BERT-base, fp16, batch 1 / 32, published: {theirs})"
    return Line("INFO", "speed", detail, {"tokens": tokens, "milliseconds": measured, "published": PUBLISHED})


def _accuracy(bench: Bench, predicted: npt.NDArray[np.intp]) -> float:
    """Share of texts whose best label is one of those that people gave."""
    right = [bench.labels[index] in row.labels for index, row in zip(predicted, bench.rows, strict=True)]
    return float(np.mean(right))


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines as plain data."""
    return [line._asdict() for line in lines]

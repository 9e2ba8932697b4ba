"""The forms a release can take: checkpoints, pruned or not, in precisions, judged side by side on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from millibert_build.dataset import Splits
from millibert_build.engine import Artefact, Floats, available_precisions, quantized_precisions, texts_per_second
from millibert_build.evaluate import Comparison, GateError
from millibert_build.scenario import Precision
from millibert_build.workshop import Measured, Workshop, make_graph, measured


@dataclass(frozen=True, eq=False)
class Variant:
    """One precision of a checkpoint: its graph, and what it measured on the validation texts."""

    shop: Workshop
    precision: str
    onnx: Path
    texts_per_second: float
    logits: Floats
    validation: Comparison
    refusal: str | None
    note: str
    contends: bool
    """False: measured only to hold the others against."""

    @property
    def name(self) -> str:
        """What was removed, and the precision."""
        return f"{self.shop.removed}, {self.precision}" if self.shop.removed else self.precision


@dataclass(frozen=True)
class Judgement:
    """A variant on the test texts, against its own checkpoint in fp32; `refusal` names the gates it misses."""

    logits: Floats
    comparison: Comparison
    refusal: str | None


def make_variants(
    shops: Sequence[Workshop], contenders: Sequence[Workshop], precision: Precision, splits: Splits
) -> list[Variant]:
    """The wanted precision of each contender, or with `auto` all that this engine has here.

    All are timed in turns and judged on validation. The first is always the first workshop in fp32, which the others
    are held against, a contender or not. A pruned checkpoint that misses its own gates is only timed, in fp32.
    """
    baseline = shops[0]
    wanted = _wanted(baseline, precision)
    made = {(baseline, "fp32"): (baseline.fp32, "")}
    refusals = {}
    for shop in contenders:
        refusals[shop] = _refused_on_validation(shop)
        for name in wanted if refusals[shop] is None else ["fp32"]:
            made[shop, name] = make_graph(shop, name, splits)
    speeds = texts_per_second(
        baseline.engine,
        {key: Artefact(onnx, key[1]) for key, (onnx, _) in made.items()},
        baseline.validation.ids,
        baseline.scenario.max_texts,
    )
    found = []
    for (shop, name), (onnx, note) in made.items():
        logits = shop.logits(name, onnx, shop.validation.ids)
        comparison = shop.compare(logits, shop.validation)
        contends = shop in contenders and (name in wanted or refusals[shop] is not None)
        refusal = refusals.get(shop) or shop.refusal(name, comparison, "validation")
        found.append(Variant(shop, name, onnx, speeds[shop, name], logits, comparison, refusal, note, contends))
    return found


def passing(variants: Sequence[Variant]) -> list[Variant]:
    """Those that pass their gates on validation, the fastest first; raises `GateError` where there is none."""
    contenders = [variant for variant in variants if variant.contends]
    passed = [variant for variant in contenders if variant.refusal is None]
    if not passed:
        raise GateError(_all_of(variant.refusal for variant in contenders))
    return sorted(passed, key=lambda variant: -variant.texts_per_second)


def first_passing(choices: Sequence[Variant], tested: Mapping[Variant, Judgement]) -> Variant:
    """The first that passes its gates on the test texts too; raises `GateError` where none does.

    Nothing is tuned on the test texts: they can only refuse what validation texts, often few, let through.
    """
    for variant in choices:
        if tested[variant].refusal is None:
            return variant
    raise GateError(_all_of(tested[variant].refusal for variant in choices))


def _all_of(refusals: Iterable[str | None]) -> str:
    return "; ".join(dict.fromkeys(filter(None, refusals)))


def judge_on_test(
    variants: Sequence[Variant], splits: Splits
) -> tuple[dict[Workshop, Measured], dict[Variant, Judgement]]:
    """Every checkpoint and every variant on the test texts."""
    shops = list(dict.fromkeys(variant.shop for variant in variants))
    measures = {shop: measured(splits.test, shop.trained, splits.labels) for shop in shops}
    return measures, {variant: _tested(variant, measures) for variant in variants}


def _tested(variant: Variant, measures: Mapping[Workshop, Measured]) -> Judgement:
    shop, split = variant.shop, measures[variant.shop]
    logits = shop.logits(variant.precision, variant.onnx, split.ids)
    found = shop.compare(logits, split)
    lost = shop.pruning_refusal(split, measures[shop.before], "test") if shop.before is not None else None
    refusal = lost or shop.refusal(variant.precision, found, "test")
    return Judgement(logits, found, refusal)


def _wanted(shop: Workshop, precision: Precision) -> list[str]:
    if precision == "auto":
        return [*available_precisions(shop.engine, shop.fp32), *quantized_precisions(shop.engine)]
    return [precision]


def _refused_on_validation(shop: Workshop) -> str | None:
    if shop.before is None:
        return None
    return shop.pruning_refusal(shop.validation, shop.before.validation, "validation")

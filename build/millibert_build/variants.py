"""The precisions a build can choose from: each as a graph of its own, judged side by side on this machine."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from millibert_build.batches import Encoded, encode, predict_logits
from millibert_build.calibrate import Calibration
from millibert_build.dataset import Example, Splits
from millibert_build.engine import (
    Floats,
    available_precisions,
    open_engine,
    quantized_precisions,
    run_packed,
    texts_per_second,
)
from millibert_build.evaluate import Comparison, GateError, check_gates, compare
from millibert_build.quantize import Activations, Effect, Verdict, quantize_dynamic, quantize_to_gate, sensitivity
from millibert_build.scenario import Engine, Gates, Precision, Scenario
from millibert_build.stages import Trained
from millibert_build.tokens import token_ids
from millibert_ensemble.models.bert.packing import pack

# Texts to rank the products by; more only takes longer.
_RANKING_TEXTS = 256


@dataclass(frozen=True)
class Measured:
    """Texts of one split as ids; the right answers, multi-hot, and the fp32 checkpoint's logits, [texts, labels]."""

    ids: list[list[int]]
    targets: Floats
    reference: Floats


@dataclass(frozen=True)
class Variant:
    """One precision of a checkpoint: its graph, and what it measured on the validation texts."""

    precision: str
    onnx: Path
    texts_per_second: float
    validation: Comparison
    refusal: str | None
    note: str


@dataclass(frozen=True)
class Workshop:
    """What all variants of one checkpoint share."""

    scenario: Scenario
    engine: Engine
    trained: Trained
    validation: Measured
    calibration: Calibration
    folder: Path

    def logits(self, precision: str, onnx: Path, ids: Sequence[Sequence[int]]) -> Floats:
        """Logits [texts, labels] of a graph, as the server computes them."""
        return run_packed(open_engine(self.engine, onnx, precision), ids, self.scenario.max_texts)

    def compare(self, logits: Floats, split: Measured) -> Comparison:
        """A graph's logits on one split against its checkpoint's."""
        return compare(self.scenario.problem, split.reference, logits, split.targets, self.calibration)


def measured(examples: Sequence[Example], trained: Trained, labels: Sequence[str]) -> Measured:
    """Ask the checkpoint itself, in PyTorch and fp32."""
    encoded: Encoded = encode(examples, trained.tokenizer, labels)
    reference = predict_logits(trained.model, encoded.ids, show="fp32 reference").numpy()
    return Measured(encoded.ids, encoded.targets.numpy(), reference)


def make_variants(shop: Workshop, fp32: Path, precision: Precision, splits: Splits) -> list[Variant]:
    """The wanted precision, or with `auto` all that this engine has here, timed in turns and judged on validation."""
    if precision == "auto":
        wanted = [*available_precisions(shop.engine, fp32), *quantized_precisions(shop.engine)]
    else:
        wanted = [precision]
    artefacts: dict[str, Path] = {}
    notes: dict[str, str] = {}
    for name in wanted:
        artefacts[name], notes[name] = _artefact(shop, fp32, name, splits)
    speeds = texts_per_second(shop.engine, artefacts, shop.validation.ids, shop.scenario.max_texts)
    return [_judged(shop, name, artefacts, speed, notes[name]) for name, speed in speeds.items()]


def passing(variants: Sequence[Variant]) -> list[Variant]:
    """Those that pass their gates on validation, the fastest first; raises `GateError` where there is none."""
    passed = [variant for variant in variants if variant.refusal is None]
    if not passed:
        raise GateError(" ".join(dict.fromkeys(variant.refusal or "" for variant in variants)))
    return sorted(passed, key=lambda variant: -variant.texts_per_second)


def first_passing(choices: Sequence[Variant], test: Mapping[str, Comparison], gates: Gates) -> Variant:
    """The first that passes its gates on the test texts too; raises the `GateError` of the first where none does.

    Nothing is tuned on the test texts: they can only refuse what validation texts, often few, let through.
    """
    refusals = []
    for variant in choices:
        try:
            check_gates(test[variant.precision], gates, variant.precision)
        except GateError as error:
            refusals.append(error)
        else:
            return variant
    raise refusals[0]


def _judged(shop: Workshop, precision: str, artefacts: Mapping[str, Path], speed: float, note: str) -> Variant:
    found = shop.compare(shop.logits(precision, artefacts[precision], shop.validation.ids), shop.validation)
    refusal = _refusal(shop, precision, found)
    return Variant(precision, artefacts[precision], speed, found, refusal, note)


def _refusal(shop: Workshop, precision: str, found: Comparison) -> str | None:
    try:
        check_gates(found, shop.scenario.gates, precision, "validation")
    except GateError as error:
        return str(error)
    return None


def _artefact(shop: Workshop, fp32: Path, precision: str, splits: Splits) -> tuple[Path, str]:
    """The graph of a precision, and what is to be said of how it was made."""
    out = shop.folder / f"{precision}.onnx"
    if precision == "int8_dynamic":
        quantize_dynamic(fp32, out)
        return out, ""
    if precision != "int8":
        return fp32, ""
    outcome = quantize_to_gate(
        fp32,
        out,
        _calibration_batches(shop, splits),
        lambda path: _verdict(shop, path),
        lambda activations: _ranking(shop, fp32, activations),
        shop.scenario.quantization.max_excluded,
    )
    return out, outcome.describe()


def _verdict(shop: Workshop, path: Path) -> Verdict:
    found = shop.compare(shop.logits("int8", path, shop.validation.ids), shop.validation)
    figures = f"agreement {found.agreement:.4f}, {found.score_name} loss {found.loss:+.4f}"
    return Verdict(_refusal(shop, "int8", found) is None, figures)


def _ranking(shop: Workshop, fp32: Path, activations: Mapping[str, Activations]) -> list[Effect]:
    ids, reference = shop.validation.ids[:_RANKING_TEXTS], shop.validation.reference[:_RANKING_TEXTS]
    scratch = shop.folder / "ranking.onnx"
    return sensitivity(fp32, activations, lambda path: shop.logits("int8", path, ids), reference, scratch)


def _calibration_batches(shop: Workshop, splits: Splits) -> list[dict[str, npt.NDArray[np.generic]]]:
    """Some of the training texts, packed as the server packs them."""
    count = min(shop.scenario.quantization.calibration_texts, len(splits.train))
    chosen = random.Random(shop.scenario.training.seed).sample(splits.train, count)  # noqa: S311 - texts
    ids = token_ids(shop.trained.tokenizer, [example.text for example in chosen])
    size = shop.scenario.max_texts
    return [pack([np.array([row], np.int32) for row in ids[i : i + size]]) for i in range(0, len(ids), size)]

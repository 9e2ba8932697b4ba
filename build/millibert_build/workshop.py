"""One checkpoint of a build on its way to engines: its calibration, and its graphs in every precision."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from millibert_build.batches import Encoded, encode, predict_logits
from millibert_build.calibrate import Calibration, calibrate, save_calibration
from millibert_build.dataset import Example, Splits
from millibert_build.engine import Floats, open_engine, run_texts
from millibert_build.evaluate import Comparison, GateError, check_gates, check_pruning_gates, compare
from millibert_build.export import export_rows
from millibert_build.layouts import without_padding
from millibert_build.quantize import (
    Activations,
    Effect,
    Verdict,
    quantize_dynamic,
    quantize_to_gate,
    sensitivity,
)
from millibert_build.quantize import calibrate as calibrate_activations
from millibert_build.scenario import Engine, Scenario
from millibert_build.sparsify import check_sparsity
from millibert_build.stages import Trained
from millibert_build.tokens import token_ids
from millibert_ensemble.models.bert.engines import Arrays

# Texts to rank the products by; more only takes longer.
_RANKING_TEXTS = 256
# The graphs of a checkpoint are kept in this folder of it.
_GRAPHS = "onnx"


@dataclass(frozen=True)
class Measured:
    """Texts of one split as ids; the right answers, multi-hot, and the fp32 checkpoint's logits, [texts, labels]."""

    ids: list[list[int]]
    targets: Floats
    reference: Floats


@dataclass(frozen=True, eq=False)
class Workshop:
    """One checkpoint, and what all its variants share."""

    scenario: Scenario
    engine: Engine
    trained: Trained
    validation: Measured
    calibration: Calibration
    before: Workshop | None = None
    """The fine-tuned checkpoint that this one was pruned from."""

    @property
    def removed(self) -> str:
        """What pruning took from it, in words; empty for the fine-tuned checkpoint itself."""
        return str(self.scenario.pruning) if self.before is not None else ""

    @property
    def folder(self) -> Path:
        """Where its graphs are."""
        return self.trained.folder / _GRAPHS

    @property
    def fp32(self) -> Path:
        """The fp32 graph of rows, which the others are made from."""
        return self.folder / "fp32.onnx"

    def export(self) -> None:
        """Write the fp32 graph; where it is to be 2:4, prove that it is."""
        self.folder.mkdir(exist_ok=True)
        export_rows(self.trained.model, self.scenario.max_tokens, self.fp32)
        if self.scenario.pruning.sparsity == "2:4":
            dense = [name for name, sparse in check_sparsity(self.fp32).items() if not sparse]
            if dense:
                raise RuntimeError(f"{self.fp32}: {', '.join(dense)} should be 2:4 and are not; please report this")

    def logits(self, precision: str, onnx: Path, ids: Sequence[Sequence[int]]) -> Floats:
        """Logits [texts, labels] of a graph, as the server computes them."""
        return run_texts(open_engine(self.engine, onnx, precision), ids, self.scenario.max_texts)

    def compare(self, logits: Floats, split: Measured) -> Comparison:
        """A graph's logits on one split against its checkpoint's."""
        return compare(self.scenario.problem, split.reference, logits, split.targets, self.calibration)

    def refusal(self, precision: str, found: Comparison, split: str) -> str | None:
        """Why a precision loses too much; None where it does not."""
        return _refusal(lambda: check_gates(found, self.scenario.gates, precision, split))

    def pruning_loss(self, split: Measured, before: Measured) -> Comparison:
        """The checkpoint against the one it was pruned from, both in fp32, on the same texts."""
        return compare(self.scenario.problem, before.reference, split.reference, split.targets, self.calibration)

    def pruning_refusal(self, split: Measured, before: Measured, name: str) -> str | None:
        """Why pruning lost too much on the split of that name; None where it did not."""
        found = self.pruning_loss(split, before)
        return _refusal(lambda: check_pruning_gates(found, self.scenario.gates, self.removed, name))


def open_workshop(
    scenario: Scenario,
    engine: Engine,
    trained: Trained,
    splits: Splits,
    before: Workshop | None = None,
) -> Workshop:
    """Ask the checkpoint for its validation logits, and calibrate it on them."""
    validation = measured(splits.validation, trained, splits.labels)
    recall = scenario.abstention.in_scope_recall
    calibration = calibrate(scenario.problem, validation.reference, validation.targets, recall)
    save_calibration(trained.folder, calibration)
    return Workshop(scenario, engine, trained, validation, calibration, before)


def measured(examples: Sequence[Example], trained: Trained, labels: Sequence[str]) -> Measured:
    """Ask the checkpoint itself, in PyTorch and fp32."""
    encoded: Encoded = encode(examples, trained.tokenizer, labels)
    reference = predict_logits(trained.model, encoded.ids, show="fp32 reference").numpy()
    return Measured(encoded.ids, encoded.targets.numpy(), reference)


def make_graph(shop: Workshop, precision: str, splits: Splits) -> tuple[Path, str]:
    """The graph of a precision, and what is to be said of how it was made."""
    out = shop.folder / f"{precision}.onnx"
    if precision == "int8_dynamic":
        quantize_dynamic(shop.fp32, out)
        return out, ""
    if precision != "int8":
        return shop.fp32, ""
    return out, quantize(shop, shop.fp32, out, splits, lambda path: shop.logits("int8", path, shop.validation.ids))


def quantize(shop: Workshop, source: Path, out: Path, splits: Splits, logits: Callable[[Path], Floats]) -> str:
    """Quantise a graph of the checkpoint; `logits` runs the result on the validation texts. Returns what was done."""
    activations = calibrate_activations(shop.fp32, _calibration_batches(shop, splits))
    outcome = quantize_to_gate(
        source,
        out,
        activations,
        lambda path: _verdict(shop, logits(path)),
        lambda: _ranking(shop, activations),
        shop.scenario.quantization.max_excluded,
    )
    return outcome.describe()


def _verdict(shop: Workshop, logits: Floats) -> Verdict:
    found = shop.compare(logits, shop.validation)
    figures = f"agreement {found.agreement:.4f}, {found.score_name} loss {found.loss:+.4f}"
    return Verdict(shop.refusal("int8", found, "validation") is None, figures)


def _ranking(shop: Workshop, activations: Mapping[str, Activations]) -> list[Effect]:
    ids, reference = shop.validation.ids[:_RANKING_TEXTS], shop.validation.reference[:_RANKING_TEXTS]
    scratch = shop.folder / "ranking.onnx"
    return sensitivity(shop.fp32, activations, lambda path: shop.logits("int8", path, ids), reference, scratch)


def _calibration_batches(shop: Workshop, splits: Splits) -> list[Arrays]:
    """Some of the training texts."""
    count = min(shop.scenario.quantization.calibration_texts, len(splits.train))
    chosen = random.Random(shop.scenario.training.seed).sample(splits.train, count)  # noqa: S311 - texts
    ids = token_ids(shop.trained.tokenizer, [example.text for example in chosen])
    return without_padding(ids, shop.scenario.max_texts)


def _refusal(check: Callable[[], None]) -> str | None:
    try:
        check()
    except GateError as error:
        return str(error)
    return None

"""What a build has found so far, stage by stage: what its manifest and its report are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from millibert_build.calibrate import Calibration, auroc
from millibert_build.dataset import Splits
from millibert_build.engine import Floats
from millibert_build.evaluate import predicted
from millibert_build.hub import Base
from millibert_build.scenario import Engine, Problem, Scenario
from millibert_build.tensorrt.graph import TensorrtGraph
from millibert_build.tokens import token_ids
from millibert_build.variants import Judgement, Variant
from millibert_build.workshop import Measured, Workshop
from millibert_ensemble.models.postprocess.ranking import ACTIVATIONS


@dataclass(frozen=True)
class Source:
    """What a release is made from, and what its manifest says of that."""

    scenario: Scenario
    splits: Splits
    base: Base
    lineage: Sequence[Mapping[str, Any]] = ()
    remembered: Scenario | None = None
    """The scenario that a later build continues with, where it is not this one."""


@dataclass
class Findings:
    """Filled by the stages; what is not there yet is empty."""

    source: Source
    engine: Engine
    created: str
    shops: list[Workshop] = field(default_factory=list)
    """The fine-tuned checkpoint, then pruned ones."""
    variants: list[Variant] = field(default_factory=list)
    """The fine-tuned checkpoint in fp32, then all others."""
    test: dict[Workshop, Measured] = field(default_factory=dict)
    tested: dict[Variant, Judgement] = field(default_factory=dict)
    favourite: Variant | None = None
    """The fastest that passes on validation, until `chosen` is known."""
    chosen: Variant | None = None
    outside: Floats | None = None
    """Logits [texts, labels] of the chosen variant for the texts that no label fits."""
    judged: Mapping[str, Any] = field(default_factory=dict)
    tensorrt: TensorrtGraph | None = None
    """The graph that a plan can be built from, where one was asked for."""

    @property
    def splits(self) -> Splits:
        """The labelled texts."""
        return self.source.splits

    def look_outside(self, chosen: Variant) -> None:
        """Ask the chosen variant about the texts that no label fits."""
        texts = self.splits.out_of_scope
        if texts:
            ids = token_ids(chosen.shop.trained.tokenizer, texts)
            self.outside = chosen.shop.logits(chosen.precision, chosen.onnx, ids)

    def abstention(self) -> dict[str, float] | None:
        """How well "don't know" parts the test texts from those that no label fits; None without such texts."""
        if self.chosen is None or self.outside is None:
            return None
        shop = self.chosen.shop
        inside, outside = (probabilities(shop, logits) for logits in (self.tested[self.chosen].logits, self.outside))
        known, refused = (answered(shop.scenario.problem, rows, shop.calibration) for rows in (inside, outside))
        some_label = self.test[shop].targets.any(axis=1)
        return {
            "in_scope_recall": float(known[some_label].mean()),
            "out_of_scope_refused": float(1 - refused.mean()),
            "auroc": auroc(inside[some_label].max(axis=1), outside.max(axis=1)),
        }


def probabilities(shop: Workshop, logits: Floats) -> Floats:
    """Calibrated probabilities [texts, labels]."""
    return ACTIVATIONS[shop.scenario.problem](logits / np.float32(shop.calibration.temperature))


def answered(problem: Problem, rows: Floats, calibration: Calibration) -> Any:
    """Whether each text gets a label at all [texts], for probabilities [texts, labels]."""
    if problem == "single_label":
        return rows.max(axis=1) >= calibration.thresholds[0]
    return predicted(problem, rows, calibration.thresholds).any(axis=1)

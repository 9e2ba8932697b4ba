"""Which precision a build takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millibert_build.calibrate import Calibration
from millibert_build.evaluate import Comparison, GateError, compare
from millibert_build.scenario import make_scenario
from millibert_build.variants import Judgement, Variant, first_passing, passing
from millibert_build.workshop import Measured, Workshop

SCENARIO = make_scenario(
    {"name": "x", "data": {"train": "a", "test": "b"}, "gates": {"max_accuracy_loss": 0.1}}, "the test"
)
NOTHING = Measured([], np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32))
NOBODY: Any = None
SHOP = Workshop(SCENARIO, "openvino", NOBODY, NOTHING, Calibration(1.0, (0.0, 0.0)))


def agreeing(texts: int, of: int = 1000) -> Comparison:
    """An engine that gives `texts` of `of` texts their checkpoint's label."""
    reference = np.tile(np.array([1, 0], np.float32), (of, 1))
    logits = reference.copy()
    logits[texts:] = [0, 1]
    return compare("single_label", reference, logits, reference, Calibration(1.0, (0.0, 0.0)))


def variant(precision: str, speed: float, agreement: int, contends: bool = True) -> Variant:
    found = agreeing(agreement)
    refusal = SHOP.refusal(precision, found, "validation")
    return Variant(SHOP, precision, Path("x.onnx"), speed, NOTHING.reference, found, refusal, "", contends)


def judgements(**agreements: int) -> dict[str, Judgement]:
    found = {precision: agreeing(texts) for precision, texts in agreements.items()}
    return {name: Judgement(NOTHING.reference, each, SHOP.refusal(name, each, "test")) for name, each in found.items()}


def precisions(*variants: Variant) -> list[str]:
    return [each.precision for each in passing(variants)]


def test_the_fastest_that_agrees_comes_first_and_int8_has_a_bar_of_its_own():
    fp32, bf16 = variant("fp32", 1, 1000), variant("bf16", 2, 995)
    assert precisions(fp32, bf16, variant("int8", 3, 987)) == ["int8", "bf16", "fp32"]
    assert precisions(fp32, bf16, variant("int8", 3, 984)) == ["bf16", "fp32"]
    assert precisions(fp32, variant("bf16", 2, 987)) == ["fp32"]
    with pytest.raises(GateError, match=r"int8 misses gates on 1000 validation texts: agreement 0\.9840 < 0\.985"):
        passing([variant("int8", 3, 984)])


def test_what_the_test_texts_refuse_is_passed_over():
    choices = passing([variant("fp32", 1, 1000), variant("int8", 3, 1000)])

    def taken(count: int, **agreements: int) -> str:
        found = judgements(**agreements)
        return first_passing(choices[:count], {each: found[each.precision] for each in choices[:count]}).precision

    assert taken(2, int8=990, fp32=1000) == "int8"
    assert taken(2, int8=980, fp32=1000) == "fp32"
    with pytest.raises(GateError, match="int8 misses gates on 1000 test texts"):
        taken(1, int8=980)


def test_what_is_measured_for_comparison_is_not_served():
    assert precisions(variant("fp32", 9, 1000, contends=False), variant("int8", 3, 1000)) == ["int8"]
    with pytest.raises(GateError, match="int8 misses"):
        passing([variant("fp32", 9, 1000, contends=False), variant("int8", 3, 900)])

"""Which precision a build takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from millibert_build.calibrate import Calibration
from millibert_build.evaluate import Comparison, GateError, check_gates, compare
from millibert_build.scenario import Gates
from millibert_build.variants import Variant, first_passing, passing

GATES = Gates(max_accuracy_loss=0.1)


def agreeing(texts: int, of: int = 1000) -> Comparison:
    """An engine that gives `texts` of `of` texts their checkpoint's label."""
    reference = np.tile(np.array([1, 0], np.float32), (of, 1))
    logits = reference.copy()
    logits[texts:] = [0, 1]
    return compare("single_label", reference, logits, reference, Calibration(1.0, (0.0, 0.0)))


def variant(precision: str, speed: float, agreement: int) -> Variant:
    found = agreeing(agreement)
    try:
        check_gates(found, GATES, precision, "validation")
    except GateError as error:
        return Variant(precision, Path("x.onnx"), speed, found, str(error), "")
    return Variant(precision, Path("x.onnx"), speed, found, None, "")


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
    assert first_passing(choices, {"int8": agreeing(990), "fp32": agreeing(1000)}, GATES).precision == "int8"
    assert first_passing(choices, {"int8": agreeing(980), "fp32": agreeing(1000)}, GATES).precision == "fp32"
    with pytest.raises(GateError, match="int8 misses gates on 1000 test texts"):
        first_passing(choices[:1], {"int8": agreeing(980)}, GATES)

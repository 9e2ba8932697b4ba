"""The fused model on plain arrays, and on a clock that only its engine moves: who is refused, and who is answered."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from millibert_build.repository import MODELS
from millibert_ensemble.models.fused.arrivals import Arrivals

BATCH_SECONDS = 0.08
BUSY, INVALID = "busy", "invalid"


class Model:
    """A model that was not initialised, on doubles of all that it was to load."""

    def __init__(self, module: Any, max_texts: int) -> None:
        self.seconds = 100.0
        self.refused: Counter[str] = Counter()
        self.batches: list[int] = []
        module.time = SimpleNamespace(monotonic=lambda: self.seconds)
        module.tokenize = lambda _, requests: [
            SimpleNamespace(input_ids=texts, truncated=np.zeros((len(texts), 1), np.bool_)) for texts in requests
        ]
        module.tensors = lambda answer, _: [("answer", answer)]
        model = self.model = module.TritonPythonModel.__new__(module.TritonPythonModel)
        model._tokenizer = None
        model._host = SimpleNamespace(infer=self.infer)
        model._ranker = SimpleNamespace(requested_top_k=lambda _: 1, answers=lambda logits, *_: logits)
        model._busy, model._invalid = (
            SimpleNamespace(increment=lambda count, reason=reason: self.refused.update({reason: count}))
            for reason in (BUSY, INVALID)
        )
        model._timeout_us, model._max_texts = 1_000_000, max_texts
        model._arrivals = Arrivals(4096, self.seconds)

    def infer(self, requests: list[list[str]]) -> list[list[str]]:
        self.batches.append(sum(map(len, requests)))
        self.seconds += BATCH_SECONDS
        return requests

    def execute(self, *requests: tuple[list[str], float]) -> list[Any]:
        """Texts and patience in milliseconds of each request; its texts, or the code of its error."""
        made = [
            SimpleNamespace(
                texts=np.array([[text.encode()] for text in texts], np.object_),
                parameters=lambda ms=ms: json.dumps({"queue_timeout_ms": ms}),
            )
            for texts, ms in requests
        ]
        answers: list[Any] = self.model.execute(made)
        return answers


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    triton = SimpleNamespace(
        Tensor=lambda _, values: values,
        TritonError=SimpleNamespace(UNAVAILABLE=BUSY, INVALID_ARG=INVALID),
        InferenceResponse=lambda tensors: tensors[0][1],
        get_input_tensor_by_name=lambda request, _: SimpleNamespace(as_numpy=lambda: request.texts),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    # In a release the files of all models lie in one folder.
    folder = tmp_path / "fused_release"
    folder.mkdir()
    for model in ("tokenizer", "bert", "postprocess", "fused"):
        for path in (MODELS / model).glob("*.py"):
            shutil.copyfile(path, folder / path.name)
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.import_module("fused_release.model")
    for name in [name for name in sys.modules if name.startswith("fused_release")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(found, "_error", lambda message, code: (code, message))
    return found


def busy(*answers: Any) -> list[bool]:
    return [answer == (BUSY, "busy: no engine free in time") for answer in answers]


def test_what_waited_longer_than_it_may_is_refused(module: Any) -> None:
    model = Model(module, max_texts=8)
    assert model.execute((["first"], 1)) == [["first"]]  # it found nothing under way
    # They came while it was computed: 70, 50, 30 and 10 ms ago.
    answers = model.execute((["a"], 40), (["b"], 1000), (["c"], 40), (["d"], 1))
    assert busy(*answers) == [True, False, False, True]
    assert answers[1:3] == [["b"], ["c"]]
    assert model.batches == [1, 2]
    assert model.refused == {BUSY: 2}


def test_no_more_texts_at_a_time_than_the_engine_merges_and_who_is_late_by_then_is_refused(module: Any) -> None:
    model = Model(module, max_texts=3)
    requests = [(["a", "b"], 1000), (["c"], 1000), (["d", "e"], 50), (["f", "g"], 1000), (["h"], 200)]
    answers = model.execute(*requests)
    assert busy(*answers) == [False, False, True, False, False]
    assert model.batches == [3, 3]  # f, g and h after what was to go with d and e
    assert [answer for answer in answers if answer[0] != BUSY] == [["a", "b"], ["c"], ["f", "g"], ["h"]]


def test_a_request_that_is_wrong_gets_its_own_error(module: Any) -> None:
    model = Model(module, max_texts=2)
    answers = model.execute((["a", "b", "c"], 1000), (["d"], -1), (["e"], 1000))
    assert answers[0] == (INVALID, "3 texts in a request; this model takes 2")
    assert answers[1][0] == INVALID
    assert answers[2] == ["e"]
    assert model.refused == {INVALID: 2}
    assert busy(*model.execute((["f"], 30))) == [True]

"""Whether answers hang on their batches: what counts as a difference, and a run on a real server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.conftest import CUSTOMER_SERVICE, rewrite

from load import consistency
from load.consistency import compare, table

if TYPE_CHECKING:
    from tests.conftest import Release

TEST = CUSTOMER_SERVICE / "test.csv"
# A stage that answers wrong wherever a request with many texts comes.
SPOILT = """

_execute = TritonPythonModel.execute


def _spoilt(self, requests):
    responses = _execute(self, requests)
    for at, request in enumerate(requests):
        logits = pb_utils.get_input_tensor_by_name(request, "logits").as_numpy()
        if len(logits) > 1:
            answers = self._ranker.answers(logits[::-1].copy(), [len(logits)], [logits.shape[1]])
            responses[at] = pb_utils.InferenceResponse(tensors(next(iter(answers)), pb_utils))
    return responses


TritonPythonModel.execute = _spoilt
"""


def test_what_rounding_does_is_no_difference_and_one_text_is() -> None:
    alone = np.array([[0.9, 0.1], [0.2, 0.8]])
    rounded, wrong = alone + 0.004, np.array([[0.9, 0.1], [0.7, 0.3]])
    assert compare(alone, [rounded, rounded], 0.05)["differing"] == 0
    found = compare(alone, [rounded, wrong, wrong], 0.05)
    assert (found["passes"], found["differing"], found["most_texts"]) == (3, 2, 1)
    assert found["largest"] == pytest.approx(0.5)
    document = {"starts": [found], "texts": 2, "alike": False, "cpu": "x", "cpus": 2}
    assert "start 1: 2 of 3 passes differ, up to 1 of 2 texts, by 0.50" in table(document)
    assert "FAIL  1 of 1 starts" in table(document)


@pytest.mark.e2e
def test_answers_that_hang_on_their_batch_are_found(release: Release, tmp_path: Path, capsys: Any) -> None:
    repository = Path(shutil.copytree(release.repository, tmp_path / "repository"))
    given = ["--repository", str(repository), "--data", str(TEST), "--starts", "1", "--seconds", "1", "--json"]
    assert consistency.main(given) == 0
    sound = json.loads(capsys.readouterr().out)
    assert sound["alike"]
    assert sound["starts"][0]["passes"] >= 1
    model = repository / "postprocess" / "1" / "model.py"
    rewrite(model, model.read_text(encoding="utf-8") + SPOILT)
    assert consistency.main(given) == 1
    assert json.loads(capsys.readouterr().out)["starts"][0]["most_texts"] > 10

"""Texts to send: what sources say they are, and which answers count as right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from load.texts import ask_reference, read_source
from millibert import Classification, Prediction
from millibert._errors import UsageError


def test_texts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("message,label\nwhere is my card,a\nhi,b\n")
    texts = read_source(str(path), "message")
    assert texts.each == ("where is my card", "hi")
    assert texts.description == "texts.csv: 2 texts, words: mean 2.5, median 2, longest 4"
    with pytest.raises(UsageError, match="no column 'text'"):
        read_source(str(path))


def test_synthetic_texts_are_as_long_as_stated_and_the_same_everywhere() -> None:
    source = "synthetic:lognormal:mean=15,sigma=0.6,max=128,count=4000"
    texts = read_source(source)
    words = [len(text.split()) for text in texts.each]
    assert np.mean(words) == pytest.approx(15, rel=0.05)
    # The median of a lognormal distribution is exp(mu).
    assert np.median(words) == pytest.approx(15 * np.exp(-(0.6**2) / 2), rel=0.05)
    assert max(words) <= 128
    assert texts.description.startswith(f"{source}: 4,000 texts, words: mean ")
    assert read_source(source) == texts
    assert read_source(f"{source},seed=1").each != texts.each


def test_other_distributions() -> None:
    assert {len(text.split()) for text in read_source("synthetic:fixed:words=12,count=9").each} == {12}
    words = [len(text.split()) for text in read_source("synthetic:uniform:min=3,max=5").each]
    assert set(words) == {3, 4, 5}
    assert len(words) == 1000


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("synthetic:normal:mean=1", "no distribution 'normal'; there are lognormal, uniform, fixed"),
        ("synthetic:lognormal:mean=15", "sigma is missing"),
        ("synthetic:fixed:words=many", "words is a number, not 'many'"),
        ("synthetic:fixed:words=0", "words is above 0"),
        ("synthetic:fixed:letters=3", "'letters=3' is none of count=NUMBER"),
        ("synthetic:uniform:min=5,max=3", "min is above max"),
        ("synthetic:fixed:words=3,count=1e9", "count is 1 to 1,000,000"),
    ],
)
def test_what_is_no_source_is_told(source: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read_source(source)


class OneAnswer:
    """As much of a client as a reference needs: the same scores for every text."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores

    def labels(self) -> tuple[str, ...]:
        return tuple("abcd"[: len(self.scores)])

    def classify(self, texts: list[str], top_k: int) -> tuple[Classification, ...]:
        ranked = tuple(
            Prediction(label, place, score, True)
            for place, (label, score) in enumerate(zip(self.labels(), self.scores, strict=True))
        )
        return tuple(Classification(text, ranked[:top_k], False) for text in texts)


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ((0.9, 0.1), {"a"}),
        ((0.40, 0.36, 0.24), {"a", "b"}),
        ((0.34, 0.33, 0.32, 0.01), {"a", "b", "c"}),
        ((1.0,), {"a"}),
    ],
)
def test_labels_that_are_almost_as_good_as_the_best_are_right_too(scores: tuple[float, ...], right: set[str]) -> None:
    assert ask_reference(OneAnswer(*scores), ["x", "y"]) == (frozenset(right),) * 2  # type: ignore[arg-type]

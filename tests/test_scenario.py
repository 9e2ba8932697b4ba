"""Scenario files, and the one that ships with the project."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from millibert import UsageError
from millibert_build.scenario import load_scenario, make_scenario

SCENARIOS = Path(__file__).parents[1] / "build" / "scenarios"
DATA = {"train": "train.csv", "test": "test.csv"}


def scenario(**changes):
    return make_scenario({"name": "demo", "data": DATA, **changes}, "scenario.toml")


def test_defaults_are_enough():
    made = scenario()
    assert (made.base, made.max_tokens, made.max_texts, made.top_k) == ("minilm", 128, 64, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_n": 3}, r"scenario\.toml: top_n: Extra inputs are not permitted"),
        ({"training": {"epochs": 0}}, r"training\.epochs: .*greater than or equal to 1"),
        ({"name": "tokenizer"}, "is the name of one of the service's own models"),
        ({"name": "../evil"}, "name: .*pattern"),
        ({"labels": ["a", "a"]}, "labels: .*distinct"),
        ({"gates": {"min_accuracy": 93}}, r"gates\.min_accuracy"),
        ({"problem": "regression"}, "problem: "),
        ({"data": {"train": "x.csv"}}, r"data\.test: Field required"),
    ],
)
def test_a_wrong_scenario_names_the_key(changes, message):
    with pytest.raises(UsageError, match=message):
        scenario(**changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"name = ", "not valid TOML"), (b"name = '\xff'", "not UTF-8"), (None, "cannot read the scenario")],
)
def test_an_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "s.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_scenario(path)
    assert str(path) in str(caught.value)


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "s.toml").write_text(
        'name = "x"\nbase = "./mine"\n[data]\ntrain = "d/train.csv"\ntest = "hub:owner/name"\n'
    )
    made = load_scenario(tmp_path / "s.toml")
    assert made.data.train == str(tmp_path / "d/train.csv")
    assert made.data.test == "hub:owner/name"
    assert made.base == str(tmp_path / "mine")


@pytest.fixture(scope="module")
def shipped():
    folder = SCENARIOS / "customer_service"
    read = {}
    for name in ("train", "test", "out_of_scope"):
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            read[name] = list(csv.DictReader(file))
    return read


def test_the_shipped_scenario_has_enough_data(shipped):
    made = load_scenario(SCENARIOS / "customer_service.toml")
    per_label = Counter(row["label"] for split in ("train", "test") for row in shipped[split])
    assert set(per_label) == set(made.labels or ())
    assert len(per_label) == 10
    assert min(per_label.values()) >= 80
    assert len(shipped["out_of_scope"]) >= 150


def test_the_shipped_data_are_varied(shipped):
    words = [len(row["text"].split()) for row in shipped["train"]]
    assert min(words) <= 3
    assert max(words) >= 40


def test_no_near_duplicates_across_the_shipped_splits(shipped):
    def trigrams(text: str) -> set[str]:
        text = text.lower()
        return {text[i : i + 3] for i in range(len(text) - 2)}

    def similarity(a: set[str], b: set[str]) -> float:
        return len(a & b) / len(a | b)

    train = [trigrams(row["text"]) for row in shipped["train"]]
    held = [trigrams(row["text"]) for split in ("test", "out_of_scope") for row in shipped[split]]
    closest = max(similarity(a, b) for a in train for b in held if a and b)
    assert closest < 0.6

"""Continuing from a release with new examples: what is taken, what is refused, what is remembered."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import CUSTOMER_SERVICE, Release

from millibert import UsageError
from millibert_build.dataset import Example, Splits
from millibert_build.kept_data import load_data, save_data
from millibert_build.publish import RELEASE_FILE
from millibert_build.report import read_report
from millibert_build.retune import NEXT, open_release, with_feedback

NEW = [
    ("the courier app shows no movement at all", "track_order"),
    ("can you tell me where my shipment is right now", "track_order"),
    ("my parcel seems stuck in the depot for days", "track_order"),
    ("the voucher SPRING20 is rejected at checkout", "promo_code"),
    ("discount field says the code expired but it is brand new", "promo_code"),
    ("is there any coupon for returning customers", "promo_code"),
]


def feedback(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def mine(release: Release, tmp_path: Path) -> Release:
    """A copy of the release and its work folder."""
    shutil.copytree(release.work, tmp_path / "work")
    shutil.copytree(release.repository, tmp_path / "repository")
    return dataclasses.replace(release, work=tmp_path / "work", repository=tmp_path / "repository")


def retuned(mine: Release, add: str) -> Any:
    return mine.retune(mine.repository, add, "--precision", "fp32", "--json")


def test_the_next_release_knows_the_new_texts_and_where_it_comes_from(mine, tmp_path):
    before = json.loads((mine.repository / RELEASE_FILE).read_text())
    done = retuned(mine, feedback(tmp_path / "new.jsonl", NEW))
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest == json.loads((mine.repository / RELEASE_FILE).read_text())
    (parent,) = manifest["lineage"]
    assert parent["fingerprint"] == before["checkpoint"]["fingerprint"] != manifest["checkpoint"]["fingerprint"]
    assert parent["added"] == {"file": "new.jsonl", "held_back": 2}
    assert manifest["data"]["texts"]["train"] == before["data"]["texts"]["train"] + 4
    assert manifest["data"]["texts"]["test"] == before["data"]["texts"]["test"]
    # The next one continues from this one, with the settings of the first.
    assert not (mine.work / NEXT).exists()
    origin = open_release(mine.repository, mine.work)
    assert NEW[0][0] in {e.text for e in origin.splits.train} or NEW[1][0] in {e.text for e in origin.splits.train}
    assert origin.scenario.training.epochs == before["scenario"]["training"]["epochs"]


def test_what_makes_it_worse_is_refused_and_changes_nothing(mine, tmp_path):
    with (CUSTOMER_SERVICE / "train.csv").open(newline="") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    labels = sorted({label for _, label in rows})
    wrong = [(text, labels[(labels.index(label) + 1) % len(labels)]) for text, label in rows]
    repository, checkpoint = contents(mine.repository), contents(mine.work / "checkpoint")
    done = retuned(mine, feedback(tmp_path / "wrong.jsonl", wrong))
    assert done.returncode == 1
    assert "worse than the release: on the release's 250 test texts 0." in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(mine.repository) == repository
    assert contents(mine.work / "checkpoint") == checkpoint
    assert not (mine.work / NEXT).exists()
    report = read_report(mine.work / "report.json")
    assert (report.verdict.published, len(report.lineage)) == (False, 2)


def test_a_label_that_the_release_does_not_have(release, tmp_path):
    origin = open_release(release.repository, release.work)
    with pytest.raises(UsageError, match=r"new\.jsonl:2: label 'gift_wrap' is not one of the release's 10"):
        with_feedback(origin, feedback(tmp_path / "new.jsonl", [NEW[0], ("wrap it please", "gift_wrap")]))


def test_measured_texts_are_not_trained_on_and_the_new_label_of_a_text_counts(release, tmp_path):
    origin = open_release(release.repository, release.work)
    known, measured = origin.splits.train[0], origin.splits.test[0]
    other = next(label for label in origin.splits.labels if label != known.labels[0])
    rows = [*NEW, (known.text, other), (measured.text, measured.labels[0])]
    splits, held = with_feedback(origin, feedback(tmp_path / "new.jsonl", rows))
    trained = {e.text: e.labels[0] for e in splits.train}
    assert measured.text not in trained
    assert len(splits.train) == len(trained)  # no text twice
    assert trained.get(known.text, other) == other
    assert {e.text for e in held} <= {text for text, _ in rows}
    assert not {e.text for e in held} & set(trained)
    assert splits.warnings == ("1 new examples left out: they are in the validation or test data",)


def test_only_known_measured_texts_are_nothing_new(release, tmp_path):
    origin = open_release(release.repository, release.work)
    rows = [(e.text, e.labels[0]) for e in origin.splits.test[:3]]
    with pytest.raises(UsageError, match="no new examples"):
        with_feedback(origin, feedback(tmp_path / "new.jsonl", rows))


def test_a_work_folder_of_another_build(release, tmp_path):
    with pytest.raises(UsageError, match="give the --work folder of its build"):
        open_release(release.repository, tmp_path)
    with pytest.raises(UsageError, match=r"no readable release\.json"):
        open_release(tmp_path, release.work)


def test_kept_data_come_back_or_are_refused(tmp_path):
    one, two = Example("ä", ("a", "b"), "f.csv", 2), Example("x", (), "f.csv", 3)
    splits = Splits((one,), (two,), (two,), ("a", "b"), (), "multi_label", ("outside",))
    save_data(splits, tmp_path)
    assert load_data(tmp_path, splits.sha256()) == splits
    with pytest.raises(UsageError, match="not those of the release"):
        load_data(tmp_path, "0" * 64)

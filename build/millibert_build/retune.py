"""Continue from a release with new labelled examples, without forgetting what it knew.

The checkpoint and the very data of the release lie in the work folder of its build; the release names both by
fingerprint. Training goes on from that checkpoint on all of its old training texts (replay) and on most of the new
ones. What decides whether the result is published: the old test set, and the part of the new examples held back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from millibert._errors import UsageError
from millibert_build.batches import encode, predict_logits
from millibert_build.checkpoint import load_model, load_record
from millibert_build.dataset import Example, Splits, load_examples, stratified
from millibert_build.evaluate import Comparison, GateError
from millibert_build.findings import Source
from millibert_build.hub import Base
from millibert_build.kept_data import load_data
from millibert_build.objective import validation_score
from millibert_build.optimisation import learning_rate
from millibert_build.pipeline import Place, Release, locked, make_release, plan_of
from millibert_build.progress import Progress
from millibert_build.publish import RELEASE_FILE, check_replaceable
from millibert_build.scenario import Scenario, make_scenario
from millibert_build.stages import FINE_TUNED, Trained
from millibert_ensemble.hashing import file_sha256

NEXT = "next"
# Of the new examples: never trained on, they show whether the new release answers them better.
HELD_BACK = 0.2
# A model that is nearly right needs fewer and smaller steps than its base did.
_EPOCHS_SHARE = 1 / 3
_RATE_SHARE = 0.5


def retune(folder: Path, add: str, place: Place) -> Release:
    """Build `place.out` from the release in `folder` and more examples.

    Raises `UsageError` for wrong input and `GateError` where the result is worse than the release; `place.out` and
    the work folder are then as they were.
    """
    check_replaceable(place.out)
    plan = plan_of(open_release(folder, place.work).scenario, replace(place, work=place.work / NEXT))
    progress = Progress(plan.stages)
    with locked(place.work):
        with progress.stage("data"):
            origin = _open_settled(folder, place.work)
            splits, held = with_feedback(origin, add)
            scenario, base = continued(origin)
            added = len(splits.train) - len(origin.splits.train)
            progress.note(f"{len(splits.train)} train texts ({added:+d}), {len(held)} new texts held back")
        judge = _Judge(origin, held)
        lineage = [*origin.manifest["lineage"], _ancestor(origin, len(held), add)]
        next_place = replace(place, work=place.work / NEXT, report=place.report or place.work)
        source = Source(scenario, splits, base, lineage, remembered=origin.scenario)
        try:
            released = make_release(source, next_place, plan, progress, judge)
        except GateError:
            shutil.rmtree(next_place.work)
            raise
        promote(place.work)
    return released


@dataclass(frozen=True)
class Origin:
    """The release to continue from, and what of it is in the work folder."""

    manifest: dict[str, Any]
    scenario: Scenario
    splits: Splits
    checkpoint: Path
    work: Path


def open_release(folder: Path, work: Path) -> Origin:
    """Find the release and its checkpoint and data; raises `UsageError` where a part is missing or another's."""
    try:
        manifest = json.loads((folder / RELEASE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder}: no readable {RELEASE_FILE}; give a repository made by `millibert build`"
        ) from error
    if "checkpoint" not in manifest:
        raise UsageError(f"{folder}: made by an older millibert, which kept too little to continue from; build it anew")
    for place in (work, work / NEXT):
        if load_record(place / FINE_TUNED).get("fingerprint") == manifest["checkpoint"]["fingerprint"]:
            splits = load_data(place, manifest["data"]["sha256"])
            scenario = make_scenario(manifest["scenario"], f"{folder / RELEASE_FILE}: scenario")
            return Origin(manifest, scenario, splits, place / FINE_TUNED, work)
    raise UsageError(
        f"{work}: the checkpoint of {folder} is not there (built on another machine, or another build ran since); "
        "give the --work folder of its build"
    )


def _open_settled(folder: Path, work: Path) -> Origin:
    """Open a release, after finishing what a kill right behind its publication left undone."""
    origin = open_release(folder, work)
    if origin.checkpoint.parent == work / NEXT:
        promote(work)
        origin = open_release(folder, work)
    return origin


def with_feedback(origin: Origin, add: str) -> tuple[Splits, tuple[Example, ...]]:
    """The release's splits with the new examples in them, and those held back, which no split contains."""
    old = origin.splits
    new = load_examples(add, "train", origin.scenario.data, origin.scenario.problem)
    unknown = [(e, label) for e in new for label in e.labels if label not in old.labels]
    if unknown:
        example, label = unknown[0]
        raise UsageError(
            f"{example.place}: label {label!r} is not one of the release's {len(old.labels)} "
            f"({len(unknown)} such examples); a new label needs a new build"
        )
    measured = {e.text for e in (*old.validation, *old.test)}
    usable = tuple(e for e in new if e.text not in measured)
    if len(usable) < 2:
        raise UsageError(f"{add}: no new examples: all are in the release's validation or test data")
    kept, held = stratified(usable, HELD_BACK, origin.scenario.data.seed)
    if not held:
        kept, held = kept[1:], kept[:1]
    # The new word on a text counts.
    replaced = {e.text for e in usable}
    train = (*(e for e in old.train if e.text not in replaced), *kept)
    left_out = len(new) - len(usable)
    warnings = (f"{left_out} new examples left out: they are in the validation or test data",) if left_out else ()
    return replace(old, train=train, warnings=warnings), held


def continued(origin: Origin) -> tuple[Scenario, Base]:
    """The scenario of the further training, and the release's checkpoint as its base."""
    training = origin.scenario.training
    width = json.loads((origin.checkpoint / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    changes = {
        "epochs": max(1, round(training.epochs * _EPOCHS_SHARE)),
        "learning_rate": learning_rate(training, width) * _RATE_SHARE,
    }
    scenario = origin.scenario.model_copy(update={"training": training.model_copy(update=changes)})
    weights = file_sha256(origin.checkpoint / "model.safetensors")
    name = f"release {origin.manifest['checkpoint']['fingerprint'][:12]}"
    return scenario, Base(str(origin.checkpoint), None, name, weights)


def promote(work: Path) -> None:
    """Make what was built in `work / NEXT` the state of `work`: the next release continues from it."""
    for path in (work / NEXT).iterdir():
        if path.name == "lock":
            continue
        target = work / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)
    shutil.rmtree(work / NEXT)


class _Judge:
    """The old test set guards against forgetting; the new examples held back show whether anything was learnt."""

    def __init__(self, origin: Origin, held: Sequence[Example]) -> None:
        self._origin = origin
        self._held = held

    def __call__(self, trained: Trained, test: Comparison) -> Mapping[str, Any]:
        """Figures for the manifest; raises `GateError` for what is worse."""
        origin = self._origin
        before = load_model(origin.checkpoint)
        old_test, new_test = (self._score(model, trained, origin.splits.test) for model in (before, trained.model))
        old_held, new_held = (self._score(model, trained, self._held) for model in (before, trained.model))
        worse = []
        loss = old_test - new_test
        if loss > origin.scenario.gates.max_forgetting:
            worse.append(
                f"on the release's {len(origin.splits.test)} test texts {new_test:.4f}, the release {old_test:.4f} "
                f"(max_forgetting {origin.scenario.gates.max_forgetting})"
            )
        if new_held < old_held:
            worse.append(f"on {len(self._held)} new texts held back {new_held:.4f}, the release {old_held:.4f}")
        if worse:
            raise GateError(f"worse than the release: {'; '.join(worse)}")
        figures = {"release_on_test": old_test, "release_on_new": old_held, "on_test": new_test, "on_new": new_held}
        return {"retuned": {**figures, "new_texts": len(self._held)}}

    def _score(self, model: Any, trained: Trained, examples: Sequence[Example]) -> float:
        data = encode(examples, trained.tokenizer, self._origin.splits.labels)
        return validation_score(predict_logits(model, data.ids), data.targets, self._origin.scenario.problem)


def _ancestor(origin: Origin, held: int, add: str) -> dict[str, Any]:
    """What the next manifest says of the release it came from."""
    manifest = origin.manifest
    return {
        "fingerprint": manifest["checkpoint"]["fingerprint"],
        "created": manifest["created"],
        "data_sha256": manifest["data"]["sha256"],
        "metrics": manifest["metrics"],
        "added": {"file": Path(add).name, "held_back": held},
    }

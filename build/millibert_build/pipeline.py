"""The build, top to bottom: labelled text to a published model repository.

Each stage reads what the one before it wrote. What takes minutes, the stages that train, is kept in the work folder
(see `stages`), so that a build that was interrupted or failed a later stage does not train again.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from millibert._errors import UsageError
from millibert_build import release
from millibert_build.calibrate import Calibration, auroc, calibrate, save_calibration
from millibert_build.dataset import Example, Splits, load_splits
from millibert_build.engine import Floats
from millibert_build.evaluate import Comparison, check_pruning_gates, compare
from millibert_build.export import export_packed
from millibert_build.hub import Base, resolve_base
from millibert_build.kept_data import save_data
from millibert_build.progress import Progress
from millibert_build.publish import RELEASE_FILE, check_replaceable, replacing
from millibert_build.repository import Artefacts, hash_files, write_models
from millibert_build.scenario import Engine, Precision, Scenario
from millibert_build.stages import Trained, fine_tuned, pruned
from millibert_build.tokens import token_ids
from millibert_build.variants import Measured, Variant, Workshop, first_passing, make_variants, measured, passing
from millibert_ensemble.models.postprocess.ranking import softmax


@dataclass(frozen=True)
class Place:
    """Where a build runs and what with."""

    engine: Engine
    precision: Precision
    out: Path
    work: Path
    tensorboard: Path | None = None


@dataclass(frozen=True)
class Source:
    """What a release is made from, and what its manifest says of that."""

    scenario: Scenario
    splits: Splits
    base: Base
    lineage: Sequence[Mapping[str, Any]] = ()
    remembered: Scenario | None = None
    """The scenario that a later build continues with, where it is not this one."""


def build(scenario: Scenario, place: Place) -> dict[str, Any]:
    """Build `place.out`, a Triton model repository, and return its release manifest.

    Raises `UsageError` for wrong input and `GateError` for a missed gate; `place.out` is then as it was.
    """
    check_replaceable(place.out)
    progress = Progress(total=6 + scenario.pruning.active)
    with locked(place.work):
        with progress.stage("data"):
            splits = load_splits(scenario.data, scenario.labels, scenario.training.seed, scenario.problem)
            source = Source(scenario, splits, resolve_base(scenario.base))
            progress.note(_describe(splits))
        return make_release(source, place, progress)


def make_release(
    source: Source,
    place: Place,
    progress: Progress,
    judge: Callable[[Trained, Comparison], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Everything behind the data. `judge` may refuse what is about to be published, by raising `GateError`."""
    scenario, splits = source.scenario, source.splits
    _check_top_k(scenario, splits)
    for warning in splits.warnings:
        progress.warn(warning)
    with progress.stage("train"), _training_log(place.tensorboard) as log:
        trained = fine_tuned(scenario, source.base, splits, place.work, log)
        progress.note(_describe_training(trained))
    smaller = _pruned(source, trained, place, progress) if scenario.pruning.active else None
    before, trained = trained, smaller or trained
    with progress.stage("export"):
        fp32 = place.work / "fp32.onnx"
        export_packed(trained.model, scenario.max_tokens, fp32)
        progress.note(f"packed ONNX, {fp32.stat().st_size / 1e6:.1f} MB")
    with progress.stage("engine"):
        validation = measured(splits.validation, trained, splits.labels)
        recall = scenario.abstention.in_scope_recall
        calibration = calibrate(scenario.problem, validation.reference, validation.targets, recall)
        save_calibration(trained.folder, calibration)
        shop = Workshop(scenario, place.engine, trained, validation, calibration, place.work)
        variants = make_variants(shop, fp32, place.precision, splits)
        choices = passing(variants)
        progress.note(_describe_engine(place.engine, choices[0], variants))
    with progress.stage("evaluate"):
        test = measured(splits.test, trained, splits.labels)
        stages: dict[str, Any] = {}
        logits = {each.precision: shop.logits(each.precision, each.onnx, test.ids) for each in variants}
        found = {precision: shop.compare(each, test) for precision, each in logits.items()}
        if smaller is not None:
            against = _against(before, test, scenario, calibration, splits.test, splits.labels)
            check_pruning_gates(against, scenario.gates)
            stages["pruning"] = against._asdict()
        chosen = first_passing(choices, found, scenario.gates)
        comparison = found[chosen.precision]
        if chosen is not choices[0]:
            progress.warn(f"{choices[0].precision} passed on validation and not on test; {chosen.precision} is served")
        abstention = _abstention(shop, chosen, logits[chosen.precision], splits)
        progress.note(_describe_comparison(comparison, abstention))
        judged = judge(trained, comparison) if judge is not None else {}
    with progress.stage("publish"), replacing(place.out) as staging:
        artefacts = Artefacts(
            trained.tokenizer, chosen.onnx, splits.labels, place.engine, chosen.precision, calibration
        )
        write_models(staging, scenario, artefacts)
        manifest = release.describe(scenario, source.base, splits, trained.curve)
        manifest["scenario"] = release.portable(source.remembered or scenario)
        manifest["checkpoint"] = {"fingerprint": before.record["fingerprint"]}
        manifest["removed"] = trained.record.get("removed")
        manifest["lineage"] = list(source.lineage)
        manifest["engine"] = release.describe_engine(place.engine, chosen, variants)
        manifest["thresholds"] = dict(zip(splits.labels, calibration.thresholds, strict=True))
        manifest["metrics"] = {"test": comparison._asdict(), "abstention": abstention, **stages, **judged}
        manifest["metrics"]["variants"] = {name: each._asdict() for name, each in found.items()}
        manifest["files"] = hash_files(staging)
        (staging / RELEASE_FILE).write_text(release.as_json(manifest), encoding="utf-8")
        save_data(splits, place.work)
        progress.note(str(place.out))
    return manifest


def _pruned(source: Source, before: Trained, place: Place, progress: Progress) -> Trained:
    """Prune and recover; refused on validation texts already where too much was lost."""
    scenario, splits = source.scenario, source.splits
    with progress.stage("prune"), _training_log(place.tensorboard) as log:
        trained = pruned(scenario, before, splits, place.work, log)
        validation = measured(splits.validation, trained, splits.labels)
        recall = scenario.abstention.in_scope_recall
        calibration = calibrate(scenario.problem, validation.reference, validation.targets, recall)
        found = _against(before, validation, scenario, calibration, splits.validation, splits.labels)
        sizes = [sum(p.numel() for p in each.model.parameters()) / 1e6 for each in (before, trained)]
        progress.note(
            f"{sizes[0]:.1f} to {sizes[1]:.1f} million parameters, validation {found.score_name} "
            f"{found.engine_score:.4f}, before {found.checkpoint_score:.4f}, agreement {found.agreement:.4f}"
        )
        check_pruning_gates(found, scenario.gates, "validation")
    return trained


def _against(
    before: Trained,
    after: Measured,
    scenario: Scenario,
    calibration: Calibration,
    examples: Sequence[Example],
    labels: Sequence[str],
) -> Comparison:
    """A later checkpoint's logits against those of an earlier one on the same texts."""
    reference = measured(examples, before, labels).reference
    return compare(scenario.problem, reference, after.reference, after.targets, calibration)


def _abstention(shop: Workshop, chosen: Variant, inside: Floats, splits: Splits) -> dict[str, float] | None:
    """How well the best label's score parts the test texts from those that no label fits; None without such texts."""
    if not splits.out_of_scope or shop.scenario.problem != "single_label":
        return None
    outside = shop.logits(chosen.precision, chosen.onnx, token_ids(shop.trained.tokenizer, splits.out_of_scope))
    temperature, threshold = np.float32(shop.calibration.temperature), shop.calibration.thresholds[0]
    inside_best, outside_best = (softmax(logits / temperature).max(axis=1) for logits in (inside, outside))
    return {
        "threshold": threshold,
        "in_scope_recall": float((inside_best >= threshold).mean()),
        "out_of_scope_refused": float((outside_best < threshold).mean()),
        "auroc": auroc(inside_best, outside_best),
    }


def _check_top_k(scenario: Scenario, splits: Splits) -> None:
    if scenario.top_k > len(splits.labels):
        raise UsageError(f"top_k {scenario.top_k} is more than the {len(splits.labels)} labels; lower it")


def _describe(splits: Splits) -> str:
    sizes = f"{len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test texts"
    return f"{sizes}, {len(splits.labels)} labels"


def _describe_training(trained: Trained) -> str:
    if trained.reused:
        return "unchanged: the checkpoint of the last build is used again"
    best = trained.best
    stopped = f" of {len(trained.curve)}" if best.number < len(trained.curve) else ""
    return f"validation score {best.validation_score:.4f} after epoch {best.number}{stopped}"


def _describe_comparison(comparison: Comparison, abstention: dict[str, float] | None) -> str:
    kept_out = (
        ""
        if abstention is None
        else (
            f', "don\'t know" to {abstention["out_of_scope_refused"]:.1%} of out-of-scope and '
            f"{1 - abstention['in_scope_recall']:.1%} of test texts (AUROC {abstention['auroc']:.4f})"
        )
    )
    return (
        f"test {comparison.score_name} {comparison.engine_score:.4f}, checkpoint {comparison.checkpoint_score:.4f}, "
        f"agreement {comparison.agreement:.4f}, calibration error {comparison.calibration_error:.4f} "
        f"(uncalibrated {comparison.calibration_error_before:.4f}){kept_out}"
    )


def _describe_engine(engine: str, chosen: Variant, variants: Sequence[Variant]) -> str:
    speeds = ", ".join(
        f"{v.precision} {v.texts_per_second:,.0f} texts/s{'' if v.refusal is None else ' (refused)'}" for v in variants
    )
    return f"{engine} {chosen.precision} ({speeds} on validation texts, in process)"


@contextmanager
def _training_log(folder: Path | None) -> Iterator[Any]:
    """A TensorBoard writer, or None."""
    if folder is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise UsageError("--tensorboard needs the extra 'tensorboard': pip install 'millibert[tensorboard]'") from error
    with SummaryWriter(str(folder)) as writer:
        yield writer


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """One build at a time per work folder."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{work}: another build is running there; wait for it or use another --work") from error
        yield

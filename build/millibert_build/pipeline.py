"""The build, top to bottom: labelled text to a published model repository.

Each stage reads what the one before it wrote. The fine-tuned checkpoint, the one stage that takes minutes, is
kept in the work folder under the fingerprint of all that went into it, so that a build that was interrupted or
failed a later stage does not train again.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from millibert._errors import UsageError
from millibert_build import release
from millibert_build import train as training
from millibert_build.calibrate import fit_temperature
from millibert_build.checkpoint import load_model, load_record, save_record
from millibert_build.dataset import Example, Splits, load_splits
from millibert_build.engine import (
    Candidate,
    Floats,
    available_precisions,
    choose,
    measure,
    open_engine,
    run_packed,
)
from millibert_build.evaluate import Comparison, check_gates, compare
from millibert_build.export import export_packed
from millibert_build.hub import Base, file_sha256, resolve_base
from millibert_build.progress import Progress
from millibert_build.publish import RELEASE_FILE, check_replaceable, replacing
from millibert_build.repository import Artefacts, hash_files, write_models
from millibert_build.scenario import Engine, Precision, Scenario
from millibert_build.tokens import limited, load_tokenizer, token_ids
from millibert_build.train import Epoch, best_epoch, predict_logits, train


@dataclass(frozen=True)
class Checkpoint:
    """A fine-tuned model, its tokenizer cut to the scenario's limit, and how it was trained."""

    folder: Path
    model: PreTrainedModel
    tokenizer: Tokenizer
    curve: Sequence[Epoch]


@dataclass(frozen=True)
class Measured:
    """Texts of one split as ids, the right answers, and the fp32 checkpoint's logits."""

    ids: list[list[int]]
    targets: list[int]
    reference: Floats


def build(scenario: Scenario, engine: Engine, precision: Precision, out: Path, work: Path) -> dict[str, Any]:
    """Build `out`, a Triton model repository, and return its release manifest.

    Raises `UsageError` for wrong input and `GateError` for a missed gate; `out` is then as it was.
    """
    check_replaceable(out)
    progress = Progress(total=6)
    with _locked(work):
        with progress.stage("data"):
            splits = load_splits(scenario.data, scenario.labels, scenario.training.seed)
            _check_top_k(scenario, splits)
            base = resolve_base(scenario.base)
            progress.note(_describe(splits))
        for warning in splits.warnings:
            progress.warn(warning)
        with progress.stage("train"):
            checkpoint = _checkpoint(scenario, base, splits, work / "checkpoint", progress)
        with progress.stage("export"):
            onnx = work / "model.onnx"
            export_packed(checkpoint.model, scenario.max_tokens, onnx)
            progress.note(f"packed ONNX, {onnx.stat().st_size / 1e6:.1f} MB")
        with progress.stage("engine"):
            validation = _measured(splits.validation, checkpoint, splits.labels)
            chosen, candidates = _choose_precision(scenario, engine, precision, onnx, validation)
            progress.note(_describe_engine(engine, chosen, candidates))
            temperature = fit_temperature(validation.reference, np.asarray(validation.targets))
        with progress.stage("evaluate"):
            test = _measured(splits.test, checkpoint, splits.labels)
            comparison = _compare(scenario, engine, chosen.precision, onnx, test, temperature)
            progress.note(
                f"test accuracy {comparison.engine_accuracy:.4f}, checkpoint {comparison.checkpoint_accuracy:.4f}, "
                f"agreement {comparison.agreement:.4f}, calibration error {comparison.calibration_error:.4f} "
                f"(uncalibrated {comparison.calibration_error_before:.4f})"
            )
            check_gates(comparison, scenario.gates)
        with progress.stage("publish"), replacing(out) as staging:
            artefacts = Artefacts(checkpoint.tokenizer, onnx, splits.labels, engine, chosen.precision, temperature)
            write_models(staging, scenario, artefacts)
            manifest = release.describe(scenario, base, splits, checkpoint.curve)
            manifest["engine"] = release.describe_engine(engine, chosen, candidates, onnx)
            manifest["metrics"] = {"test": comparison._asdict()}
            manifest["files"] = hash_files(staging)
            (staging / RELEASE_FILE).write_text(release.as_json(manifest), encoding="utf-8")
            progress.note(str(out))
    return manifest


def _checkpoint(scenario: Scenario, base: Base, splits: Splits, folder: Path, progress: Progress) -> Checkpoint:
    """Fine-tune, or take the checkpoint that the same inputs gave before."""
    fingerprint = _fingerprint(scenario, base, splits)
    earlier = load_record(folder)
    if earlier.get("fingerprint") == fingerprint:
        curve = [Epoch(**epoch) for epoch in earlier["curve"]]
        progress.note("unchanged: the checkpoint of the last build is used again")
    else:
        unfinished = folder.with_name("checkpoint.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        curve = train(base, splits, scenario.training, scenario.max_tokens, unfinished)
        remembered = {"fingerprint": fingerprint, "max_tokens": scenario.max_tokens}
        save_record(unfinished, {**remembered, "curve": [asdict(epoch) for epoch in curve]})
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        best = best_epoch(curve)
        progress.note(f"validation accuracy {best.validation_accuracy:.4f} after epoch {best.number}")
    model = load_model(folder)
    tokenizer = limited(load_tokenizer(str(folder)), scenario.max_tokens)
    return Checkpoint(folder, model, tokenizer, curve)


def _fingerprint(scenario: Scenario, base: Base, splits: Splits) -> str:
    """Hash of everything that decides what training gives."""
    inputs = {
        "data": splits.sha256(),
        "labels": splits.labels,
        "base": [base.location, base.revision, base.sha256],
        "training": scenario.training.model_dump(),
        "max_tokens": scenario.max_tokens,
        "versions": [importlib.metadata.version(name) for name in ("millibert", "torch", "transformers")],
        # While millibert itself is worked on, its version stands still and its recipe does not.
        "recipe": file_sha256(Path(training.__file__)),
    }
    return hashlib.sha256(release.as_json(inputs).encode()).hexdigest()


def _measured(examples: Sequence[Example], checkpoint: Checkpoint, labels: Sequence[str]) -> Measured:
    ids = token_ids(checkpoint.tokenizer, [example.text for example in examples])
    number = {label: index for index, label in enumerate(labels)}
    reference = predict_logits(checkpoint.model, ids, show="fp32 reference").numpy()
    return Measured(ids, [number[example.label] for example in examples], reference)


def _choose_precision(
    scenario: Scenario, engine: Engine, precision: Precision, onnx: Path, validation: Measured
) -> tuple[Candidate, list[Candidate]]:
    precisions = available_precisions(engine, onnx) if precision == "auto" else [precision]
    candidates = measure(engine, onnx, precisions, validation.ids, validation.reference, scenario.max_texts)
    if precision != "auto":
        return candidates[0], candidates
    return choose(candidates, scenario.gates.min_agreement), candidates


def _compare(
    scenario: Scenario, engine: Engine, precision: str, onnx: Path, test: Measured, temperature: float
) -> Comparison:
    logits = run_packed(open_engine(engine, onnx, precision), test.ids, scenario.max_texts)
    return compare(test.reference, logits, test.targets, temperature)


def _check_top_k(scenario: Scenario, splits: Splits) -> None:
    if scenario.top_k > len(splits.labels):
        raise UsageError(f"top_k {scenario.top_k} is more than the {len(splits.labels)} labels; lower it")


def _describe(splits: Splits) -> str:
    sizes = f"{len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test texts"
    return f"{sizes}, {len(splits.labels)} labels"


def _describe_engine(engine: str, chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    speeds = ", ".join(f"{c.precision} {c.texts_per_second:,.0f} texts/s" for c in candidates)
    return f"{engine} {chosen.precision} ({speeds} on validation texts, in process)"


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """One build at a time per work folder."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{work}: another build is running there; wait for it or use another --work") from error
        yield

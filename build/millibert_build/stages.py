"""The stages that train: fine-tuning, and pruning with its recovery. Each leaves a checkpoint in the work folder.

A checkpoint is kept under the fingerprint of all that went into it. A build that was interrupted or failed a later
stage does not train again, and one that was killed while it trained goes on after its last epoch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from millibert._errors import UsageError
from millibert_build import release
from millibert_build.accelerator import training_device
from millibert_build.batches import Encoded, encode, padded, predict_logits, shuffled_batches
from millibert_build.checkpoint import load_model, load_record, save_record
from millibert_build.dataset import Example, Splits
from millibert_build.hub import Base
from millibert_build.learning_curve import Epoch, best_epoch
from millibert_build.objective import Objective, Teacher, prior_logits
from millibert_build.optimisation import learning_rate
from millibert_build.prune import prune
from millibert_build.scenario import Distillation, Scenario
from millibert_build.sparsify import apply_masks, two_four_masks
from millibert_build.tokens import limited, load_tokenizer, token_ids
from millibert_build.train import STATE, Course, fine_tune, load_base
from millibert_ensemble.hashing import file_sha256

FINE_TUNED = "checkpoint"
PRUNED = "pruned"
# What a pruned model learns from while it recovers, beside the labels: the model it was.
RECOVERY = Distillation(teacher="the model before pruning", weight=0.5, temperature=2.0)
# Enough for a stable order of heads and neurons; more only takes longer.
IMPORTANCE_TEXTS = 2048
_FINGERPRINT = "fingerprint"
_START = "start"
_TEACHER = "teacher.pt"
_RECIPE = ("accelerator", "batches", "learning_curve", "objective", "optimisation", "train")


@dataclass(frozen=True)
class Trained:
    """A checkpoint, the tokenizer cut to the scenario's limit, and how it came about."""

    folder: Path
    model: PreTrainedModel
    tokenizer: Tokenizer
    curve: Sequence[Epoch]
    record: Mapping[str, Any]
    reused: bool

    @property
    def best(self) -> Epoch:
        """The epoch whose weights these are."""
        return best_epoch(self.curve)


def fine_tuned(scenario: Scenario, base: Base, splits: Splits, work: Path, log: Any = None) -> Trained:
    """The base, fine-tuned to the training texts."""
    inputs = {
        "data": splits.sha256(),
        "labels": splits.labels,
        "problem": scenario.problem,
        "base": [base.location, base.revision, base.sha256],
        "training": scenario.training.model_dump(),
        "distillation": scenario.distillation and _identity(scenario.distillation),
    }

    def make(folder: Path) -> dict[str, Any]:
        training = scenario.training
        tokenizer = load_tokenizer(base.location, base.revision)
        model = load_base(base, splits.labels, scenario.max_tokens, scenario.problem, training)
        train, validation = _encoded(splits, limited(tokenizer, scenario.max_tokens))
        if scenario.problem == "multi_label":
            _start_from_priors(model, train)
        teacher = _teacher(scenario.distillation, splits) if scenario.distillation is not None else None
        fine_tune(model, Course(scenario.problem, train, validation, training, teacher, log=log), folder)
        tokenizer.save_pretrained(folder)
        return {}

    return _kept(work / FINE_TUNED, scenario, inputs, _RECIPE, make)


def pruned(scenario: Scenario, before: Trained, splits: Splits, work: Path, log: Any = None) -> Trained:
    """The fine-tuned model with heads, neurons, layers or weights removed, and recovered."""
    settings = scenario.pruning
    inputs = {"before": before.record[_FINGERPRINT], "pruning": settings.model_dump()}

    def make(folder: Path) -> dict[str, Any]:
        train, validation = _encoded(splits, before.tokenizer)
        start = _start_of_recovery(folder / _START, scenario, before, train)
        masks = two_four_masks(start.model) if settings.sparsity == "2:4" else None
        after_step = None if masks is None else lambda changed: apply_masks(changed, masks)
        if after_step is not None:
            after_step(start.model)
        rate = settings.recovery_learning_rate or learning_rate(scenario.training, start.model.config.hidden_size) / 2
        changes = {"epochs": settings.recovery_epochs, "learning_rate": rate, "patience": None, "freeze": "none"}
        training = scenario.training.model_copy(update=changes)
        course = Course(scenario.problem, train, validation, training, start.teacher, after_step, log)
        fine_tune(start.model, course, folder)
        load_tokenizer(str(before.folder)).save_pretrained(folder)
        return {"removed": start.removed}

    return _kept(work / PRUNED, scenario, inputs, (*_RECIPE, "prune", "sparsify"), make)


class _Start(NamedTuple):
    """A pruned model that has not recovered, what it learns from, and what was removed."""

    model: Any
    teacher: Teacher
    removed: dict[str, Any]


def _start_of_recovery(folder: Path, scenario: Scenario, before: Trained, train: Encoded) -> _Start:
    """Prune, or take up what was pruned into `folder` by a build that was killed while the model recovered."""
    if not folder.is_dir():
        model = load_model(before.folder)
        logits = predict_logits(model, train.ids, show="before pruning")
        objective = Objective(scenario.problem, scenario.training, train.targets)
        removed = prune(model, _importance_batches(train, scenario), scenario.pruning, objective)
        aside = folder.with_suffix(".new")
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        torch.save(logits, aside / _TEACHER)
        save_record(aside, asdict(removed))
        aside.rename(folder)
    logits = torch.load(folder / _TEACHER, weights_only=True)
    return _Start(load_model(folder), Teacher.of(logits, RECOVERY), load_record(folder))


def _start_from_priors(model: Any, train: Encoded) -> None:
    """Set the bias of a new classifier; one that a release brings along has learnt its own."""
    if not model.classifier.bias.any():
        model.classifier.bias.data.copy_(prior_logits(train.targets))


def _kept(
    folder: Path,
    scenario: Scenario,
    inputs: Mapping[str, Any],
    recipe: Sequence[str],
    make: Callable[[Path], dict[str, Any]],
) -> Trained:
    """Make a checkpoint, finish the one that was begun, or take the one that the same inputs gave before."""
    fingerprint = _fingerprint({**inputs, "max_tokens": scenario.max_tokens}, recipe)
    reused = load_record(folder).get(_FINGERPRINT) == fingerprint
    if not reused:
        unfinished = _unfinished(folder, fingerprint)
        record = make(unfinished)
        curve = torch.load(unfinished / STATE, weights_only=True)["curve"]
        remembered = {_FINGERPRINT: fingerprint, "max_tokens": scenario.max_tokens, "problem": scenario.problem}
        save_record(unfinished, {**remembered, **record, "curve": curve})
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder / _START, ignore_errors=True)
    record = load_record(folder)
    tokenizer = limited(load_tokenizer(str(folder)), scenario.max_tokens)
    curve = [Epoch(**epoch) for epoch in record["curve"]]
    return Trained(folder, load_model(folder), tokenizer, curve, record, reused)


def _unfinished(folder: Path, fingerprint: str) -> Path:
    """Where a checkpoint is made: what a killed build with the same inputs left there stays."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    mark = unfinished / _FINGERPRINT
    if not mark.is_file() or mark.read_text(encoding="ascii") != fingerprint:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        mark.write_text(fingerprint, encoding="ascii")
    return unfinished


def _fingerprint(inputs: Mapping[str, Any], recipe: Sequence[str]) -> str:
    """Hash of everything that decides what training gives."""
    versions = [importlib.metadata.version(name) for name in ("millibert", "torch", "transformers")]
    # While millibert itself is worked on, its version stands still and its recipe does not.
    code = [file_sha256(Path(__file__).with_name(f"{name}.py")) for name in recipe]
    return hashlib.sha256(release.as_json({**inputs, "versions": versions, "code": code}).encode()).hexdigest()


def _encoded(splits: Splits, tokenizer: Tokenizer) -> tuple[Encoded, Encoded]:
    return encode(splits.train, tokenizer, splits.labels), encode(splits.validation, tokenizer, splits.labels)


def _importance_batches(train: Encoded, scenario: Scenario) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Some of the training texts as ids, mask and targets: what importance is measured on."""
    order = shuffled_batches(train.ids, scenario.training.batch_size, random.Random(scenario.training.seed))  # noqa: S311
    batches = order[: max(1, IMPORTANCE_TEXTS // scenario.training.batch_size)]
    return [(*padded([train.ids[index] for index in batch]), train.targets[batch]) for batch in batches]


def _teacher(distillation: Distillation, splits: Splits) -> Teacher:
    """The mean of the teachers' logits on the training texts."""
    logits = torch.stack([_teacher_logits(folder, splits) for folder in distillation.teachers])
    return Teacher.of(logits.mean(dim=0), distillation)


def _teacher_logits(folder: Path, splits: Splits) -> torch.Tensor:
    """A teacher's logits, its labels in our order, its text cut by its own tokenizer."""
    record = load_record(folder)
    if not record:
        raise UsageError(f"distillation.teacher: {folder} is not a checkpoint of `millibert build`")
    model = load_model(folder)
    cast(nn.Module, model).to(training_device())
    position = {str(label): int(index) for index, label in dict(model.config.id2label or {}).items()}
    missing = [label for label in splits.labels if label not in position]
    if missing:
        raise UsageError(f"distillation.teacher: {folder} does not know the label {missing[0]!r}")
    ids = _teacher_ids(folder, record["max_tokens"], splits.train)
    logits = predict_logits(model, ids, show="teacher")
    return logits[:, [position[label] for label in splits.labels]]


def _teacher_ids(folder: Path, max_tokens: int, examples: Sequence[Example]) -> list[list[int]]:
    tokenizer = limited(load_tokenizer(str(folder)), max_tokens)
    return token_ids(tokenizer, [example.text for example in examples])


def _identity(distillation: Distillation) -> dict[str, Any]:
    """The settings, with what the teachers are instead of where they lie."""
    weights = [folder / "model.safetensors" for folder in distillation.teachers]
    for file in weights:
        if not file.is_file():
            raise UsageError(f"distillation.teacher: no {file.name} in {file.parent}")
    return {**distillation.model_dump(exclude={"teacher"}), "sha256": [file_sha256(file) for file in weights]}

"""Fine-tuning of a BERT sequence classifier: epochs, the best of them, and going on after a kill.

On a GPU where there is one; bf16 autocast where the device computes in it, batches of similar length, a fixed seed.
What is validated and kept is a running average of the weights over about an epoch (Polyak averaging), of the epoch with
the best validation score. After every epoch all that decides the rest of the run is saved, so that a run that was
killed goes on from there: on a CPU it ends with the very weights of an uninterrupted one; on a GPU, which does not add
up in a fixed order, with nearly the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from millibert._errors import UsageError
from millibert_build.accelerator import computes_in_bf16, training_device
from millibert_build.batches import Encoded, padded, predict_logits, shuffled_batches
from millibert_build.checkpoint import load_pruned
from millibert_build.hub import Base
from millibert_build.learning_curve import Epoch, best_epoch
from millibert_build.objective import Objective, Teacher, validation_loss, validation_score
from millibert_build.optimisation import freeze, make_optimizer, make_schedule
from millibert_build.prune import structure_of
from millibert_build.scenario import Problem, Training

STATE = "state.pt"
_PROBLEM_TYPES = {"single_label": "single_label_classification", "multi_label": "multi_label_classification"}


@dataclass(frozen=True)
class Course:
    """What a model is fine-tuned on, and how."""

    problem: Problem
    train: Encoded
    validation: Encoded
    training: Training
    teacher: Teacher | None = None
    after_step: Callable[[PreTrainedModel], None] | None = None
    """Called after each step of the optimizer, to keep weights where they must stay."""
    log: Any = None
    """A TensorBoard `SummaryWriter`, or None."""


@dataclass
class _Run:
    """Everything that changes while a model is fine-tuned, and so has to survive a kill."""

    model: PreTrainedModel
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    order: random.Random
    curve: list[Epoch] = field(default_factory=list)

    @property
    def averaged(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.average.module)

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer", "schedule")}
        state |= {"order": self.order.getstate(), "torch": torch.get_rng_state()}
        state["cuda"] = torch.cuda.get_rng_state_all()  # of no GPU: an empty list
        state["curve"] = [asdict(epoch) for epoch in self.curve]
        aside = path.with_suffix(".new")
        torch.save(state, aside)
        aside.replace(path)

    def load(self, path: Path) -> None:
        # Our own file, and the state of `random` is nested tuples of numbers.
        state = torch.load(path, weights_only=True, map_location="cpu")
        for name in ("model", "average", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.order.setstate(state["order"])
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state_all(state["cuda"])
        self.curve = [Epoch(**epoch) for epoch in state["curve"]]


def fine_tune(model: PreTrainedModel, course: Course, folder: Path) -> list[Epoch]:
    """Fine-tune `model` in place and write the best average to `folder`; returns the learning curve.

    A `folder` that an earlier call with the same arguments did not finish is taken up after its last epoch. The
    caller removes `folder / STATE` when it no longer needs that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training = course.training
    torch.manual_seed(training.seed)
    cast(nn.Module, model).to(training_device())
    freeze(model, training.freeze)
    run = _start(model, course)
    if (folder / STATE).is_file():
        run.load(folder / STATE)
    for epoch in _epochs(run, course):
        if not run.curve or epoch.rank > best_epoch(run.curve).rank:
            run.averaged.save_pretrained(folder)
        run.curve.append(epoch)
        run.save(folder / STATE)
    return run.curve


def load_base(base: Base, labels: Sequence[str], max_tokens: int, problem: Problem, training: Training) -> Any:
    """The base checkpoint with a classifier for these labels, in fp32; raises `UsageError` for what is not BERT."""
    torch.manual_seed(training.seed)  # of a new classifier's weights
    dropout = {} if training.dropout is None else dict.fromkeys(_DROPOUTS, training.dropout)
    config = AutoConfig.from_pretrained(
        base.location,
        revision=base.revision,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type=_PROBLEM_TYPES[problem],
        **dropout,
    )
    if config.model_type != "bert":
        raise UsageError(f"{base.name}: model type {config.model_type!r} is not implemented; use a BERT checkpoint")
    if max_tokens > config.max_position_embeddings:
        raise UsageError(
            f"max_tokens {max_tokens} is more than the {config.max_position_embeddings} positions of {base.name}"
        )
    # It would report the new classifier's weights as missing, in a screenful.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if structure_of(config) is not None:
        return load_pruned(Path(base.location), config)
    return AutoModelForSequenceClassification.from_pretrained(
        base.location, revision=base.revision, config=config, dtype=torch.float32
    )


_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


def _start(model: PreTrainedModel, course: Course) -> _Run:
    training = course.training
    optimizer = make_optimizer(model, training)
    steps = _steps_per_epoch(course)
    schedule = make_schedule(optimizer, training, training.epochs * steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / steps))
    return _Run(model, average, optimizer, schedule, random.Random(training.seed))  # noqa: S311 - an order


def _steps_per_epoch(course: Course) -> int:
    batches = -(-len(course.train) // course.training.batch_size)
    return -(-batches // course.training.accumulate)


def _epochs(run: _Run, course: Course) -> Iterator[Epoch]:
    training, validation = course.training, course.validation
    steps = _steps_per_epoch(course)
    objective = Objective(course.problem, training, course.train.targets, course.teacher)
    done = len(run.curve)
    with tqdm(total=training.epochs * steps, initial=done * steps, desc="train", unit="step", disable=None) as bar:
        for number in range(done + 1, training.epochs + 1):
            if _stalled(run.curve, training.patience):
                return
            losses = [loss for loss in _one_epoch(run, course, objective) if not bar.update()]
            logits = predict_logits(run.averaged, validation.ids)
            epoch = Epoch(
                number,
                sum(losses) / len(losses),
                validation_score(logits, validation.targets, course.problem),
                validation_loss(logits, validation.targets, course.problem),
            )
            bar.set_postfix_str(f"epoch {number} loss {epoch.loss:.3f} validation {epoch.validation_score:.4f}")
            _log_epoch(course.log, epoch)
            yield epoch


def _stalled(curve: Sequence[Epoch], patience: int | None) -> bool:
    """Whether the last `patience` epochs brought nothing better."""
    return patience is not None and bool(curve) and len(curve) - best_epoch(curve).number >= patience


def _one_epoch(run: _Run, course: Course, objective: Objective) -> Iterator[float]:
    """Take all steps of an epoch; yields the loss of each."""
    run.model.train()
    batches = shuffled_batches(course.train.ids, course.training.batch_size, run.order)
    size = course.training.accumulate
    for start in range(0, len(batches), size):
        loss = _step(run, course, objective, batches[start : start + size])
        if course.log is not None:
            step = run.schedule.last_epoch
            course.log.add_scalar("train/loss", loss, step)
            course.log.add_scalar("train/learning_rate", max(run.schedule.get_last_lr()), step)
        yield loss


def _step(run: _Run, course: Course, objective: Objective, batches: Sequence[list[int]]) -> float:
    """One step of the optimizer on one or several batches, each text with the same weight."""
    texts = sum(map(len, batches))
    total = 0.0
    for batch in batches:
        loss = objective(_logits(run.model, course.train, batch), course.train.targets[batch], batch)
        share = loss * (len(batch) / texts)
        share.backward()
        total += share.item()
    nn.utils.clip_grad_norm_(run.model.parameters(), course.training.max_gradient_norm)
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad()
    if course.after_step is not None:
        course.after_step(run.model)
    run.average.update_parameters(run.model)
    return total


def _logits(model: PreTrainedModel, data: Encoded, batch: Sequence[int]) -> Tensor:
    """Logits [texts, labels] fp32, on the CPU whatever the device: a loss of so few numbers costs nothing there."""
    input_ids, attention_mask = (each.to(model.device) for each in padded([data.ids[index] for index in batch]))
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=computes_in_bf16(model.device)):
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return logits.float().cpu()


def _log_epoch(log: Any, epoch: Epoch) -> None:
    if log is not None:
        log.add_scalar("validation/score", epoch.validation_score, epoch.number)
        log.add_scalar("validation/loss", epoch.validation_loss, epoch.number)
        log.flush()

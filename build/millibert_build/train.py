"""Examples to checkpoint: fine-tuning of a BERT sequence classifier.

AdamW with decoupled weight decay (not on biases and norms), linear warm-up and decay, bf16 autocast where the
CPU computes in it, batches of similar length, a fixed seed. What is validated and kept is a running average of
the weights over about an epoch (Polyak averaging), of the epoch with the best validation accuracy.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from millibert._errors import UsageError
from millibert_build.dataset import Example, Splits
from millibert_build.hub import Base
from millibert_build.scenario import Training
from millibert_build.tokens import limited, load_tokenizer, token_ids

MAX_GRADIENT_NORM = 1.0
# Batches are cut from chunks of this many batches, sorted by length: little padding, still shuffled.
CHUNK_BATCHES = 50
EVALUATION_BATCH = 128


@dataclass(frozen=True)
class Epoch:
    """How one epoch went. Scores are shares, 0 to 1."""

    number: int
    loss: float
    validation_accuracy: float
    validation_loss: float

    @property
    def score(self) -> tuple[float, float]:
        """What the best epoch is chosen by: accuracy, and where a small validation set ties, the lower loss."""
        return self.validation_accuracy, -self.validation_loss


@dataclass(frozen=True)
class Encoded:
    """One example as the model sees it."""

    ids: list[int]
    label: int


def train(base: Base, splits: Splits, training: Training, max_tokens: int, folder: Path) -> list[Epoch]:
    """Fine-tune and write the best checkpoint (model and tokenizer) to `folder`; returns the learning curve."""
    torch.manual_seed(training.seed)
    tokenizer = load_tokenizer(base.location, base.revision)
    model = _load_base(base, splits.labels, max_tokens)
    rust = limited(tokenizer, max_tokens)
    labels = {label: index for index, label in enumerate(splits.labels)}
    train_set = _encode(splits.train, rust, labels)
    validation_set = _encode(splits.validation, rust, labels)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_average_decay(train_set, training)))
    averaged = cast(PreTrainedModel, average.module)
    curve: list[Epoch] = []
    for epoch in _epochs(model, average, train_set, validation_set, training):
        if not curve or epoch.score > best_epoch(curve).score:
            averaged.save_pretrained(folder)
        curve.append(epoch)
    tokenizer.save_pretrained(folder)
    return curve


def best_epoch(curve: Sequence[Epoch]) -> Epoch:
    """The epoch whose checkpoint was kept."""
    return max(curve, key=lambda epoch: epoch.score)


def predict_logits(model: PreTrainedModel, ids: Sequence[Sequence[int]], show: str | None = None) -> Tensor:
    """Logits [texts, labels] in fp32 of the Hugging Face model, padded batches sorted by length."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    result = torch.empty(len(ids), cast(int, model.config.num_labels))
    model.eval()
    starts = range(0, len(order), EVALUATION_BATCH)
    with torch.inference_mode():
        for start in tqdm(starts, desc=show, disable=None if show else True, leave=False):
            chunk = order[start : start + EVALUATION_BATCH]
            input_ids, attention_mask = _padded([ids[index] for index in chunk])
            result[chunk] = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
    return result


def learning_rate(training: Training, width: int) -> float:
    """The scenario's rate, or 2e-5 at BERT-base's width of 768, growing as the width shrinks.

    Narrow models need larger steps. The exponent has no theory: it makes the rule pass through two rates that
    work, 2e-5 at width 768 and 2e-4 at 384.
    """
    return training.learning_rate or 2e-5 * (768 / width) ** 3.32


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 dot products (AVX-512 BF16, AMX, or Arm BF16), not merely the data type."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _load_base(base: Base, labels: Sequence[str], max_tokens: int) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(
        base.location,
        revision=base.revision,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
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
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        base.location, revision=base.revision, config=config, dtype=torch.float32
    )
    return model


def _encode(examples: Sequence[Example], tokenizer: Tokenizer, labels: dict[str, int]) -> list[Encoded]:
    ids = token_ids(tokenizer, [example.text for example in examples])
    return [Encoded(i, labels[example.label]) for i, example in zip(ids, examples, strict=True)]


def _average_decay(train_set: Sequence[Encoded], training: Training) -> float:
    return 1 - 1 / max(1, _steps_per_epoch(train_set, training))


def _steps_per_epoch(train_set: Sequence[Encoded], training: Training) -> int:
    return -(-len(train_set) // training.batch_size)


def _epochs(
    model: PreTrainedModel,
    average: AveragedModel,
    train_set: Sequence[Encoded],
    validation_set: Sequence[Encoded],
    training: Training,
) -> Iterator[Epoch]:
    generator = random.Random(training.seed)  # noqa: S311 - an order, not a secret
    steps = training.epochs * _steps_per_epoch(train_set, training)
    optimizer, schedule = _optimizer(model, training, steps)
    targets = torch.tensor([example.label for example in validation_set])
    with tqdm(total=steps, desc="train", unit="step", disable=None) as bar:
        for number in range(1, training.epochs + 1):
            model.train()
            losses = []
            for batch in _batches(train_set, training.batch_size, generator):
                losses.append(_step(model, batch, optimizer, schedule, training.label_smoothing))
                average.update_parameters(model)
                bar.update()
            averaged = cast(PreTrainedModel, average.module)
            logits = predict_logits(averaged, [example.ids for example in validation_set])
            accuracy = float((logits.argmax(1) == targets).float().mean())
            validation_loss = float(nn.functional.cross_entropy(logits, targets))
            epoch = Epoch(number, sum(losses) / len(losses), accuracy, validation_loss)
            bar.set_postfix_str(f"epoch {number} loss {epoch.loss:.3f} validation {accuracy:.4f}")
            yield epoch


def _step(
    model: PreTrainedModel,
    batch: Sequence[Encoded],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    label_smoothing: float,
) -> float:
    input_ids, attention_mask = _padded([example.ids for example in batch])
    targets = torch.tensor([example.label for example in batch])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cpu_has_bf16()):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    loss = nn.functional.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return loss.item()


def _optimizer(
    model: PreTrainedModel, training: Training, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim <= 1]  # biases and norms
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate(training, model.config.hidden_size), fused=True)
    warmup = max(1, round(training.warmup * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _batches(examples: Sequence[Encoded], batch_size: int, generator: random.Random) -> list[list[Encoded]]:
    shuffled = generator.sample(examples, len(examples))
    chunk = batch_size * CHUNK_BATCHES
    batches = []
    for start in range(0, len(shuffled), chunk):
        ordered = sorted(shuffled[start : start + chunk], key=lambda example: len(example.ids))
        batches += [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    generator.shuffle(batches)
    return batches


def _padded(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [texts, longest] int64."""
    longest = max(map(len, ids))
    input_ids = torch.zeros(len(ids), longest, dtype=torch.long)
    attention_mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for row, (text, mask) in zip(ids, zip(input_ids, attention_mask, strict=True), strict=True):
        text[: len(row)] = torch.tensor(row)
        mask[: len(row)] = 1
    return input_ids, attention_mask

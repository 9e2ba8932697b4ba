"""What is trained, how fast, and along which schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from millibert._errors import UsageError
from millibert_build.scenario import Training

# Plain gradient steps are not scaled by their own size as Adam's are, and need to be this much longer.
_SGD_RATE = 0.05


def learning_rate(training: Training, width: int) -> float:
    """The scenario's peak rate; else for AdamW 2e-5 at BERT-base's width of 768, growing as the width shrinks.

    Narrow models need larger steps. The exponent has no theory: it makes the rule pass through two rates that
    work, 2e-5 at width 768 and 2e-4 at 384. SGD gets 0.05.
    """
    if training.learning_rate is not None:
        return training.learning_rate
    return _SGD_RATE if training.optimizer == "sgd" else 2e-5 * (768 / width) ** 3.32


def freeze(model: PreTrainedModel, policy: str | int) -> None:
    """Keep parts of the base as they are: its embeddings, its first N layers too, or all but pooler and classifier."""
    layers = model.config.num_hidden_layers
    if isinstance(policy, int) and policy > layers:
        raise UsageError(f"training.freeze: {policy} layers, but the base has {layers}")
    frozen = policy if isinstance(policy, int) else {"none": -1, "embeddings": 0, "head_only": layers}[policy]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_depth(name, layers) > frozen)


def make_optimizer(model: PreTrainedModel, training: Training) -> torch.optim.Optimizer:
    """AdamW or SGD over what is not frozen: no weight decay on biases and norms, the rate decayed layer by layer."""
    layers = model.config.num_hidden_layers
    peak = learning_rate(training, model.config.hidden_size)
    members: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_depth(name, layers), parameter.ndim > 1].append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "lr": peak * training.layer_decay ** (layers + 1 - depth),
            "weight_decay": training.weight_decay if decayed else 0.0,
        }
        for (depth, decayed), parameters in members.items()
    ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=peak, momentum=training.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=peak, fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, training: Training, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a share of all steps, then down to 0 on a line or half a cosine."""
    warmup = max(1, round(training.warmup * steps))

    def factor(step: int) -> float:
        left = (steps - step) / max(1, steps - warmup)
        falling = (1 - math.cos(math.pi * left)) / 2 if training.schedule == "cosine" else left
        return (step + 1) / warmup if step < warmup else falling

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _depth(name: str, layers: int) -> int:
    """0 for the embeddings, 1 to `layers` for the encoder, one more for pooler and classifier."""
    if ".embeddings." in name:
        return 0
    _, found, rest = name.partition(".encoder.layer.")
    return int(rest.partition(".")[0]) + 1 if found else layers + 1

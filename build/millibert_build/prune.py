"""Structured pruning: a fine-tuned BERT classifier becomes a smaller dense one, faster on every engine.

What goes is measured, not guessed. Whole encoder layers go first: one after another the layer without which the loss
on the given texts is lowest (any of them, the last too). Then, over all remaining layers together, attention heads
and feed-forward neurons go by the gradient of a gate on each of them. With g the derivative of a text's loss by a
gate, which is sum(activation * gradient), the first-order estimate of what the loss would change by, the importance is

- of a neuron: the mean of |g| over texts (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR
  2019). Its square, the diagonal Fisher information of Kwon et al. ("A Fast Post-Training Pruning Framework for
  Transformers", NeurIPS 2022), measured worse here: a few texts decide it;
- of a head: the same, divided by the norm over the heads of its layer (Michel et al., "Are Sixteen Heads Really
  Better than One?", NeurIPS 2019).

Every layer keeps one head and one block of neurons at least; neurons go in blocks, so that the sizes that remain suit
vector units and tensor cores. The accuracy comes back by fine-tuning afterwards, best with the unpruned model as
teacher.

A pruned model is an ordinary `BertForSequenceClassification` with smaller `nn.Linear` modules. Its shape is in
`config.millibert_structure`, which Hugging Face's files keep; `checkpoint.load_model` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from millibert._errors import UsageError
from millibert_build.accelerator import computes_in_bf16
from millibert_build.scenario import Pruning

STRUCTURE = "millibert_structure"
NEURON_BLOCK = 64
# A layer of few neurons still has this many blocks.
_MIN_BLOCKS = 16

Batch = tuple[Tensor, Tensor, Tensor]
"""input_ids [N, S], attention_mask [N, S], targets of N texts as `loss` takes them."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, labels], targets) -> the mean loss of N texts."""


class Gates(NamedTuple):
    """What belongs to the gates of each encoder layer: [..., heads] and [..., neurons]."""

    heads: list[Tensor]
    neurons: list[Tensor]


@dataclass(frozen=True)
class Removed:
    """What pruning took away. Heads and neurons are those of the layers that remain."""

    layers: tuple[int, ...]
    """Numbers of the dropped encoder layers in the model before."""
    heads: tuple[tuple[int, ...], ...]
    """Numbers of the removed heads of each remaining layer."""
    neurons: tuple[int, ...]
    """How many feed-forward neurons each remaining layer lost."""
    parameters_before: int
    parameters_after: int


def prune(model: PreTrainedModel, batches: Iterable[Batch], pruning: Pruning, loss: Loss) -> Removed:
    """Remove what `pruning` says from `model`, in place; importance is measured on `batches`.

    Shares are of the heads and neurons that remain after layers were dropped.
    """
    texts = list(batches)
    before = _parameters(model)
    was_training = model.training
    model.eval()
    dropped = drop_layers(model, texts, pruning.layers, loss)
    heads: list[list[int]] = [[] for _ in _layers(model)]
    neurons: list[list[int]] = [[] for _ in _layers(model)]
    if pruning.heads or pruning.neurons:
        gradients = gate_gradients(model, texts, loss)
        heads = least_important_heads(gradients.heads, pruning.heads)
        neurons = least_important_neurons(gradients.neurons, pruning.neurons)
        remove(model, heads, neurons)
    model.train(was_training)
    lost = tuple(map(len, neurons))
    return Removed(dropped, tuple(map(tuple, heads)), lost, before, _parameters(model))


# ---- layers --------------------------------------------------------------------------------------------------


def drop_layers(model: PreTrainedModel, batches: Sequence[Batch], count: int, loss: Loss) -> tuple[int, ...]:
    """Drop `count` encoder layers greedily; returns their numbers in the model before."""
    encoder: Any = _bert(model).encoder
    if count >= len(encoder.layer):
        raise UsageError(f"pruning.layers: cannot drop {count} of {len(encoder.layer)} encoder layers; one must stay")
    numbers = list(range(len(encoder.layer)))
    dropped = []
    for _ in range(count):
        kept = list(encoder.layer)
        losses = []
        for index in range(len(kept)):
            encoder.layer = nn.ModuleList(kept[:index] + kept[index + 1 :])
            losses.append(_mean_loss(model, batches, loss))
        worst = min(range(len(kept)), key=losses.__getitem__)
        encoder.layer = nn.ModuleList(kept[:worst] + kept[worst + 1 :])
        dropped.append(numbers.pop(worst))
    if count:
        _note_structure(model)
    return tuple(sorted(dropped))


def _mean_loss(model: PreTrainedModel, batches: Sequence[Batch], loss: Loss) -> float:
    """In bf16 where the device computes in it: exact enough to tell layers apart, and much faster."""
    total, texts = 0.0, 0
    half = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=computes_in_bf16(model.device))
    with torch.inference_mode(), half:
        for input_ids, attention_mask, targets in batches:
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
            total += float(loss(logits.float(), targets)) * len(input_ids)
            texts += len(input_ids)
    return total / texts


# ---- importance ----------------------------------------------------------------------------------------------


def gate_gradients(model: PreTrainedModel, batches: Iterable[Batch], loss: Loss) -> Gates:
    """Gate every head and neuron; returns the mean over texts of |gradient of the text's loss by the gate|.

    The gates are all 1, so logits do not change; one gate per text gives each text's gradient in one backward pass.
    """
    layers = _layers(model)
    totals: list[Tensor] = []
    texts = 0
    for input_ids, attention_mask, targets in batches:
        count = len(input_ids)
        with _gated(layers, count) as gates, torch.enable_grad():
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
            # The loss is a mean: without the factor each text would count less in a larger batch.
            gradients = torch.autograd.grad(loss(logits, targets) * count, [*gates.heads, *gates.neurons])
        found = [gradient.abs().sum(0) for gradient in gradients]
        totals = [total + more for total, more in zip(totals, found, strict=True)] if totals else found
        texts += count
    if not texts:
        raise ValueError("importance cannot be measured without texts")
    means = [total / texts for total in totals]
    return Gates(means[: len(layers)], means[len(layers) :])


@contextmanager
def _gated(layers: Sequence[Any], texts: int) -> Iterator[Gates]:
    """Multiply heads and neurons by gates [texts, heads] and [texts, neurons] of 1 in the context."""
    gates = Gates([], [])
    hooks = []
    for layer in layers:
        heads = torch.ones(texts, _heads(layer), requires_grad=True)
        neurons = torch.ones(texts, layer.intermediate.dense.out_features, requires_grad=True)
        gates.heads.append(heads)
        gates.neurons.append(neurons)
        hooks.append(layer.attention.output.dense.register_forward_pre_hook(_multiplier(heads)))
        hooks.append(layer.output.dense.register_forward_pre_hook(_multiplier(neurons)))
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def _multiplier(gates: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook: [N, S, G * size] times gates [N, G], each gate for `size` neighbouring values."""

    def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * gates.repeat_interleave(inputs[0].shape[-1] // gates.shape[1], 1)[:, None], *inputs[1:])

    return multiply


# ---- choice --------------------------------------------------------------------------------------------------


def least_important_heads(importance: Sequence[Tensor], share: float) -> list[list[int]]:
    """Heads to remove in each layer: `share` of all of them, but never the last of a layer."""
    units = []
    for layer, values in enumerate(importance):
        normalised = (values / values.norm().clamp(min=1e-20)).tolist()
        order = sorted(range(len(normalised)), key=normalised.__getitem__)
        units += [_Unit(normalised[head], layer, (head,)) for head in order[:-1]]
    return _remove_least(units, share, [len(values) for values in importance])


def least_important_neurons(importance: Sequence[Tensor], share: float) -> list[list[int]]:
    """Neurons to remove in each layer: about `share` of all of them, in blocks, never the last block of a layer.

    A block is the least important neurons of a layer, then the next ones, and so on.
    """
    units = []
    for layer, values in enumerate(importance):
        order = values.argsort().tolist()
        block = block_size(len(order))
        # What remains is a multiple of the block, so the first one is what is over; the last one has no end and stays.
        starts = [0, *range(len(order) % block or block, len(order), block)]
        for start, end in pairwise(starts):
            block_of = tuple(order[start:end])
            units.append(_Unit(float(values[list(block_of)].mean()), layer, block_of))
    return _remove_least(units, share, [len(values) for values in importance])


def block_size(neurons: int) -> int:
    """Neurons that go together: a multiple of 4 where there are enough, since 2:4 sparsity counts in fours."""
    return min(NEURON_BLOCK, max(4, neurons // _MIN_BLOCKS // 4 * 4), neurons)


class _Unit(NamedTuple):
    importance: float
    layer: int
    members: tuple[int, ...]


def _remove_least(units: Sequence[_Unit], share: float, sizes: Sequence[int]) -> list[list[int]]:
    """Take units in order of importance while what was taken comes nearer to `share` of all members."""
    wanted = share * sum(sizes)
    removed: list[list[int]] = [[] for _ in sizes]
    taken = 0
    for unit in sorted(units):
        if abs(wanted - taken - len(unit.members)) >= abs(wanted - taken):
            break
        removed[unit.layer] += unit.members
        taken += len(unit.members)
    return [sorted(members) for members in removed]


# ---- structure -----------------------------------------------------------------------------------------------


def remove(model: PreTrainedModel, heads: Sequence[Sequence[int]], neurons: Sequence[Sequence[int]]) -> None:
    """Remove these heads and neurons of each layer, in place, and note the new structure in the config."""
    for layer, gone_heads, gone_neurons in zip(_layers(model), heads, neurons, strict=True):
        _remove_heads(layer.attention, gone_heads)
        kept = _others(gone_neurons, layer.intermediate.dense.out_features)
        layer.intermediate.dense = _rows(layer.intermediate.dense, kept)
        layer.output.dense = _columns(layer.output.dense, kept)
    _note_structure(model)


def structure_of(config: PretrainedConfig) -> dict[str, list[int]] | None:
    """Heads and neurons of each layer, as a pruned model's config has them; None where nothing was removed."""
    structure: dict[str, list[int]] | None = getattr(config, STRUCTURE, None)
    return structure


def shape_as_noted(model: PreTrainedModel) -> None:
    """Give a model fresh from its config the shape that the config notes; its weights mean nothing yet."""
    structure = structure_of(model.config)
    if structure is not None:
        layers = _layers(model)
        heads = [range(kept, _heads(layer)) for kept, layer in zip(structure["heads"], layers, strict=True)]
        sizes = [layer.intermediate.dense.out_features for layer in layers]
        neurons = [range(kept, size) for kept, size in zip(structure["neurons"], sizes, strict=True)]
        remove(model, heads, neurons)


def _note_structure(model: PreTrainedModel) -> None:
    layers = _layers(model)
    for number, layer in enumerate(layers):
        layer.attention.self.layer_idx = number
    model.config.num_hidden_layers = len(layers)
    neurons = [layer.intermediate.dense.out_features for layer in layers]
    setattr(model.config, STRUCTURE, {"heads": [_heads(layer) for layer in layers], "neurons": neurons})


def _remove_heads(attention: Any, gone: Sequence[int]) -> None:
    """`BertSelfAttention` and `BertSelfOutput` find the number of heads from the width of the projections."""
    inner = attention.self
    heads = _others(gone, inner.query.out_features // inner.attention_head_size)
    size = inner.attention_head_size
    kept = [head * size + offset for head in heads for offset in range(size)]
    for name in ("query", "key", "value"):
        setattr(inner, name, _rows(getattr(inner, name), kept))
    attention.output.dense = _columns(attention.output.dense, kept)
    inner.num_attention_heads, inner.all_head_size = len(heads), len(kept)


def _rows(linear: nn.Linear, kept: Sequence[int]) -> nn.Linear:
    """The same layer with these outputs only."""
    return _linear(linear.weight[kept], linear.bias[kept], linear)


def _columns(linear: nn.Linear, kept: Sequence[int]) -> nn.Linear:
    """The same layer for these inputs only."""
    return _linear(linear.weight[:, kept], linear.bias, linear)


def _linear(weight: Tensor, bias: Tensor, like: nn.Linear) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, device=like.weight.device, dtype=like.weight.dtype)
    linear.weight.data, linear.bias.data = weight.detach().clone(), bias.detach().clone()
    return linear.train(like.training)


def _others(gone: Sequence[int], count: int) -> list[int]:
    return sorted(set(range(count)) - set(gone))


def _bert(model: PreTrainedModel) -> Any:
    return model.bert


def _layers(model: PreTrainedModel) -> list[Any]:
    return list(_bert(model).encoder.layer)


def _heads(layer: Any) -> int:
    attention = layer.attention.self
    return int(attention.query.out_features // attention.attention_head_size)


def _parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

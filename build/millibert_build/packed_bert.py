"""BERT for sequence classification without padding, and its padded twin, as graphs to export.

A batch of N texts with T tokens in all is one row of tokens, all texts end to end. Everything that works on
single tokens (embeddings, projections, norms, feed-forward: nearly all of the arithmetic) runs on [T, ·] and
sees no padding. Only attention needs to know which tokens share a text: around it, tokens are gathered to a
[N, S, ·] grid, S the longest text, and scattered back. Gathers, sums and comparisons suffice, so
the graph is plain ONNX, in operators and types that TensorRT documents (`tensorrt/operators.json`).

Under Triton's native backends the packed inputs come from ragged batching, and the graph guards against what
was seen to arrive from there:

- the rows of a request with several texts are padded with id 0, and `lengths` counts that padding: a row's real
  length is the position of its last non-zero id plus one;
- the values of `max_length` are uninitialised memory: only its size counts;
- one id outside the vocabulary or one position past the limit would fail the whole batch: both are replaced;
- after a text of zero tokens the collector's offsets cannot be trusted: that row and all later ones are NaN;
- every configured input must be a binding of a TensorRT plan: `span`, all zeros, is added to the logits.

The last layer computes its queries, output and feed-forward for the first token of each text only, since the
classifier reads nothing else.

Precision is explicit, as strongly typed engines want it: with a half type, every matrix product of the encoder
(projections, attention, feed-forward) has operands of that type, and so have the activations between two products;
embeddings, residual sums, LayerNorm, softmax, pooler and classifier stay float32. Inputs and logits do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, PreTrainedModel
from transformers.activations import ACT2FN

from millibert._errors import UsageError

# Finite, so that a row of nothing but padding stays a number, also where an engine makes the mask fp16.
MASKED = -1e4


class _Layout(NamedTuple):
    """Where the tokens of a batch sit: in the flat row of tokens and in the [N, S] grid of attention."""

    to_grid: Callable[[Tensor], Tensor]  # [tokens, ·] -> [N, S, ·]
    to_tokens: Callable[[Tensor], Tensor]  # [N, S, ·] -> [tokens, ·]
    first: Tensor  # [N] index of each text's first token
    mask: Tensor  # [N, 1, 1, S] additive: 0 where a token may be attended to, else MASKED


class _Attention(nn.Module):
    """What all layers share: attention on the grid, its output, and the feed-forward part.

    Heads and feed-forward neurons are those of the layer, not of the config: a pruned model has fewer in some.
    Tokens come and go as float32; `dtype` is the type of the matrix products.
    """

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.head_size: int = layer.attention.self.attention_head_size
        self.heads: int = layer.attention.self.query.out_features // self.head_size
        self.attention_output = _joined(dtype, layer.attention.output.dense)
        self.attention_norm = layer.attention.output.LayerNorm
        self.intermediate = _joined(dtype, layer.intermediate.dense)
        self.activation = layer.intermediate.intermediate_act_fn
        self.output = _joined(dtype, layer.output.dense)
        self.output_norm = layer.output.LayerNorm

    def split(self, grid: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[N, S, parts * heads * head size] -> parts times [N, heads, S, head size]."""
        n, s, _ = grid.shape
        heads = grid.reshape(n, s, parts, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        return tuple(heads[part] for part in range(parts))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Softmax attention; the query is scaled already. Returns [N, queries, heads * head size]."""
        weights = torch.softmax((query @ key.transpose(-1, -2)).float() + mask, dim=-1)
        return (weights.to(self.dtype) @ value).transpose(1, 2).flatten(2)

    def finish(self, residual: Tensor, context: Tensor) -> Tensor:
        """Everything behind attention, token by token."""
        hidden = self.attention_norm(self.attention_output(context).float() + residual)
        fed = self.output(self.activation(self.intermediate(hidden.to(self.dtype))))
        return self.output_norm(fed.float() + hidden)  # type: ignore[no-any-return]


class _Layer(_Attention):
    """An encoder layer for all tokens; query, key and value are one product."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        attention = layer.attention.self
        query = _scaled(attention.query, self.head_size**-0.5)
        self.query_key_value = _joined(dtype, query, attention.key, attention.value)

    def forward(self, tokens: Tensor, layout: _Layout) -> Tensor:
        """[tokens, H] -> [tokens, H]."""
        query, key, value = self.split(layout.to_grid(self.query_key_value(tokens.to(self.dtype))), 3)
        return self.finish(tokens, layout.to_tokens(self.attend(query, key, value, layout.mask)))


class _LastLayer(_Attention):
    """The last encoder layer, for the first token of each text only."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        attention = layer.attention.self
        self.query = _joined(dtype, _scaled(attention.query, self.head_size**-0.5))
        self.key_value = _joined(dtype, attention.key, attention.value)

    def forward(self, tokens: Tensor, layout: _Layout) -> Tensor:
        """[tokens, H] -> [N, H]."""
        first = tokens.index_select(0, layout.first)
        (query,) = self.split(self.query(first.to(self.dtype)).unsqueeze(1), 1)
        key, value = self.split(layout.to_grid(self.key_value(tokens.to(self.dtype))), 2)
        return self.finish(first, self.attend(query, key, value, layout.mask).squeeze(1))


class _Bert(nn.Module):
    """What both layouts share: embeddings, encoder and head, with weights from the checkpoint."""

    positions: Tensor

    def __init__(self, model: PreTrainedModel, max_tokens: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        check_architecture(model, max_tokens)
        bert: Any = model.eval().float().bert
        embeddings = bert.embeddings
        self.max_tokens = max_tokens
        self.words: nn.Embedding = embeddings.word_embeddings
        # All tokens are of segment 0, so its vector can live in the position table.
        table = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        self.register_buffer("positions", table.detach()[:max_tokens].clone())
        self.norm = embeddings.LayerNorm
        *layers, last = bert.encoder.layer
        self.layers = nn.ModuleList(_Layer(layer, dtype) for layer in layers)
        self.last_layer = _LastLayer(last, dtype)
        self.pooler: nn.Linear = bert.pooler.dense
        self.classifier: nn.Linear = cast(Any, model).classifier

    def _logits(self, ids: Tensor, position: Tensor, layout: _Layout) -> Tensor:
        """Token ids [tokens] at their positions [tokens] -> logits [N, labels]."""
        known = (ids >= 0) & (ids < self.words.num_embeddings)
        ids = torch.where(known, ids, 0)
        position = position.clamp(max=self.max_tokens - 1)
        tokens = self.norm(self.words(ids) + F.embedding(position, self.positions))
        for layer in self.layers:
            tokens = layer(tokens, layout)
        first = self.last_layer(tokens, layout)
        return self.classifier(torch.tanh(self.pooler(first)))  # type: ignore[no-any-return]


class PackedBert(_Bert):
    """The padding-free graph. All inputs have rank 1.

    input_ids   [T] int32    the token ids of all texts, end to end
    lengths     [N] int32    tokens of each text
    max_length  [S] float32  its size is at least the longest length; its values mean nothing
    span        [P] int32    zeros (what carries `max_length` through Triton's ragged batching)
    returns     [N, labels]  logits, float32
    """

    def forward(self, input_ids: Tensor, lengths: Tensor, max_length: Tensor, span: Tensor) -> Tensor:
        """Run the batch; see the class for shapes and dtypes."""
        total, texts, longest = input_ids.shape[0], lengths.shape[0], max_length.shape[0]
        ends = _cumulative(lengths)
        offsets = ends - lengths
        token = torch.arange(total, dtype=torch.int32)
        text = (token[:, None] >= ends[None, :]).to(torch.int32).sum(1, dtype=torch.int32).clamp(max=texts - 1)
        position = token - offsets.index_select(0, text)
        column = torch.arange(longest, dtype=torch.int32)

        grid_index = (offsets[:, None] + column[None, :]).clamp(max=total - 1)
        inside = column[None, :] < lengths[:, None]
        grid_ids = input_ids.index_select(0, grid_index.flatten()).reshape(texts, longest)
        token_index = text * longest + position.clamp(max=longest - 1)
        layout = _Layout(
            to_grid=lambda x: F.embedding(grid_index, x),
            to_tokens=lambda x: x.flatten(0, 1).index_select(0, token_index),
            first=offsets.clamp(max=total - 1),
            mask=_mask(grid_ids, inside, column),
        )
        logits = self._logits(input_ids, position, layout)
        logits = logits + span.sum(dtype=torch.int32).to(logits.dtype)
        broken = _cumulative((lengths <= 0).to(torch.int32)) > 0
        return torch.where(broken[:, None], torch.nan, logits)


class PaddedBert(_Bert):
    """The classical layout, for comparison and for requests that share a shape.

    input_ids   [N, S] int32   rows padded with id 0
    span        [N, P] int32   zeros
    returns     [N, labels]    logits, float32
    """

    def forward(self, input_ids: Tensor, span: Tensor) -> Tensor:
        """Run the batch; see the class for shapes and dtypes."""
        texts, longest = input_ids.shape
        column = torch.arange(longest, dtype=torch.int32)
        layout = _Layout(
            to_grid=lambda x: x.reshape(texts, longest, x.shape[-1]),
            to_tokens=lambda x: x.flatten(0, 1),
            first=torch.arange(texts, dtype=torch.int32) * longest,
            mask=_mask(input_ids, torch.ones_like(input_ids, dtype=torch.bool), column),
        )
        position = column[None, :].expand(texts, longest).reshape(-1)
        logits = self._logits(input_ids.reshape(-1), position, layout)
        return logits + span.sum(dtype=torch.int32).to(logits.dtype)


def check_architecture(model: PreTrainedModel, max_tokens: int) -> None:
    """Raise `UsageError` naming what this file does not implement, if the model has it."""
    config = model.config
    if not isinstance(model, BertForSequenceClassification):
        raise UsageError(
            f"cannot export {type(model).__name__} (model type {config.model_type!r}): only "
            "BertForSequenceClassification is implemented; start from a BERT checkpoint (model_type 'bert')"
        )
    position_type = getattr(config, "position_embedding_type", None) or "absolute"
    if position_type != "absolute":
        raise UsageError(f"cannot export position_embedding_type {position_type!r}: only 'absolute' is implemented")
    if getattr(config, "is_decoder", False):
        raise UsageError("cannot export a BERT decoder (is_decoder = true): only encoders are implemented")
    if config.hidden_act not in ACT2FN:
        raise UsageError(f"cannot export hidden_act {config.hidden_act!r}: not a known activation")
    if max_tokens > config.max_position_embeddings:
        raise UsageError(
            f"max_tokens {max_tokens} is more than the {config.max_position_embeddings} positions this checkpoint "
            "has; lower max_tokens in the scenario"
        )


def _cumulative(counts: Tensor) -> Tensor:
    """Cumulative sum [N] int32, by a triangle of integers.

    TensorRT documents CumSum of floating types only, and OpenVINO under bf16 computes one of those in bf16, which
    cannot count past 256.
    """
    row = torch.arange(counts.shape[0], dtype=torch.int32)
    until = row[None, :] <= row[:, None]
    return torch.where(until, counts[None, :], 0).sum(1, dtype=torch.int32)


def _mask(grid_ids: Tensor, inside: Tensor, column: Tensor) -> Tensor:
    """Additive mask [N, 1, 1, S] that hides what lies outside a row or behind its last non-zero id."""
    used = inside & (grid_ids != 0)
    lengths = torch.where(used, column[None, :] + 1, 0).amax(1, keepdim=True)
    hidden = (column[None, :] >= lengths).to(torch.float32) * MASKED
    return hidden[:, None, None, :]


def _scaled(linear: nn.Linear, factor: float) -> nn.Linear:
    scaled = nn.Linear(linear.in_features, linear.out_features)
    scaled.weight.data = linear.weight.detach() * factor
    scaled.bias.data = linear.bias.detach() * factor
    return scaled


def _joined(dtype: torch.dtype, *linears: nn.Linear) -> nn.Linear:
    """One product for several of the same input; a copy, so that the model keeps its own type."""
    joined = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), dtype=dtype)
    joined.weight.data = torch.cat([linear.weight.detach() for linear in linears]).to(dtype)
    joined.bias.data = torch.cat([linear.bias.detach() for linear in linears]).to(dtype)
    return joined

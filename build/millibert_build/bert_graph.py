"""BERT for sequence classification as a graph to export: what all layouts of a batch share.

A layout says where the tokens of a batch sit: `packed_bert` has them end to end, as Triton's ragged batching delivers
them, `rows_bert` in rows that several texts share, for the CPU engines, and `PaddedBert` a text a row. Everything that
works on single tokens (embeddings, projections, norms, feed-forward: nearly all of the arithmetic) runs on [tokens, ·];
only attention needs to know which tokens share a text.

The last layer computes its output and feed-forward for the first token of each text only, since the classifier reads
nothing else.

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


class Layout(NamedTuple):
    """Where the tokens of a batch sit: end to end, and in the grid of attention, G rows of S tokens."""

    to_grid: Callable[[Tensor], Tensor]  # [tokens, ·] -> [G, S, ·]
    to_tokens: Callable[[Tensor], Tensor]  # [G, S, ·] -> [tokens, ·]
    first: Tensor  # [N] index of each text's first token
    mask: Tensor  # [G, 1, 1 or S, S] additive: 0 where a token may be attended to, else MASKED


class Attention(nn.Module):
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


class Layer(Attention):
    """An encoder layer for all tokens; query, key and value are one product."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        attention = layer.attention.self
        query = _scaled(attention.query, self.head_size**-0.5)
        self.query_key_value = _joined(dtype, query, attention.key, attention.value)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """[tokens, H] -> [tokens, H]."""
        query, key, value = self.split(layout.to_grid(self.query_key_value(tokens.to(self.dtype))), 3)
        return self.finish(tokens, layout.to_tokens(self.attend(query, key, value, layout.mask)))


class LastLayer(Attention):
    """The last encoder layer, for the first token of each text only."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        attention = layer.attention.self
        self.query = _joined(dtype, _scaled(attention.query, self.head_size**-0.5))
        self.key_value = _joined(dtype, attention.key, attention.value)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """[tokens, H] -> [N, H]."""
        first = tokens.index_select(0, layout.first)
        (query,) = self.split(self.query(first.to(self.dtype)).unsqueeze(1), 1)
        key, value = self.split(layout.to_grid(self.key_value(tokens.to(self.dtype))), 2)
        return self.finish(first, self.attend(query, key, value, layout.mask).squeeze(1))


class Bert(nn.Module):
    """What both layouts share: embeddings, encoder and head, with weights from the checkpoint."""

    positions: Tensor
    last_layer_type: type[LastLayer] = LastLayer

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
        self.layers = nn.ModuleList(Layer(layer, dtype) for layer in layers)
        self.last_layer = self.last_layer_type(last, dtype)
        self.pooler: nn.Linear = bert.pooler.dense
        self.classifier: nn.Linear = cast(Any, model).classifier

    def _logits(self, ids: Tensor, position: Tensor, layout: Layout) -> Tensor:
        """Token ids [tokens] at their positions [tokens] -> logits [N, labels]."""
        known = (ids >= 0) & (ids < self.words.num_embeddings)
        ids = torch.where(known, ids, 0)
        position = position.clamp(max=self.max_tokens - 1)
        tokens = self.norm(self.words(ids) + F.embedding(position, self.positions))
        for layer in self.layers:
            tokens = layer(tokens, layout)
        first = self.last_layer(tokens, layout)
        return self.classifier(torch.tanh(self.pooler(first)))  # type: ignore[no-any-return]


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

"""BERT without padding, for Triton's native backends, and its padded twin, as graphs to export.

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
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from millibert_build.bert_graph import MASKED, Bert, Layout


class PackedBert(Bert):
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
        layout = Layout(
            to_grid=lambda x: F.embedding(grid_index, x),
            to_tokens=lambda x: x.flatten(0, 1).index_select(0, token_index),
            first=offsets.clamp(max=total - 1),
            mask=_mask(grid_ids, inside, column),
        )
        logits = self._logits(input_ids, position, layout)
        logits = logits + span.sum(dtype=torch.int32).to(logits.dtype)
        broken = _cumulative((lengths <= 0).to(torch.int32)) > 0
        return torch.where(broken[:, None], torch.nan, logits)


class PaddedBert(Bert):
    """The classical layout, for comparison and for requests that share a shape.

    input_ids   [N, S] int32   rows padded with id 0
    span        [N, P] int32   zeros
    returns     [N, labels]    logits, float32
    """

    def forward(self, input_ids: Tensor, span: Tensor) -> Tensor:
        """Run the batch; see the class for shapes and dtypes."""
        texts, longest = input_ids.shape
        column = torch.arange(longest, dtype=torch.int32)
        layout = Layout(
            to_grid=lambda x: x.reshape(texts, longest, x.shape[-1]),
            to_tokens=lambda x: x.flatten(0, 1),
            first=torch.arange(texts, dtype=torch.int32) * longest,
            mask=_mask(input_ids, torch.ones_like(input_ids, dtype=torch.bool), column),
        )
        position = column[None, :].expand(texts, longest).reshape(-1)
        logits = self._logits(input_ids.reshape(-1), position, layout)
        return logits + span.sum(dtype=torch.int32).to(logits.dtype)


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

"""BERT for sequence classification with several texts in a row, as a graph to export: what the CPU engines run.

A batch is a grid of tokens, R rows of W, and each row holds as many texts as fit, end to end ("sequence packing", Krell
et al., "Efficient Sequence Packing without Cross-contamination", 2021). A token attends only to tokens of its own text.
Against the packed graph there is a little padding, at the ends of the rows. For it a batch has one of a few shapes,
whatever lengths its texts have, so an engine can compile the graph for just these, and attention needs no gathers. What
that brings is in docs/log.md.

The products have the names they have in the packed graph: scales that were found on one serve the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millibert_build.bert_graph import MASKED, Bert, LastLayer, Layout


class _LastLayer(LastLayer):
    """Queries for all tokens: picking the keys of each text's row would take longer than it saves."""

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """[tokens, H] -> [N, H]."""
        typed = tokens.to(self.dtype)
        (query,) = self.split(layout.to_grid(self.query(typed)), 1)
        key, value = self.split(layout.to_grid(self.key_value(typed)), 2)
        context = layout.to_tokens(self.attend(query, key, value, layout.mask))
        return self.finish(tokens.index_select(0, layout.first), context.index_select(0, layout.first))


class RowsBert(Bert):
    """The graph of rows.

    input_ids   [R, W] int32   the token ids
    position    [R, W] int32   of each token in its text
    text        [R, W] int32   a number that the tokens of a text share, in a row; what is left over has one of its own
    first       [N] int32      index of each text's first token, counted row by row
    returns     [N, labels]    logits, float32
    """

    last_layer_type = _LastLayer

    def forward(self, input_ids: Tensor, position: Tensor, text: Tensor, first: Tensor) -> Tensor:
        """Run the batch; see the class for shapes and dtypes."""
        rows, width = input_ids.shape
        layout = Layout(
            to_grid=lambda x: x.reshape(rows, width, x.shape[-1]),
            to_tokens=lambda x: x.flatten(0, 1),
            first=first,
            mask=(text[:, None, :] != text[:, :, None]).to(torch.float32)[:, None] * MASKED,
        )
        return self._logits(input_ids.reshape(-1), position.reshape(-1), layout)

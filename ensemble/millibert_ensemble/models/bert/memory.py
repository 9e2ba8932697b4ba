"""Logits of texts that were seen before, for traffic that repeats itself; without Triton.

Triton's own response cache knows a request by its tensors alone. In front of the ensemble it would answer a request
with the `top_k` of another; in front of the engine it would never meet the same deadline twice. And it keeps requests,
where this keeps texts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from .engines import Floats
from .texts import Ids


class Memory:
    """The logits of so many texts, those used last."""

    def __init__(self, texts: int) -> None:
        self._texts = texts
        self._known: OrderedDict[bytes, Floats] = OrderedDict()

    def infer(self, rows: Sequence[Ids], compute: Callable[[Sequence[Ids]], Floats]) -> Floats:
        """Logits [texts, labels] of these texts; `compute` is asked for those that are not known, each once."""
        keys = [row.tobytes() for row in rows]
        unknown = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}
        found = dict(zip(unknown, compute(list(unknown.values())), strict=True)) if unknown else {}
        logits: Floats = np.stack([found[key] if key in found else self._known[key] for key in keys])
        for key, row in zip(keys, logits, strict=True):
            self._known[key] = row.copy()
            self._known.move_to_end(key)
        while len(self._known) > self._texts:
            self._known.popitem(last=False)
        return logits

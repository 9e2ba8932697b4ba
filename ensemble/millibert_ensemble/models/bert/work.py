"""How much of the engine's work is on padding, counted for Triton's metrics; without Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from .engines import Arrays

# The metric and the values of its label `kind`.
METRIC = "millibert_tokens_total"
DESCRIPTION = "Tokens of all executions: of the texts themselves, and computed on"
KINDS = ("text", "computed")


def work_of(inputs: Arrays) -> dict[str, int]:
    """Tokens that are text, and those that were computed on."""
    ids = inputs["input_ids"]
    return {"text": int(np.count_nonzero(ids)), "computed": ids.size}


class Ledger:
    """Adds up work, and hands it on once in a while: telling Triton takes longer than counting."""

    def __init__(self, tell: Callable[[str, int], None], every_seconds: float = 1.0) -> None:
        self._tell = tell
        self._every = every_seconds
        self._sum = dict.fromkeys(KINDS, 0)
        self._told = float("-inf")

    def add(self, parts: Iterable[Arrays], now: float) -> None:
        """Count executions; `now` is a monotonic time in seconds."""
        for inputs in parts:
            for kind, tokens in work_of(inputs).items():
                self._sum[kind] += tokens
        if now - self._told >= self._every:
            for kind, tokens in self._sum.items():
                if tokens:
                    self._tell(kind, tokens)
            self._sum = dict.fromkeys(KINDS, 0)
            self._told = now

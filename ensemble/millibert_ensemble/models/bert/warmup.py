"""Compile before the first request: run the shapes that traffic will bring."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .packing import Ids


def batches(max_texts: int, max_tokens: int) -> Iterator[list[Ids]]:
    """Batches of 1, 2, 4, … `max_texts` requests of mixed lengths, short ones and full ones.

    The largest batch of nothing but full-length texts is among them: what it needs in memory is taken now,
    not under load.
    """
    generator = np.random.default_rng(0)
    texts = 1
    while texts < 2 * max_texts:
        size = min(texts, max_texts)
        for longest in sorted({min(16, max_tokens), min(64, max_tokens), max_tokens}):
            lengths = generator.integers(2, longest + 1, size)
            yield [np.ones((1, int(length)), np.int32) for length in lengths]
        texts *= 2
    yield [np.ones((max_texts, max_tokens), np.int32)]


def rectangles(max_texts: int, max_tokens: int) -> Iterator[list[Ids]]:
    """Batches of 1, 2, 4, … `max_texts` texts of one length, of the lengths that padding in powers of two gives."""
    texts = 1
    while texts < 2 * max_texts:
        tokens = 16
        while tokens < 2 * max_tokens:
            yield [np.ones((min(texts, max_texts), min(tokens, max_tokens)), np.int32)]
            tokens *= 2
        texts *= 2

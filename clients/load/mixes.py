"""Texts of other lengths, made from real ones: what a benchmark's labelled texts alone would not show."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

# Words of a short text: a search phrase, an order to a voice assistant.
_SHORT_WORDS = 4
# Tokens of the shortest of the long texts; the longest fill the model.
_LONG_FROM = 64


class Mix(NamedTuple):
    """Texts to send, and how long they are in tokens."""

    texts: Sequence[str]
    mean: float
    longest: int


def make_mix(name: str, texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> Mix:
    """One of `MIXES` from these texts; `tokenizer` truncates to `max_tokens`."""
    made = MIXES[name](texts, tokenizer, max_tokens)
    lengths = [len(encoding) for encoding in tokenizer.encode_batch_fast(list(made))]
    return Mix(made, float(np.mean(lengths)), max(lengths))


def _as_they_are(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> Sequence[str]:
    return texts


def _short(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> Sequence[str]:
    """The first words of each."""
    return [" ".join(text.split()[:_SHORT_WORDS]) for text in texts]


def _long(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> Sequence[str]:
    """Texts put end to end until they have as many tokens as wanted: evenly on a logarithmic scale, in mixed order."""
    lengths = [len(encoding) for encoding in tokenizer.encode_batch_fast(list(texts))]
    wanted = np.geomspace(min(_LONG_FROM, max_tokens), max_tokens, len(texts))
    source = itertools.cycle(zip(texts, lengths, strict=True))
    return [_joined(source, int(tokens)) for tokens in np.random.default_rng(0).permutation(wanted)]


def _joined(source: Iterator[tuple[str, int]], tokens: int) -> str:
    parts, total = [], 0
    while total < tokens:
        text, length = next(source)
        parts.append(text)
        total += length
    return " ".join(parts)


MIXES: dict[str, Callable[[Sequence[str], Tokenizer, int], Sequence[str]]] = {
    "data": _as_they_are,
    "short": _short,
    "long": _long,
}

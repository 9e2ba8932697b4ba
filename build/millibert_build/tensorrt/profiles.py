"""Optimisation profiles: the shapes a plan accepts, and the one of each that its kernels are chosen for.

A packed plan sees tokens, texts and the longest text; Triton's ragged batching decides what arrives:

- `input_ids` holds at most max_texts * max_tokens tokens, padding inside requests of several texts included;
- `lengths` one entry per text, at most max_texts;
- `max_length` as many elements as the longest request's `span`: B * ceil(L / B) for B texts of at most L tokens, which
  is at least L and at most L + B - 1;
- `span` the sum of these over all requests, never more than the tokens.

Triton takes the profile whose optimum is nearest to the batch (tensorrt_backend, `GetMostOptimizedProfile`), so the
profiles differ in their optimum: a single text, as at low load; a few; a full batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from millibert_build.tensorrt.target import Target

# What a busy server merges when its GPU is faster than its clients.
_FEW = 8


class Shapes(NamedTuple):
    """Smallest, most likely and largest shape of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


Profile = Mapping[str, Shapes]


def profiles_of(target: Target) -> list[Profile]:
    """The profiles of a plan, in the order in which the plan numbers them."""
    if target.layout == "packed":
        return [_packed(target, texts) for texts in _optima(target)]
    return [_padded(target, bucket) for bucket in target.buckets]


def accepts(profile: Profile, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether inputs of these shapes are within a profile."""
    return all(_inside(profile[name], shape) for name, shape in shapes.items())


def nearest(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int:
    """The number of the profile that Triton would take; raises ValueError where none accepts the shapes."""
    distances = {
        number: sum(
            abs(size - best)
            for name, shape in shapes.items()
            for size, best in zip(shape, profile[name].opt, strict=True)
        )
        for number, profile in enumerate(profiles)
        if accepts(profile, shapes)
    }
    if not distances:
        raise ValueError(f"no profile of the plan accepts {dict(shapes)}")
    return min(distances, key=lambda number: distances[number])


def _inside(bounds: Shapes, shape: Sequence[int]) -> bool:
    sizes = zip(bounds.min, shape, bounds.max, strict=False)
    return len(shape) == len(bounds.min) and all(low <= size <= high for low, size, high in sizes)


def _optima(target: Target) -> list[int]:
    """Texts of the batches that the profiles are for; of a small limit there are fewer."""
    return sorted({1, min(_FEW, target.max_texts), target.max_texts})


def _packed(target: Target, texts: int) -> Profile:
    most = texts if texts == 1 else target.max_texts
    tokens, longest = texts * target.typical_tokens, min(2 * target.typical_tokens, target.max_tokens)
    if texts == 1:
        longest = target.typical_tokens
    largest = {
        "input_ids": most * target.max_tokens,
        "lengths": most,
        "max_length": target.max_tokens + most - 1,
        "span": most * target.max_tokens,
    }
    likely = {"input_ids": tokens, "lengths": texts, "max_length": longest, "span": tokens}
    return {name: Shapes((1,), (likely[name],), (largest[name],)) for name in largest}


def _padded(target: Target, bucket: int) -> Profile:
    few = min(_FEW, target.max_texts)
    return {
        "input_ids": Shapes((1, bucket), (few, bucket), (target.max_texts, bucket)),
        "span": Shapes((1, 1), (few, 1), (target.max_texts, 1)),
    }

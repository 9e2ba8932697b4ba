"""Optimisation profiles: the shapes a plan accepts, and the one of each that its kernels are chosen for.

A packed plan sees tokens, texts and the longest text; Triton's ragged batching decides what arrives:

- `input_ids` holds at most max_texts * max_tokens tokens, padding inside requests of several texts included;
- `lengths` one entry per text, at most max_texts;
- `max_length` as many elements as the longest request's `span`: B * ceil(L / B) for B texts of at most L tokens, which
  is at least L and at most L + B - 1;
- `span` the sum of these over all requests, never more than the tokens.

Triton takes the profile whose optimum is nearest, and looks only at the inputs that requests carry, `input_ids` and
`span`, not at those it derives (tensorrt_backend, `EvaluateTensorRTContext`). So a profile must accept as many texts as
its tokens can be, and the profiles differ in their optimum: a single text, as at low load; a few; a full batch.
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


# What the choice of a profile depends on.
_CARRIED = ("input_ids", "span")


def accepts(profile: Profile, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether inputs of these shapes are within a profile."""
    return all(_inside(profile[name], shape) for name, shape in shapes.items())


def nearest(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int:
    """The number of the profile that Triton would take; raises ValueError where none accepts the shapes."""
    carried = {name: shapes[name] for name in _CARRIED}
    distances = {
        number: sum(
            abs(size - best)
            for name, shape in carried.items()
            for size, best in zip(shape, profile[name].opt, strict=True)
        )
        for number, profile in enumerate(profiles)
        if accepts(profile, carried)
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
    tokens = target.max_tokens * (1 if texts == 1 else target.max_texts)
    most = min(target.max_texts, tokens)
    largest = {
        "input_ids": tokens,
        "lengths": most,
        "max_length": min(target.max_tokens + target.max_texts - 1, tokens),
        "span": tokens,
    }
    usual = texts * target.typical_tokens
    # Of several texts the longest is longer than usual; twice is where most of them end.
    longest = min(target.typical_tokens * (1 if texts == 1 else 2), target.max_tokens)
    likely = {"input_ids": usual, "lengths": texts, "max_length": longest, "span": usual}
    return {name: Shapes((1,), (likely[name],), (largest[name],)) for name in largest}


def _padded(target: Target, bucket: int) -> Profile:
    few = min(_FEW, target.max_texts)
    return {
        "input_ids": Shapes((1, bucket), (few, bucket), (target.max_texts, bucket)),
        "span": Shapes((1, 1), (few, 1), (target.max_texts, 1)),
    }

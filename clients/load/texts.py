"""Texts to send, and which answers to them are right.

A source is a file of texts (`test.csv`), or words at random with a stated distribution of lengths:

    synthetic:lognormal:mean=15,sigma=0.6,max=128   most are short, few are long, as texts of people are
    synthetic:uniform:min=3,max=40
    synthetic:fixed:words=12

Lengths are in words; `mean` is that of the distribution before what is shorter than one word or longer than `max` is
cut to these. Each takes `count` (1000) and `seed` (0) too, and the same source gives the same texts everywhere.

What is right is asked once, before the load: the best label, and others that are almost as good, because texts share
batches with others under load, and another batch may round differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from millibert._client import Client
from millibert._errors import UsageError
from millibert._labelled_texts import read_texts
from millibert._types import Classification

SYNTHETIC = "synthetic:"
# Scores closer than this may change places in another batch: with int8 on Banking77, 8 of 3,080 texts of which the
# scores were up to 0.031 apart.
_MARGIN = 0.05
_CANDIDATES = 3
_MOST_TEXTS = 1_000_000
_USUAL_COUNT, _USUAL_SEED, _USUAL_LONGEST = 1000, 0, 128
# Plain words, nearly all of them one token of a BERT vocabulary, so that a number of words is about one of tokens.
_WORDS = """
the my a your this that is was has not can could would please help me with when where why how what account card money
payment order parcel delivery address phone email password name bank transfer charge fee price refund return shop
product size color blue small large wrong broken late lost new old first last two three days week month today
yesterday tomorrow morning again still never always already back before after from to for and or but if because
""".split()  # noqa: SIM905 - a list would be eighty lines

Right = tuple[frozenset[str], ...]


class Texts(NamedTuple):
    """Texts, and a line that says what they are."""

    each: tuple[str, ...]
    description: str


def read_source(source: str, text_column: str = "text") -> Texts:
    """Read a file of texts, or make those that `synthetic:…` names; raises `UsageError`."""
    if source.startswith(SYNTHETIC):
        return _synthetic(source)
    path = Path(source)
    each = tuple(row.text for row in read_texts(path, text_column))
    return Texts(each, _described(path.name, each))


def ask_reference(client: Client, texts: Sequence[str]) -> Right:
    """Which best labels count as right, for each text; raises `ServiceError` where the server does not answer all."""
    top_k = min(_CANDIDATES, len(client.labels()))
    return tuple(map(_right, client.classify(list(texts), top_k)))


def _right(answer: Classification) -> frozenset[str]:
    best, *others = answer.predictions
    return frozenset({best.label, *(other.label for other in others if best.score - other.score < _MARGIN)})


def _described(what: str, texts: Sequence[str]) -> str:
    words = [len(text.split()) for text in texts]
    return (
        f"{what}: {len(texts):,} texts, words: mean {np.mean(words):.1f}, median {np.median(words):.0f}, "
        f"longest {max(words)}"
    )


class _Distribution(NamedTuple):
    """What it is told, and the lengths that it draws."""

    needed: tuple[str, ...]
    draw: Callable[[np.random.Generator, Mapping[str, float], int], npt.NDArray[np.float64]]


def _lognormal(random: np.random.Generator, given: Mapping[str, float], count: int) -> npt.NDArray[np.float64]:
    # The mean of exp(N(mu, sigma)) is exp(mu + sigma²/2).
    return random.lognormal(math.log(given["mean"]) - given["sigma"] ** 2 / 2, given["sigma"], count)


def _uniform(random: np.random.Generator, given: Mapping[str, float], count: int) -> npt.NDArray[np.float64]:
    return random.integers(int(given["min"]), int(given["max"]) + 1, count).astype(np.float64)


def _fixed(random: np.random.Generator, given: Mapping[str, float], count: int) -> npt.NDArray[np.float64]:
    return np.full(count, given["words"])


_DISTRIBUTIONS = {
    "lognormal": _Distribution(("mean", "sigma"), _lognormal),
    "uniform": _Distribution(("min", "max"), _uniform),
    "fixed": _Distribution(("words",), _fixed),
}


def _synthetic(source: str) -> Texts:
    name, _, options = source.removeprefix(SYNTHETIC).partition(":")
    if name not in _DISTRIBUTIONS:
        raise UsageError(f"{source!r}: there is no distribution {name!r}; there are {', '.join(_DISTRIBUTIONS)}")
    needed, draw = _DISTRIBUTIONS[name]
    given = _options(source, options, needed)
    count, longest = int(given.pop("count", _USUAL_COUNT)), given.get("max", _USUAL_LONGEST)
    random = np.random.default_rng(int(given.pop("seed", _USUAL_SEED)))
    if not 1 <= count <= _MOST_TEXTS:
        raise UsageError(f"{source!r}: count is 1 to {_MOST_TEXTS:,}")
    if given.get("min", 1) > longest:
        raise UsageError(f"{source!r}: min is above max")
    lengths = np.clip(np.rint(draw(random, given, count)), 1, longest).astype(np.int64)
    each = tuple(" ".join(random.choice(_WORDS, int(length))) for length in lengths)
    return Texts(each, _described(source, each))


def _options(source: str, text: str, needed: Sequence[str]) -> dict[str, float]:
    """Read `mean=15,sigma=0.6`; raises `UsageError` for what is unknown, missing or no number above 0."""
    known = {*needed, "max", "count", "seed"}
    given: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, separator, value = part.partition("=")
        if not separator or name not in known:
            raise UsageError(f"{source!r}: {part!r} is none of {', '.join(f'{each}=NUMBER' for each in sorted(known))}")
        given[name] = _number(source, name, value)
    if missing := [name for name in needed if name not in given]:
        raise UsageError(f"{source!r}: {', '.join(missing)} is missing")
    return given


def _number(source: str, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError as error:
        raise UsageError(f"{source!r}: {name} is a number, not {value!r}") from error
    if not math.isfinite(number) or number < 0 or (number == 0 and name != "seed"):
        raise UsageError(f"{source!r}: {name} is above 0")
    return number

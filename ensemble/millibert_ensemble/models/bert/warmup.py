"""Everything an engine is run on before the first request."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .engines import Engine
from .inference import infer, padded
from .rows import SHARED, Execution, Inputs, Shape, arrange, shapes
from .texts import Ids


def warm_up_rows(engine: Engine, max_tokens: int) -> None:
    """Run every shape that traffic can bring."""
    engine.prepare([_full(shape) for shape in shapes(max_tokens)], [_full(shape) for shape in _alone()])


def warm_up_padded(engine: Engine, max_texts: int, max_tokens: int) -> None:
    """Run the usual shapes; batches may have others."""
    for request in rectangles(max_texts, max_tokens):
        infer(engine, padded([request], engine.streams))


def rectangles(max_texts: int, max_tokens: int) -> Iterator[Ids]:
    """Requests of 1, 2, 4, … `max_texts` texts, of the lengths that padding in powers of two gives."""
    texts = 1
    while texts < 2 * max_texts:
        tokens = 16
        while tokens < 2 * max_tokens:
            yield np.ones((min(texts, max_texts), min(tokens, max_tokens)), np.int32)
            tokens *= 2
        texts *= 2


def _alone() -> Iterator[Shape]:
    """What a short text alone has: a client waits for it."""
    return (shape for shape in shapes(max(SHARED)) if shape.rows == 1)


def _full(shape: Shape) -> Inputs:
    """As many rows, each a text."""
    texts = [np.ones(shape.width, np.int32)] * shape.rows
    return arrange(texts, Execution(shape, [[row] for row in range(shape.rows)]))

"""Our own closed-loop load, for machines without perf_analyzer: so many requests under way, for so long.

It runs in a process of its own and sends prepared requests over gRPC with asyncio. It takes more of the CPU than
perf_analyzer, which is written in C++: on a machine that it shares with the server its figures are lower.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from millibert._client import parse_address
from millibert._errors import MillibertError
from millibert._grpc import channel_options
from millibert._perf_analyzer import Measurement
from millibert_ensemble.contract import TEXT

# Share of the time that is not counted, at the start.
_WARM_UP = 0.2


class Load(NamedTuple):
    """What to send."""

    url: str
    model: str
    texts: Sequence[str]
    per_request: int
    concurrency: int
    seconds: float


def measure(load: Load) -> Measurement:
    """Send for so many seconds; raises `MillibertError` where a request fails."""
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    with context.Pool(1) as pool:
        latencies, seconds = pool.apply(_run, (load,))
    if not latencies:
        raise MillibertError(f"no answer in {load.seconds:g} s at concurrency {load.concurrency}")
    p50, p99 = (1000 * float(value) for value in np.percentile(latencies, [50, 99]))
    return Measurement(load.per_request, load.concurrency, len(latencies) * load.per_request / seconds, p50, p99)


def _run(load: Load) -> tuple[list[float], float]:
    return asyncio.run(_send(load))


async def _send(load: Load) -> tuple[list[float], float]:
    """Latencies in seconds of the requests that ended behind the warm-up, and how long that was."""
    from tritonclient.grpc import aio

    requests = _requests(load)
    start = time.perf_counter()
    counted_from, end = start + _WARM_UP * load.seconds, start + load.seconds
    latencies: list[float] = []

    async def one_under_way() -> None:
        while (sent := time.perf_counter()) < end:
            await client.infer(load.model, next(requests))
            done = time.perf_counter()
            if counted_from <= done <= end:
                latencies.append(done - sent)

    address = parse_address(load.url)
    async with aio.InferenceServerClient(address.netloc, channel_args=channel_options(address.host)) as client:
        try:
            await asyncio.gather(*(one_under_way() for _ in range(load.concurrency)))
        except Exception as error:
            # tritonclient's errors do not survive the way back to the parent.
            raise MillibertError(f"a request failed: {error}") from None
    return latencies, end - counted_from


def _requests(load: Load) -> Iterator[list[Any]]:
    """Prepared inputs, over and over."""
    from tritonclient.grpc import InferInput

    prepared = []
    for start in range(0, len(load.texts) - load.per_request + 1, load.per_request):
        texts = np.array([[text.encode()] for text in load.texts[start : start + load.per_request]], np.object_)
        tensor = InferInput(TEXT.name, list(texts.shape), TEXT.datatype)
        tensor.set_data_from_numpy(texts)
        prepared.append([tensor])
    return itertools.cycle(prepared)

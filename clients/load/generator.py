"""Our own load, in a process of its own: closed loop (so many requests under way) or open loop (so many a second).

Requests are laid out once and sent as bytes, so that it takes little of the CPU that it may share with the server. A
closed loop has a thread for each request under way, an open one, which may have any number, an event loop.

In open loop requests are due at constant intervals, or at random ones like those of many independent callers (a
Poisson process), whatever the server does, and a latency counts from the moment that its request was due: a server, or
a sender, that falls behind cannot hide it ("coordinated omission").
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from load.blocking import Send, open_blocking
from load.transports import ANSWERED, BUSY, Requests, Transport, open_transport
from millibert._errors import MillibertError, UsageError
from millibert._perf_analyzer import Measurement, Refused

# Share of the time that is not counted, at the start.
_WARM_UP = 0.2
# An open loop wakes this often and sends all that is due; a timer for each request would take more CPU.
_TICK_SECONDS = 0.001
# In a closed loop for each answer, in an open one after it has sent its last request.
_PATIENCE_SECONDS = 30.0
# A server that refuses at once would otherwise be asked again as fast as this process can.
_MOST_REQUESTS = 5_000_000


class Phase(NamedTuple):
    """Part of an open loop."""

    rate: float  # requests a second
    seconds: float
    poisson: bool = False  # at random intervals instead of constant ones


@dataclass(frozen=True)
class Load:
    """What to send, and how: a closed loop, or the phases of an open one."""

    requests: Requests  # sent in turn, over and over
    seconds: float = 0.0  # of a closed loop
    concurrency: int | None = None  # of a closed loop: requests under way
    phases: Sequence[Phase] = ()
    seed: int = 0  # of random intervals

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (not self.phases):
            raise UsageError("a load has a concurrency (closed loop) or phases (open loop)")
        if not self.requests.each:
            raise UsageError("a load needs at least one request; are there fewer texts than one request holds?")
        if sum(phase.rate * phase.seconds for phase in self.phases) > _MOST_REQUESTS:
            raise UsageError(f"these phases are more than {_MOST_REQUESTS:,} requests")


class Answers(NamedTuple):
    """Every request of a run, in the order of their ends."""

    due: npt.NDArray[np.float64]  # seconds from the start; closed loop: when it was sent
    latency: npt.NDArray[np.float64]  # seconds
    status: npt.NDArray[np.str_]  # ANSWERED, or the transport's word for what happened instead

    @property
    def answered(self) -> npt.NDArray[np.bool_]:
        """Which were answered."""
        return np.asarray(self.status == ANSWERED)

    def between(self, start: float, end: float) -> Answers:
        """Those that were due in this span of seconds."""
        inside = (self.due >= start) & (self.due < end)
        return Answers(self.due[inside], self.latency[inside], self.status[inside])

    def percentile(self, percent: float) -> float:
        """Latency of the answered ones in milliseconds."""
        return 1000 * float(np.percentile(self.latency[self.answered], percent))


def measure(load: Load, texts_per_request: int) -> Measurement:
    """Closed loop, without its first fifth.

    Raises `Refused` where the server was too busy, and `MillibertError` where a request was not answered otherwise.
    """
    assert load.concurrency is not None, "measure() is for closed loops"
    found = send(load)
    failed = sorted(set(found.status[~found.answered]))
    if failed:
        count = int((~found.answered).sum())
        if set(failed) <= set(BUSY):
            raise Refused(f"{count:,} of {len(found.status):,} requests at concurrency {load.concurrency}: busy")
        raise MillibertError(f"{count:,} of {len(found.status):,} requests were not answered: {', '.join(failed)}")
    ended = found.due + found.latency
    counted = (ended >= _WARM_UP * load.seconds) & (ended <= load.seconds)
    if not counted.any():
        raise MillibertError(f"no answer in {load.seconds:g} s at concurrency {load.concurrency}")
    rate = float(counted.sum()) / ((1 - _WARM_UP) * load.seconds)
    p50, p99 = (1000 * float(value) for value in np.percentile(found.latency[counted], [50, 99]))
    return Measurement(texts_per_request, load.concurrency, rate * texts_per_request, p50, p99)


def send(load: Load) -> Answers:
    """Run a load in a process of its own; raises `MillibertError` where the server cannot be reached at all."""
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    with context.Pool(1) as pool:
        return pool.apply(_run, (load,))


def _run(load: Load) -> Answers:
    # Before gRPC is loaded. Its event engine hands every answer from thread to thread; without it the caller polls,
    # which takes a fifth less CPU. Another gRPC may not know the name, says so on stderr, and goes on.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    found = asyncio.run(_open_loop(load)) if load.phases else _closed_loop(load)
    due, latency, status = zip(*found, strict=True)
    return Answers(np.array(due), np.array(latency), np.array(status))


def _end_with_parent() -> None:
    """A load whose command was killed would go on and nobody would know where it comes from."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# When a request was due, how long it took, and what became of it.
_Found = list[tuple[float, float, str]]


def _closed_loop(load: Load) -> _Found:
    """A thread for each request under way."""
    requests = itertools.cycle(load.requests.each)
    under_way = load.concurrency or 1
    most = _MOST_REQUESTS // under_way
    start = time.perf_counter()
    end = start + load.seconds

    def one_under_way(send: Send) -> _Found:
        found: _Found = []
        while (sent := time.perf_counter()) < end and len(found) < most:
            status = send(next(requests))
            found.append((sent - start, time.perf_counter() - sent, status))
        return found

    with open_blocking(load.requests, _PATIENCE_SECONDS) as make, ThreadPoolExecutor(under_way) as pool:
        parts = pool.map(one_under_way, [make() for _ in range(under_way)])
        return sorted(itertools.chain.from_iterable(parts), key=lambda each: each[0] + each[1])


async def _open_loop(load: Load) -> _Found:
    async with open_transport(load.requests) as transport:
        return await _send_what_is_due(load, transport)


async def _send_what_is_due(load: Load, transport: Transport) -> _Found:
    requests = itertools.cycle(load.requests.each)
    found: _Found = []
    start = time.perf_counter()

    async def one(due: float) -> None:
        status = await transport.send(next(requests))
        found.append((due, time.perf_counter() - start - due, status))

    under_way: set[asyncio.Task[None]] = set()
    dues = iter(due_times(load.phases, load.seed))
    due = next(dues, None)
    while due is not None:
        now = time.perf_counter() - start
        while due is not None and due <= now:
            task = asyncio.create_task(one(due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            due = next(dues, None)
        await asyncio.sleep(_TICK_SECONDS)
    if under_way:
        _, late = await asyncio.wait(under_way, timeout=_PATIENCE_SECONDS)
        if late:
            raise MillibertError(
                f"{len(late):,} requests had no answer {_PATIENCE_SECONDS:g} s after the last was sent"
            )
    return found


def due_times(phases: Sequence[Phase], seed: int = 0) -> list[float]:
    """When each request is due, in seconds from the start: as each phase says, the phases one after another."""
    random = np.random.default_rng(seed)
    ends = np.cumsum([0.0, *(phase.seconds for phase in phases)])
    spans = zip(ends, ends[1:], phases, strict=False)
    return [float(due) for start, end, phase in spans for due in _due_in(start, end, phase, random)]


def _due_in(start: float, end: float, phase: Phase, random: np.random.Generator) -> npt.NDArray[np.float64]:
    if not phase.poisson:
        return np.arange(start, end, 1 / phase.rate)
    # Given their number, the arrivals of a Poisson process lie anywhere with equal probability.
    return np.sort(random.uniform(start, end, random.poisson(phase.rate * phase.seconds)))

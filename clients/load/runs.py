"""One run of our own load against a server: sent, watched, and put into the form of `results.Run`."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from load import generator
from load.best_labels import Wanted
from load.generator import Load, Phase
from load.machine import describe_machine
from load.results import Answers, Arrival, Outcome, Run, summarise
from load.transports import ANSWERED, BUSY, WRONG, Requests, triton_requests
from load.watch import Watch, stages
from millibert._client import Client

# gRPC's word, and those of aiohttp's exceptions.
_LATE = ("DEADLINE_EXCEEDED", "HTTP 504", "TimeoutError", "ServerTimeoutError", "ConnectionTimeoutError")


@dataclass(frozen=True)
class Target:
    """What is asked: a model of a server, the texts, and what is right for each; None: answers are only counted."""

    client: Client
    url: str
    texts: Sequence[str]
    wanted: Wanted | None
    per_request: int = 1


def run_open(target: Target, rate: float, seconds: float, *, poisson: bool, seed: int = 0) -> Run:
    """Send so many requests a second, whatever the server does."""
    arrival = Arrival(kind="open", rate=rate, spacing="poisson" if poisson else "even")
    phases = (Phase(rate, seconds, poisson),)
    return _run(target, lambda requests: Load(requests, phases=phases, seed=seed), arrival, seconds)


def run_closed(target: Target, under_way: int, seconds: float) -> Run:
    """Keep so many requests under way."""
    arrival = Arrival(kind="closed", under_way=under_way)
    return _run(target, lambda requests: Load(requests, seconds=seconds, concurrency=under_way), arrival, seconds)


def _run(target: Target, make: Callable[[Requests], Load], arrival: Arrival, seconds: float) -> Run:
    client = target.client
    requests = triton_requests(target.url, client.model, target.texts, target.per_request, wanted=target.wanted)
    started = datetime.datetime.now(datetime.UTC)
    before = client.statistics()
    with Watch(target.url) as watch:
        found = generator.send(make(requests))
    spent, between = stages(client, before, client.statistics())
    summary = summarise(outcomes(found), seconds)
    return Run(
        tool="millibert",
        url=target.url,
        model=client.model,
        texts_per_request=target.per_request,
        arrival=arrival,
        started=started.isoformat(timespec="seconds"),
        texts_per_second=summary.requests_per_second * target.per_request,
        resources=watch.resources,
        stages=spent,
        between_stages_ms=between,
        machine=describe_machine(),
        server=_server(client),
        reasons=dict(Counter(map(str, found.status[~found.answered]))),
        **summary._asdict(),
    )


def _server(client: Client) -> dict[str, str]:
    """Name and version, and the configuration of every model that takes part."""
    about = client.server()
    configurations = {
        name: json.dumps(client.configuration(name), indent=1, sort_keys=True, ensure_ascii=False)
        for name in (client.model, *client.steps())
    }
    return {"name": about.name, "version": about.version, **configurations}


def outcomes(found: generator.Answers) -> Answers:
    """The transport's words as the kinds of outcome that all tools share."""
    kinds = {ANSWERED: Outcome.ANSWERED, WRONG: Outcome.WRONG}
    kinds |= dict.fromkeys(BUSY, Outcome.REFUSED) | dict.fromkeys(_LATE, Outcome.TIMED_OUT)
    words, where = np.unique(found.status, return_inverse=True)
    named = np.array([kinds.get(str(word), Outcome.FAILED).value for word in words])
    return Answers(found.due, found.latency, named[where])

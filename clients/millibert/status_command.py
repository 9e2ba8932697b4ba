"""Show whether servers are up and ready, what models they have, and how these have been doing.

Each address of the url is asked by itself, so that one server of several that is down shows. Means are over all
requests since a model was loaded; the models that a service runs are indented below it, and not what it answers to.

examples:
  millibert status --url grpc://127.0.0.1:8001
  millibert status --url http://10.0.0.1:8000,10.0.0.2:8000 --model banking77 --json
  millibert status --url dns:///banking77.svc.cluster.local:8001     # every address of the name

A model that nobody told the server to load is shown as NOT LOADED, and does not count unless --model names it.

exit status: 0 all ready, 1 a server or a model is not, or cannot be reached, 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from millibert._address import Address, parse_target
from millibert._arguments import add_server, open_client
from millibert._client import Client
from millibert._codec import plain_reason
from millibert._endpoints import Endpoint
from millibert._errors import InvalidRequest, NotFound, ServerFault, ServiceError
from millibert._statistics import Counters
from millibert._types import ModelState, ServerInfo

T = TypeVar("T")

_READY, _NOT_READY, _NOT_LOADED, _NOT_TOLD = "READY", "NOT READY", "NOT LOADED", "NOT TOLD"
_SERVERS_AT_ONCE = 16
# A client must be of some model, also for questions about the server.
_NO_MODEL = "-"
_NUMBERS = ("requests", "failures", "texts each", "queue ms", "compute ms", "total ms")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert status`."""
    add_server(parser)
    parser.add_argument("--model", metavar="NAME", help="show this model and those it runs (default: all models)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def run(args: argparse.Namespace) -> int:
    """Ask, and print; returns the exit status."""
    with ThreadPoolExecutor(_SERVERS_AT_ONCE) as pool:
        servers = list(pool.map(partial(_ask, args), _endpoints(args.url)))
    ready = all(server.good(args.model) for server in servers)
    if args.json:
        print(json.dumps({"ready": ready, "servers": [_document(server) for server in servers]}))
    else:
        print("\n\n".join("\n".join(_lines(server)) for server in servers))
    return 0 if ready else 1


@dataclass(frozen=True)
class Model:
    """One model of a server, all its versions together."""

    name: str
    versions: tuple[str, ...]
    """The ready ones, or where none is, all."""
    state: str
    """`READY`, `NOT READY`, `NOT LOADED`, `NOT TOLD`, or what Triton says instead."""
    reason: str
    counters: Counters | None
    """None where there are none, or the server does not tell."""
    steps: tuple[str, ...] = ()
    """Of an ensemble, the models that it runs."""
    labels: int | None = None
    """How many labels a service has; None for other models."""


@dataclass(frozen=True)
class Server:
    """What one address answered."""

    url: str
    live: bool
    ready: bool | None
    """Whether it takes requests; None where it does not tell."""
    info: ServerInfo | None
    seconds: float
    """From the first question to its answer, connecting included."""
    models: tuple[Model, ...]
    notes: tuple[str, ...]
    """What it would not tell."""
    error: str
    """Why there is nothing to show."""

    def good(self, model: str | None) -> bool:
        """Whether it and all its models, or the one asked for, are ready."""
        counted = [each for each in self.models if model is not None or each.state != _NOT_LOADED]
        return self.live and self.ready is not False and bool(counted) and all(each.state == _READY for each in counted)


def _endpoints(url: str) -> list[Endpoint]:
    """Every address that the url leads to, once."""
    target = parse_target(url)
    if not target.resolved:
        return [Endpoint(address, address.host) for address in dict.fromkeys(target.addresses)]
    found: dict[tuple[Address, str], None] = {}
    for named in target.addresses:
        try:
            known = socket.getaddrinfo(named.host, named.port, type=socket.SOCK_STREAM)
            hosts = [str(address[4][0]) for address in known]
        except OSError:
            hosts = [named.host]  # asking it by name will tell what is wrong
        found |= {(named._replace(host=host), named.host): None for host in hosts}
    return [Endpoint(*pair) for pair in found]


def _ask(args: argparse.Namespace, endpoint: Endpoint) -> Server:
    """Ask one server everything; what it does not answer is in the notes, and failures are in the error."""
    inquiry = _Inquiry(args, endpoint)
    start = time.monotonic()
    try:
        return inquiry.answer()
    except (NotFound, ServerFault) as error:
        reason = f"no Triton answers here: {error.reason}"
    except InvalidRequest as error:
        reason = f"it refuses every question: {error.reason}"
    except ServiceError as error:
        reason = error.reason
    return Server(str(endpoint), False, False, None, time.monotonic() - start, (), (), reason)


class _Inquiry:
    """The questions to one server."""

    def __init__(self, args: argparse.Namespace, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._model: str | None = args.model
        self._args = argparse.Namespace(**{**vars(args), "url": str(endpoint)})
        self._refusals: list[InvalidRequest] = []
        self._notes: list[str] = []

    def answer(self) -> Server:
        """Put them all; raises `ServiceError` where the server cannot be asked."""
        with self._client(self._model or _NO_MODEL) as client:
            start = time.monotonic()
            info = self._allowed("name and version", client.server)
            seconds = time.monotonic() - start
            states = self._allowed("list of models", client.models)
            counters = self._allowed("statistics", client.statistics)
        if states is None:
            models, ready = self._models_by_health(counters or {})
        else:
            models, ready = self._models_by_index(states, counters or {})
        if info is None and states is None and counters is None and ready is None:
            raise self._refusals[0]
        notes = tuple(dict.fromkeys(self._notes))
        return Server(str(self._endpoint), True, ready, info, seconds, tuple(models), notes, "")

    def _models_by_index(
        self, states: Sequence[ModelState], counters: dict[str, Counters]
    ) -> tuple[list[Model], bool | None]:
        """All models, and whether the server is ready: asked of the first model that is."""
        names = list(dict.fromkeys(state.name for state in states))
        models = [_summary(name, [each for each in states if each.name == name], counters) for name in names]
        loaded = [model.name for model in models if model.state == _READY]
        ready = self._is_ready(loaded[0]) if loaded else False
        if self._model is not None and self._model not in names:
            self._notes.append(f"no model {self._model!r}; there is {', '.join(sorted(names)) or 'none'}")
        return self._with_steps(models), ready

    def _models_by_health(self, counters: dict[str, Counters]) -> tuple[list[Model], bool | None]:
        """The same where the list is not told: the models of the statistics or the one asked for, each asked itself."""
        names = sorted(counters)
        if self._model is not None and self._model not in names:
            names.append(self._model)
        answers = {name: self._is_ready(name) for name in names}
        words = {True: _READY, False: _NOT_READY, None: _NOT_TOLD}
        models = [Model(name, (), words[answer], "", counters.get(name)) for name, answer in answers.items()]
        told = [answer for answer in answers.values() if answer is not None]
        return self._with_steps(models), any(told) if told else None

    def _is_ready(self, name: str) -> bool | None:
        with self._client(name) as client:
            return self._allowed("health", client.ready)

    def _with_steps(self, models: Sequence[Model]) -> list[Model]:
        """Add what the configurations say; leave out what `--model` does not ask for."""
        known = {model.name: model for model in models}
        steps: dict[str, tuple[str, ...]] = {}
        wanted = list(known) if self._model is None else [self._model]
        while wanted:
            name = wanted.pop()
            if name in known and name not in steps:
                steps[name] = self._steps(known[name])
                wanted += steps[name]
        inner = {step for each in steps.values() for step in each}
        return [
            replace(model, steps=steps[name], labels=None if name in inner else self._labels(model))
            for name, model in known.items()
            if name in steps
        ]

    def _steps(self, model: Model) -> tuple[str, ...]:
        return self._configured(model, lambda client: client.steps()) or ()

    def _labels(self, model: Model) -> int | None:
        labels = self._configured(model, lambda client: client.labels())
        return len(labels) if labels else None

    def _configured(self, model: Model, question: Callable[[Client], T]) -> T | None:
        if model.state != _READY:
            return None
        with self._client(model.name) as client:
            try:
                return self._allowed("configurations", partial(question, client))
            except (NotFound, ServerFault):
                return None  # unloaded since, or no service of millibert

    def _allowed(self, what: str, question: Callable[[], T]) -> T | None:
        """The answer; None, with a note, where the server refuses one."""
        try:
            return question()
        except InvalidRequest as error:
            self._refusals.append(error)
            self._notes.append(f"no {what}: {error.reason}")
            return None

    def _client(self, model: str) -> Client:
        client = open_client(self._args, model)
        if self._endpoint.name != self._endpoint.address.host:
            # The server's certificate is for the name, as it is for calls to `dns:///name`.
            client._endpoints.resolved([(self._endpoint.address, self._endpoint.name)])
        return client


def _summary(name: str, states: Sequence[ModelState], counters: dict[str, Counters]) -> Model:
    """All versions of a model as one: ready if any is."""
    shown = [state for state in states if state.ready] or states
    first = shown[0]
    versions = tuple(state.version for state in shown if state.version)
    # Triton lists what it was not told to load with empty fields.
    return Model(name, versions, first.state or _NOT_LOADED, plain_reason(first.reason), counters.get(name))


def _document(server: Server) -> dict[str, Any]:
    info = server.info
    return {
        "url": server.url,
        "live": server.live,
        "ready": server.ready,
        "name": info.name if info else None,
        "version": info.version if info else None,
        "answer_ms": 1000 * server.seconds,
        "error": server.error or None,
        "notes": server.notes,
        "models": [_model_document(model) for model in server.models],
    }


def _model_document(model: Model) -> dict[str, Any]:
    document = {key: value for key, value in vars(model).items() if key != "counters"}
    counters = model.counters
    if counters is None:
        return {**document, "statistics": None}
    means = {f"{part}_ms": counters.milliseconds(part) for part in ("queue", "compute", "total")}
    counts = {key: value for key, value in asdict(counters).items() if not key.endswith("_ns")}
    return {**document, "statistics": {**counts, "texts_per_execution": counters.texts_per_execution, **means}}


def _lines(server: Server) -> Iterator[str]:
    """Lay a server out for people: a line about itself, a table of its models, and what it would not tell."""
    if not server.live:
        yield f"{server.url}  DOWN  {server.error}"
        return
    about = f"{server.info.name} {server.info.version}" if server.info else "unknown server"
    readiness = {True: "live and ready", False: "live, NOT READY", None: "live, readiness not told"}[server.ready]
    yield f"{server.url}  {about}  {readiness}  answered in {1000 * server.seconds:.1f} ms"
    if server.models:
        yield from _table(server.models)
    for note in server.notes:
        yield f"  note: {note}"


def _table(models: Sequence[Model]) -> Iterator[str]:
    rows = [("model", "version", "state", *_NUMBERS, ""), *map(_row, _nested(models))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        words = [f"{cell:<{width}}" for cell, width in zip(row[:3], widths[:3], strict=True)]
        numbers = [f"{cell:>{width}}" for cell, width in zip(row[3:-1], widths[3:-1], strict=True)]
        yield f"  {'  '.join([*words, *numbers, row[-1]])}".rstrip()


def _nested(models: Sequence[Model]) -> Iterator[tuple[int, Model]]:
    """Every model with its depth, those that another runs below it."""
    known = {model.name: model for model in models}
    inner = {step for model in models for step in model.steps}

    def below(model: Model, depth: int) -> Iterator[tuple[int, Model]]:
        yield depth, model
        for step in model.steps:
            if step in known:
                yield from below(known[step], depth + 1)

    for model in models:
        if model.name not in inner:
            yield from below(model, 0)


def _row(nested: tuple[int, Model]) -> tuple[str, ...]:
    depth, model = nested
    labels = "" if model.labels is None else f"{model.labels} labels"
    words = ("  " * depth + model.name, ",".join(model.versions) or "-", model.state)
    return (*words, *_numbers(model.counters), model.reason or labels)


def _numbers(counters: Counters | None) -> tuple[str, ...]:
    if counters is None:
        return ("-",) * len(_NUMBERS)
    means = (f"{counters.milliseconds(part):.2f}" for part in ("queue", "compute", "total"))
    return f"{counters.requests:,}", f"{counters.failures:,}", f"{counters.texts_per_execution:.1f}", *means

"""What Triton has counted for each of its models: requests, executions, and where their time went."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from operator import add, sub
from typing import Any
from urllib.parse import quote, urlsplit

from millibert._client import parse_address
from millibert._errors import ServerFault, Unavailable

_EVERY_MODEL = "*"
# The engine's own counters on the metrics endpoint, and the values of their label.
_TOKENS = re.compile(r'^millibert_tokens_total\{kind="(\w+)"\} (\S+)$', re.MULTILINE)
TOKEN_KINDS = ("text", "computed", "attention")


@dataclass(frozen=True)
class Counters:
    """Totals of one model since it was loaded; times in nanoseconds, summed over requests."""

    requests: int = 0
    failures: int = 0
    texts: int = 0
    executions: int = 0
    total_ns: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    compute_ns: int = 0
    output_ns: int = 0

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(*map(sub, astuple(self), astuple(earlier)))

    def __add__(self, other: Counters) -> Counters:
        return Counters(*map(add, astuple(self), astuple(other)))

    @property
    def texts_per_execution(self) -> float:
        """The mean batch."""
        return self.texts / self.executions if self.executions else 0.0

    def milliseconds(self, part: str) -> float:
        """Mean of a part over all successful requests: `total`, `queue`, `input`, `compute` or `output`."""
        return float(getattr(self, f"{part}_ns")) / self.requests / 1e6 if self.requests else 0.0


def read_statistics(url: str, timeout: float) -> dict[str, Counters]:
    """Ask a server for the counters of all its models, all versions of a model together.

    Raises `Unavailable` where it cannot be reached and `ServerFault` where it answers something else.
    """
    by_grpc = parse_address(url).scheme == "grpc"
    document = _by_grpc(url, timeout) if by_grpc else _get(url, "/v2/models/stats", timeout, _EVERY_MODEL)
    found: dict[str, Counters] = {}
    try:
        for model in document.get("model_stats", []):
            name = str(model["name"])
            found[name] = found.get(name, Counters()) + _counters(model)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"the answer is not Triton's statistics: {error!r}"
        raise ServerFault(reason, endpoint=url, model=_EVERY_MODEL) from error
    return found


def ensemble_steps(url: str, model: str, timeout: float) -> list[str]:
    """The models that an ensemble runs, in the order of their steps; empty for any other model."""
    by_grpc = parse_address(url).scheme == "grpc"
    path = f"/v2/models/{quote(model, safe='')}/config"
    config = _config_by_grpc(url, model, timeout) if by_grpc else _get(url, path, timeout, model)
    steps = config.get("ensemble_scheduling", {}).get("step", [])
    return list(dict.fromkeys(str(step["model_name"]) for step in steps))


def _counters(model: Mapping[str, Any]) -> Counters:
    """One model's entry; gRPC leaves zeros out and writes large numbers as strings."""
    stats = model.get("inference_stats", {})

    def value(part: str, of: str) -> int:
        return int(stats.get(part, {}).get(of, 0))

    return Counters(
        requests=value("success", "count"),
        failures=value("fail", "count"),
        texts=int(model.get("inference_count", 0)),
        executions=int(model.get("execution_count", 0)),
        total_ns=value("success", "ns"),
        queue_ns=value("queue", "ns"),
        input_ns=value("compute_input", "ns"),
        compute_ns=value("compute_infer", "ns"),
        output_ns=value("compute_output", "ns"),
    )


def read_tokens(metrics_url: str, timeout: float) -> dict[str, float]:
    """Tokens the engine has worked on, by kind, from a metrics endpoint; empty where its engine does not count them.

    Raises `Unavailable` where it cannot be reached and `ServerFault` where it refuses.
    """
    split = urlsplit(metrics_url)
    status, body = _read(split.netloc, split.path or "/metrics", timeout, metrics_url, _EVERY_MODEL)
    if status != http.client.OK:
        raise ServerFault(f"HTTP {status}; is this the metrics port?", endpoint=metrics_url, model=_EVERY_MODEL)
    return {kind: float(value) for kind, value in _TOKENS.findall(body.decode("utf-8", "replace"))}


def _get(url: str, path: str, timeout: float, model: str) -> dict[str, Any]:
    status, body = _read(parse_address(url).netloc, path, timeout, url, model)
    try:
        document = json.loads(body)
    except ValueError as error:
        raise ServerFault("the answer is not JSON; is this the HTTP port?", endpoint=url, model=model) from error
    if status != http.client.OK or not isinstance(document, dict):
        reason = document.get("error") if isinstance(document, dict) else None
        raise ServerFault(str(reason or f"HTTP {status}"), endpoint=url, model=model)
    return document


def _read(netloc: str, path: str, timeout: float, url: str, model: str) -> tuple[int, bytes]:
    """Status and body of a GET."""
    connection = http.client.HTTPConnection(netloc, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "strerror", None) or repr(error)
        raise Unavailable(f"cannot reach the server: {cause}", endpoint=url, model=model) from error
    finally:
        connection.close()


def _by_grpc(url: str, timeout: float) -> dict[str, Any]:
    return _grpc(
        url, _EVERY_MODEL, lambda server: server.get_inference_statistics(as_json=True, client_timeout=timeout)
    )


def _config_by_grpc(url: str, model: str, timeout: float) -> dict[str, Any]:
    document = _grpc(url, model, lambda server: server.get_model_config(model, as_json=True, client_timeout=timeout))
    return dict(document.get("config", {}))


def _grpc(url: str, model: str, ask: Callable[[Any], Any]) -> dict[str, Any]:
    from tritonclient import grpc as triton
    from tritonclient.utils import InferenceServerException

    from millibert._grpc import channel_options

    address = parse_address(url)
    server = triton.InferenceServerClient(address.netloc, channel_args=channel_options(address.host))
    try:
        return dict(ask(server))
    except InferenceServerException as error:
        kind = Unavailable if "UNAVAILABLE" in str(error.status()) else ServerFault
        raise kind(str(error.message() or error.status()), endpoint=url, model=model) from error
    finally:
        server.close()

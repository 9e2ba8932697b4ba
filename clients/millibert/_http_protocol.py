"""HTTP: tritonclient writes the requests and reads the answers; paths, headers and the meaning of statuses are here."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar
from urllib.parse import quote

from tritonclient import http as triton

from millibert._codec import CodecError, Outputs, Request, error_class, plain_reason, read_outputs
from millibert._errors import Timeout
from millibert._protocol import AttemptFailed, Exchange, Protocol
from millibert._shared_memory import Region
from millibert_ensemble.contract import QUEUE_TIMEOUT_PARAMETER, TEXT

T = TypeVar("T")

HEADER_LENGTH = "Inference-Header-Content-Length"
"""How many bytes of a body are JSON, before the tensors."""
_LONGEST_REASON = 500


class Message(NamedTuple):
    """What is sent."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


class Answer(NamedTuple):
    """What comes back, of any status."""

    status: int
    header_length: str | None
    body: bytes


class HttpProtocol(Protocol):
    """The paths of Triton's HTTP API."""

    name: ClassVar[str] = "http"

    def infer(self, model: str, request: Request, request_id: str, region: Region | None = None) -> Exchange[Outputs]:
        """`infer`, with the time left as the limit of the queue."""
        tensor = triton.InferInput(TEXT.name, list(request.tensor.shape), TEXT.datatype)
        if region is None:
            tensor.set_data_from_numpy(request.tensor)
        else:
            tensor.set_shared_memory(region.name, region.used)
        path = f"{_model(model)}/infer"

        def message(seconds: float) -> Message:
            parameters = request.parameters | {QUEUE_TIMEOUT_PARAMETER: max(1, int(1000 * seconds))}
            body, length = triton.InferenceServerClient.generate_request_body(
                [tensor], request_id=request_id, parameters=parameters
            )
            return Message("POST", path, body, {} if length is None else {HEADER_LENGTH: str(length)})

        def parse(answer: Answer) -> Outputs:
            _check(answer)
            return read_outputs(lambda: _result(answer, request_id))

        return Exchange(message, parse)

    def server_ready(self) -> Exchange[bool]:
        """`/v2/health/ready`."""
        return _get("/v2/health/ready", _is_ok)

    def model_ready(self, model: str) -> Exchange[bool]:
        """`ready` of the model."""
        return _get(f"{_model(model)}/ready", _is_ok)

    def config(self, model: str) -> Exchange[Any]:
        """`config` of the model."""
        return _get(f"{_model(model)}/config", _document)

    def statistics(self) -> Exchange[Any]:
        """`stats` of all models."""
        return _get("/v2/models/stats", _document)

    def models(self) -> Exchange[Any]:
        """The repository's index."""
        return _post("/v2/repository/index", b"", _document)

    def server(self) -> Exchange[Any]:
        """The server's metadata."""
        return _get("/v2", _document)

    def regions(self) -> Exchange[list[str]]:
        """The system shared memory's status."""
        return _get("/v2/systemsharedmemory/status", lambda answer: [each["name"] for each in _document(answer)])

    def register(self, region: Region) -> Exchange[Any]:
        """`register` of a region."""
        body = json.dumps({"key": region.key, "offset": 0, "byte_size": region.size}).encode()
        return _post(f"{_region(region.name)}/register", body, _check)

    def unregister(self, name: str) -> Exchange[Any]:
        """`unregister` of a region."""
        return _post(f"{_region(name)}/unregister", b"", _check)


def _model(name: str) -> str:
    return f"/v2/models/{quote(name, safe='')}"


def _region(name: str) -> str:
    return f"/v2/systemsharedmemory/region/{quote(name, safe='')}"


def _get(path: str, parse: Any) -> Exchange[Any]:
    return Exchange(lambda _: Message("GET", path), parse)


def _post(path: str, body: bytes, parse: Any) -> Exchange[Any]:
    return Exchange(lambda _: Message("POST", path, body), parse)


def _is_ok(answer: Answer) -> bool:
    # Triton says "not ready" with 400, also for a model it does not know.
    if answer.status == http.client.BAD_REQUEST:
        return False
    _check(answer)
    return True


def _document(answer: Answer) -> Any:
    _check(answer)
    try:
        return json.loads(answer.body)
    except ValueError as error:
        raise CodecError("it is not JSON") from error


def _result(answer: Answer, request_id: str) -> Any:
    length = None if answer.header_length is None else int(answer.header_length)
    result = triton.InferenceServerClient.parse_response_body(answer.body, header_length=length)
    answered = result.get_response().get("id", request_id)
    if answered != request_id:
        raise CodecError(f"it is for the request {answered!r}")
    return result


def _check(answer: Answer) -> None:
    if answer.status == http.client.OK:
        return
    reason = _reason(answer)
    kind = error_class(str(answer.status), reason)
    if kind is Timeout:
        reason = f"a proxy or the server gave up waiting: {reason}"
    raise AttemptFailed(kind, reason)


def _reason(answer: Answer) -> str:
    """Say what the server said: Triton's `{"error": …}`, or the text of something in front of it."""
    try:
        return plain_reason(str(json.loads(answer.body)["error"]))
    except (ValueError, KeyError, TypeError):
        text = " ".join(answer.body[:_LONGEST_REASON].decode(errors="replace").split())
        return f"HTTP status {answer.status}: {text}" if text else f"HTTP status {answer.status}"

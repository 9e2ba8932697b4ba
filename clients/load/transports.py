"""Requests laid out once and sent as bytes, over gRPC and HTTP; their answers are compared with what they should be.

The transports here are for asyncio, with any number of requests under way; `load.blocking` has those for threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from load.best_labels import Wanted, are_right, best_labels_grpc, best_labels_http
from millibert._address import Address, parse_address
from millibert_ensemble.contract import QUEUE_TIMEOUT_PARAMETER, TEXT

ANSWERED = "answered"
# Answered, but with another label than before.
WRONG = "wrong label"
# What a server that is too busy says, over either protocol.
BUSY = ("UNAVAILABLE", "HTTP 503")
INFER = "/inference.GRPCInferenceService/ModelInfer"


class Request(NamedTuple):
    """One request, ready to be sent."""

    body: bytes
    headers: Mapping[str, str]  # of HTTP
    wanted: Wanted | None = None  # for each text the labels that are right; None: answers are not looked at


class Requests(NamedTuple):
    """Where requests go, and the requests."""

    url: str
    path: str
    each: Sequence[Request]


class Transport(Protocol):
    """Sends one request; as many may be under way as the caller likes."""

    async def send(self, request: Request) -> str:
        """`ANSWERED`, or what happened instead: `WRONG`, gRPC's status, `HTTP 503` or an exception's name."""
        ...


def triton_requests(
    url: str,
    model: str,
    texts: Sequence[str],
    per_request: int = 1,
    queue_timeout_ms: float | None = None,
    wanted: Wanted | None = None,
) -> Requests:
    """Requests to a Triton that hold `per_request` texts each, in the order of the texts.

    `queue_timeout_ms`: a request that waits for the engine for longer is refused. `wanted`: the labels that are right,
    for each text; without them answers are counted only.
    """
    by_grpc = parse_address(url).scheme == "grpc"
    each = []
    for start in range(0, len(texts) - per_request + 1, per_request):
        chunk = slice(start, start + per_request)
        right = None if wanted is None else wanted[chunk]
        if by_grpc:
            each.append(Request(_grpc_body(model, texts[chunk], queue_timeout_ms), {}, right))
        else:
            each.append(_http_request(texts[chunk], queue_timeout_ms)._replace(wanted=right))
    return Requests(url, INFER if by_grpc else f"/v2/models/{model}/infer", each)


def _tensor(module: Any, texts: Sequence[str]) -> Any:
    array = np.array([[text.encode()] for text in texts], np.object_)
    tensor = module.InferInput(TEXT.name, list(array.shape), TEXT.datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def _grpc_body(model: str, texts: Sequence[str], queue_timeout_ms: float | None) -> bytes:
    from tritonclient import grpc
    from tritonclient.grpc import service_pb2

    tensor = _tensor(grpc, texts)
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.append(tensor._get_tensor())
    request.raw_input_contents.append(tensor._get_content())
    if queue_timeout_ms is not None:
        request.parameters[QUEUE_TIMEOUT_PARAMETER].int64_param = round(queue_timeout_ms)
    return bytes(request.SerializeToString())


def _http_request(texts: Sequence[str], queue_timeout_ms: float | None) -> Request:
    from tritonclient import http

    make = http.InferenceServerClient.generate_request_body
    parameters = {} if queue_timeout_ms is None else {QUEUE_TIMEOUT_PARAMETER: round(queue_timeout_ms)}
    body, json_size = make([_tensor(http, texts)], parameters=parameters)
    return Request(bytes(body), {"Inference-Header-Content-Length": str(json_size)})


def judged_grpc(answer: bytes, request: Request) -> str:
    """`ANSWERED`, or `WRONG` where the answer's labels are not those that are wanted."""
    if request.wanted is None or are_right(best_labels_grpc(answer), request.wanted):
        return ANSWERED
    return WRONG


def judged_http(status: int, body: bytes, headers: Mapping[str, str], request: Request) -> str:
    """The same; or the status, where it is not 200."""
    if status != 200:
        return f"HTTP {status}"
    if request.wanted is None or are_right(best_labels_http(body, headers), request.wanted):
        return ANSWERED
    return WRONG


@contextlib.asynccontextmanager
async def open_transport(requests: Requests) -> AsyncIterator[Transport]:
    """The transport that the url's scheme names."""
    address = parse_address(requests.url)
    opened: _Grpc | _Http = (_Grpc if address.scheme == "grpc" else _Http)(address, requests.path)
    try:
        yield opened
    finally:
        await opened.close()


class _Grpc:
    """Unary calls on one channel; bytes go in and come out as they are."""

    def __init__(self, address: Address, path: str) -> None:
        from grpc import aio

        from millibert._grpc_protocol import channel_options

        self._error = aio.AioRpcError
        self._channel = aio.insecure_channel(address.netloc, options=channel_options(address.host))
        self._call = self._channel.unary_unary(path)

    async def send(self, request: Request) -> str:
        try:
            answer = await self._call(request.body)
        except self._error as error:
            return str(error.code().name)
        return judged_grpc(answer, request)

    async def close(self) -> None:
        await self._channel.close()


class _Http:
    """Keep-alive connections, as many as are needed at once, and no proxy."""

    def __init__(self, address: Address, path: str) -> None:
        import aiohttp

        self._error = aiohttp.ClientError
        self._url = f"{address}{path}"
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=False)

    async def send(self, request: Request) -> str:
        try:
            async with self._session.post(self._url, data=request.body, headers=request.headers) as answer:
                body = await answer.read()
        except self._error as error:
            return type(error).__name__
        return judged_http(answer.status, body, answer.headers, request)

    async def close(self) -> None:
        await self._session.close()

"""gRPC: the messages are calls of tritonclient's methods, which its clients for threads and asyncio share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

# Else a forked process could not use gRPC. It counts at the first import; who has decided otherwise is respected.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

import grpc
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from millibert._codec import CodecError, Outputs, Request, error_class, plain_reason, read_outputs
from millibert._endpoints import Endpoint
from millibert._errors import Timeout, Unavailable
from millibert._protocol import CONNECT_SECONDS, AttemptFailed, Exchange, Protocol, is_loopback
from millibert._security import TLS
from millibert._shared_memory import Region
from millibert_ensemble.contract import QUEUE_TIMEOUT_PARAMETER, TEXT

_NO_LIMIT = 2**31 - 1
_CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # gRPC refuses answers above 4 MB otherwise; the server's own limits are what counts.
    ("grpc.max_send_message_length", _NO_LIMIT),
    ("grpc.max_receive_message_length", _NO_LIMIT),
    # After a refused connection gRPC fails every call at once for up to two minutes, so that a client would
    # not notice a server that has come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # This is what limits a connection attempt, in spite of its name.
    ("grpc.min_reconnect_backoff_ms", int(1000 * CONNECT_SECONDS)),
    # A connection whose other end has gone is found out while a call waits on it. Triton's default allows two such
    # pings without data, so that longer calls need a server with --grpc-http2-min-recv-ping-interval-without-data.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # Each client knows for itself which servers fail; a shared connection would carry another's pause.
    ("grpc.use_local_subchannel_pool", 1),
    # The retries are ours.
    ("grpc.enable_retries", 0),
)

_LOST = re.compile(r"Stream removed|Socket closed|recvmsg:|sendmsg:|Connection reset|GOAWAY")
_WHERE = re.compile(r"^(UNAVAILABLE: )?(ipv[46]:\S+: )?(recvmsg:)?")


class Invocation(NamedTuple):
    """A method of `InferenceServerClient` and its arguments."""

    method: str
    arguments: Mapping[str, Any]


class GrpcProtocol(Protocol):
    """The methods of tritonclient that ask each question."""

    name: ClassVar[str] = "grpc"

    def infer(self, model: str, request: Request, request_id: str, region: Region | None = None) -> Exchange[Outputs]:
        """`ModelInfer`, with the time left as the limit of the queue."""
        tensor = triton.InferInput(TEXT.name, list(request.tensor.shape), TEXT.datatype)
        if region is None:
            tensor.set_data_from_numpy(request.tensor)
        else:
            tensor.set_shared_memory(region.name, region.used)
        fixed = {"model_name": model, "inputs": [tensor], "request_id": request_id}

        def message(seconds: float) -> Invocation:
            limit = {QUEUE_TIMEOUT_PARAMETER: max(1, int(1000 * seconds))}
            return Invocation("infer", {**fixed, "parameters": request.parameters | limit})

        return Exchange(message, lambda result: read_outputs(lambda: _checked(result, request_id)))

    def server_ready(self) -> Exchange[bool]:
        """`ServerReady`."""
        return _exchange("is_server_ready", bool)

    def model_ready(self, model: str) -> Exchange[bool]:
        """`ModelReady`."""
        return _exchange("is_model_ready", bool, model_name=model)

    def config(self, model: str) -> Exchange[Any]:
        """`ModelConfig`."""
        return _exchange("get_model_config", lambda answer: answer.get("config"), model_name=model, as_json=True)

    def statistics(self) -> Exchange[Any]:
        """`ModelStatistics`."""
        return _exchange("get_inference_statistics", _as_it_is, as_json=True)

    def models(self) -> Exchange[Any]:
        """`RepositoryIndex`."""
        return _exchange("get_model_repository_index", _as_it_is, as_json=True)

    def server(self) -> Exchange[Any]:
        """`ServerMetadata`."""
        return _exchange("get_server_metadata", _as_it_is, as_json=True)

    def regions(self) -> Exchange[list[str]]:
        """`SystemSharedMemoryStatus`."""
        return _exchange("get_system_shared_memory_status", lambda answer: list(answer.regions))

    def register(self, region: Region) -> Exchange[Any]:
        """`SystemSharedMemoryRegister`."""
        arguments = {"name": region.name, "key": region.key, "byte_size": region.size}
        return _exchange("register_system_shared_memory", _as_it_is, **arguments)

    def unregister(self, name: str) -> Exchange[Any]:
        """`SystemSharedMemoryUnregister`."""
        return _exchange("unregister_system_shared_memory", _as_it_is, name=name)


def _checked(result: Any, request_id: str) -> Any:
    answered = result.get_response().id
    if answered not in ("", request_id):
        raise CodecError(f"it is for the request {answered!r}")
    return result


def _exchange(method: str, parse: Callable[[Any], Any], **arguments: Any) -> Exchange[Any]:
    invocation = Invocation(method, arguments)
    return Exchange(lambda _: invocation, parse)


def _as_it_is(answer: Any) -> Any:
    return answer


def channel_options(host: str) -> list[tuple[str, int | str]]:
    """Options of a channel to that host: what the servers allow, and no proxy towards this machine."""
    direct = [("grpc.enable_http_proxy", 0)] if is_loopback(host) else []
    return [*_CHANNEL_OPTIONS, *direct]


def channel_arguments(endpoint: Endpoint, tls: TLS | None) -> dict[str, Any]:
    """What both of tritonclient's clients are made with."""
    options = channel_options(endpoint.address.host)
    if endpoint.name != endpoint.address.host:
        options.append(("grpc.default_authority", f"{endpoint.name}:{endpoint.address.port}"))
    arguments: dict[str, Any] = {"url": endpoint.address.netloc, "channel_args": options}
    if tls is not None:
        if expected := tls.server_name or (endpoint.name if endpoint.name != endpoint.address.host else None):
            options.append(("grpc.ssl_target_name_override", expected))
        arguments["creds"] = grpc.ssl_channel_credentials(tls.authorities(), *tls.identity())
    return arguments


def as_failure(error: InferenceServerException) -> AttemptFailed:
    """What tritonclient's error means."""
    status = (error.status() or "").removeprefix("StatusCode.")
    reason = plain_reason(error.message() or status)
    kind = error_class(status, reason)
    if kind is Timeout:
        return AttemptFailed(kind, reason)
    cause = _cause(reason) if kind is Unavailable else None
    if cause is not None:
        return AttemptFailed(kind, f"cannot reach the server: {cause}", connected=False)
    if kind is Unavailable and _LOST.search(reason):
        return AttemptFailed(kind, f"the connection was lost: {_WHERE.sub('', reason)}", lost=True)
    return AttemptFailed(kind, reason)


def _cause(reason: str) -> str | None:
    """Cut gRPC's account of a failed connection down to its cause; None for what is none."""
    if "errors resolving" in reason or "DNS resolution failed" in reason:
        return "the host name is not known"
    if "failed to connect" not in reason:
        return None
    if "Socket closed" in reason:
        return "it hung up at the first word; is this its gRPC port?"
    last = reason.rpartition("last error: ")[2].rpartition("Failed to connect to remote host: ")[2]
    return _WHERE.sub("", last)

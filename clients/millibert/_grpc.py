"""The gRPC transport."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from typing import Any, ClassVar

from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from millibert._client import DEFAULT_TIMEOUT, Client
from millibert._codec import Config, Outputs, Request, error_class, plain_reason, read_outputs
from millibert._errors import ServiceError, Timeout, Unavailable
from millibert_ensemble.contract import LABELS_PARAMETER, TEXT

_NO_LIMIT = 2**31 - 1
_CHANNEL_OPTIONS = (
    # gRPC refuses answers above 4 MB otherwise; the server's own limits are what counts.
    ("grpc.max_send_message_length", _NO_LIMIT),
    ("grpc.max_receive_message_length", _NO_LIMIT),
    # After a refused connection gRPC fails every call at once for up to two minutes, so that a client would
    # not notice a server that has come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class GrpcClient(Client):
    """A service over gRPC: `GrpcClient("grpc://127.0.0.1:8001", "banking77")`.

    Proxies named by the environment (`http_proxy`, `no_proxy`) are used as gRPC does, except towards this
    machine.
    """

    scheme: ClassVar[str] = "grpc"

    def __init__(self, url: str, model: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        super().__init__(url, model, timeout)
        self._is_closed = False
        self._server = triton.InferenceServerClient(
            self.address.netloc, channel_args=channel_options(self.address.host)
        )

    def close(self) -> None:
        """Close the channel; calls under way end with an error."""
        self._is_closed = True
        self._server.close()

    def _infer(self, request: Request, seconds: float) -> Outputs:
        tensor = triton.InferInput(TEXT.name, list(request.tensor.shape), TEXT.datatype)
        tensor.set_data_from_numpy(request.tensor)
        result = self._call(self._server.infer, seconds, inputs=[tensor], parameters=request.parameters)
        return read_outputs(lambda: result)

    def _ready(self, seconds: float) -> bool:
        start = time.monotonic()
        if not self._call(self._server.is_server_ready, seconds, model_name=None):
            return False
        left = seconds - (time.monotonic() - start)
        return left > 0 and bool(self._call(self._server.is_model_ready, left))

    def _config(self, seconds: float) -> Config:
        config = self._call(self._server.get_model_config, seconds).config
        return Config.of(config.max_batch_size, config.parameters[LABELS_PARAMETER].string_value or "[]")

    def _call(self, method: Callable[..., Any], seconds: float, **arguments: Any) -> Any:
        """Call a method of tritonclient within the deadline; its errors become ours."""
        if self._is_closed:
            raise self._closed()
        named = {"model_name": self.model, **arguments}
        try:
            return method(**{name: value for name, value in named.items() if value is not None}, client_timeout=seconds)
        except InferenceServerException as error:
            raise self._translated(error, seconds) from error

    def _translated(self, error: InferenceServerException, seconds: float) -> ServiceError:
        if self._is_closed:
            return self._closed()
        status = (error.status() or "").removeprefix("StatusCode.")
        reason = plain_reason(error.message() or status)
        kind = error_class(status, reason)
        if kind is Timeout:
            return self._too_late(seconds)
        if kind is Unavailable and ("failed to connect" in reason or "errors resolving" in reason):
            return self._error(kind, f"cannot reach the server: {_cause(reason)}")
        return self._error(kind, reason)


def channel_options(host: str) -> list[tuple[str, int]]:
    """Options of a channel to that host: what the servers allow, and no proxy towards this machine."""
    direct = [("grpc.enable_http_proxy", 0)] if _is_loopback(host) else []
    return [*_CHANNEL_OPTIONS, *direct]


def _cause(reason: str) -> str:
    """Cut gRPC's account of a failed connection down to its cause."""
    if "errors resolving" in reason:
        return "the host name is not known"
    if "Socket closed" in reason:
        return "it hung up at the first word; is this its gRPC port?"
    return reason.rpartition("last error: ")[2].rpartition("Failed to connect to remote host: ")[2]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: only the resolver knows where it leads

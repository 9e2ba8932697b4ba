"""gRPC, for threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, ClassVar

from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from millibert._client import Client
from millibert._endpoints import Endpoint
from millibert._errors import InvalidRequest
from millibert._fork_gate import FORK_GATE
from millibert._grpc_protocol import GrpcProtocol, Invocation, as_failure, channel_arguments
from millibert._protocol import AttemptFailed, Protocol
from millibert._security import TLS


class GrpcClient(Client):
    """A service over gRPC: `GrpcClient("grpc://127.0.0.1:8001", "banking77")`.

    Proxies named by the environment (`http_proxy`, `no_proxy`) are used as gRPC does, except towards this
    machine.
    """

    protocol: ClassVar[Protocol] = GrpcProtocol()

    def _make_sender(self) -> _Sender:
        return _Sender(self._tls)


class _Sender:
    """A channel for each endpoint."""

    def __init__(self, tls: TLS | None) -> None:
        self._tls = tls
        self._servers: dict[Endpoint, Any] = {}
        self._lock = threading.Lock()
        self._closed = False

    def send(self, endpoint: Endpoint, message: Invocation, headers: Mapping[str, str], seconds: float) -> Any:
        server = self._servers.get(endpoint) or self._open(endpoint)
        try:
            with FORK_GATE:
                return getattr(server, message.method)(**message.arguments, headers=headers, client_timeout=seconds)
        except InferenceServerException as error:
            failure = _closed() if self._closed else as_failure(error)
            if failure.lost:
                self._forget(endpoint, server)
            raise failure from error
        except ValueError as error:
            if not self._closed:
                raise
            raise _closed() from error  # gRPC's word for a closed channel

    def close(self) -> None:
        with self._lock:
            self._closed = True
            servers, self._servers = self._servers, {}
        for server in servers.values():
            server.close()

    def _forget(self, endpoint: Endpoint, server: Any) -> None:
        """When to try to connect again is for the call to say; this channel would refuse to for a while."""
        with self._lock:
            if self._servers.get(endpoint) is server:
                del self._servers[endpoint]

    def _open(self, endpoint: Endpoint) -> Any:
        with self._lock:
            if self._closed:
                raise _closed()
            FORK_GATE.check()
            if endpoint not in self._servers:
                self._servers[endpoint] = triton.InferenceServerClient(**channel_arguments(endpoint, self._tls))
            return self._servers[endpoint]


def _closed() -> AttemptFailed:
    return AttemptFailed(InvalidRequest, "this client is closed")

"""gRPC, for asyncio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import grpc
from tritonclient.grpc import aio as triton
from tritonclient.utils import InferenceServerException

from millibert._async_client import AsyncClient
from millibert._endpoints import Endpoint
from millibert._errors import InvalidRequest
from millibert._fork_gate import FORK_GATE
from millibert._grpc_protocol import GrpcProtocol, Invocation, as_failure, channel_arguments
from millibert._protocol import AttemptFailed, Protocol
from millibert._security import TLS


class AsyncGrpcClient(AsyncClient):
    """A service over gRPC: `AsyncGrpcClient("grpc://127.0.0.1:8001", "banking77")`. Proxies as with `GrpcClient`."""

    protocol: ClassVar[Protocol] = GrpcProtocol()

    def _make_sender(self) -> _Sender:
        return _Sender(self._tls)


class _Sender:
    """A channel for each endpoint."""

    def __init__(self, tls: TLS | None) -> None:
        self._tls = tls
        self._servers: dict[Endpoint, Any] = {}
        self._closed = False

    async def send(self, endpoint: Endpoint, message: Invocation, headers: Mapping[str, str], seconds: float) -> Any:
        server = self._servers.get(endpoint)
        if server is None:
            FORK_GATE.check(asyncio=True)
            server = triton.InferenceServerClient(**channel_arguments(endpoint, self._tls))
            self._servers[endpoint] = server
        try:
            return await getattr(server, message.method)(**message.arguments, headers=headers, client_timeout=seconds)
        except InferenceServerException as error:
            failure = self._end() if self._closed else as_failure(error)
            if failure.lost and self._servers.get(endpoint) is server:
                # When to try to connect again is for the call to say; this channel would refuse to for a while.
                del self._servers[endpoint]
            raise failure from error
        except grpc.aio.UsageError as error:
            raise self._end() from error  # gRPC's word for a closed channel

    async def close(self) -> None:
        self._closed = True
        servers, self._servers = self._servers, {}
        for server in servers.values():
            await server.close()

    def _end(self) -> AttemptFailed:
        return AttemptFailed(InvalidRequest, "this client is closed")

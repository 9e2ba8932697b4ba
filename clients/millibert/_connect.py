"""The client that a url asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from millibert._address import parse_target
from millibert._asking import DEFAULT_TIMEOUT, ClientOptions
from millibert._async_client import AsyncClient
from millibert._client import Client


def connect(
    url: str | Sequence[str], model: str, timeout: float = DEFAULT_TIMEOUT, **options: Unpack[ClientOptions]
) -> Client:
    """Make the client that the url's scheme asks for: `grpc://host:8001`, `http://host:8000`, `grpcs://` or `https://`.

    Takes whatever the clients take, see `ClientOptions`; raises `UsageError` for any other url. Nothing is sent yet:
    see `Client.ready`.
    """
    if parse_target(url).addresses[0].protocol == "grpc":
        from millibert._grpc import GrpcClient

        return GrpcClient(url, model, timeout, **options)
    from millibert._http import HttpClient

    return HttpClient(url, model, timeout, **options)


def connect_async(
    url: str | Sequence[str], model: str, timeout: float = DEFAULT_TIMEOUT, **options: Unpack[ClientOptions]
) -> AsyncClient:
    """Make the same for asyncio."""
    if parse_target(url).addresses[0].protocol == "grpc":
        from millibert._grpc_aio import AsyncGrpcClient

        return AsyncGrpcClient(url, model, timeout, **options)
    from millibert._http_aio import AsyncHttpClient

    return AsyncHttpClient(url, model, timeout, **options)

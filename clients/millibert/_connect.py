"""The client that a url asks for."""

from __future__ import annotations

from millibert._client import DEFAULT_TIMEOUT, Client, parse_address


def connect(url: str, model: str, timeout: float = DEFAULT_TIMEOUT) -> Client:
    """Make the client that the url's scheme asks for: `grpc://host:8001` or `http://host:8000`.

    Raises `UsageError` for any other url. Nothing is sent yet: see `Client.ready`.
    """
    if parse_address(url).scheme == "grpc":
        from millibert._grpc import GrpcClient

        return GrpcClient(url, model, timeout)
    from millibert._http import HttpClient

    return HttpClient(url, model, timeout)

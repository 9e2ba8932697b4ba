"""HTTP, for asyncio, on aiohttp, which tritonclient's own client stands on too."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Mapping
from typing import Any, ClassVar

import aiohttp

from millibert._async_client import AsyncClient
from millibert._endpoints import Endpoint
from millibert._errors import InvalidRequest, ServerFault, Timeout, Unavailable
from millibert._http_protocol import HEADER_LENGTH, Answer, HttpProtocol, Message
from millibert._protocol import CONNECT_SECONDS, AttemptFailed, Protocol
from millibert._security import TLS

# Servers and proxies close connections that lie idle, most after 60 s or more; one that is older is not trusted.
_IDLE_SECONDS = 45.0


class AsyncHttpClient(AsyncClient):
    """A service over HTTP: `AsyncHttpClient("http://127.0.0.1:8000", "banking77")`. Connects without proxies."""

    protocol: ClassVar[Protocol] = HttpProtocol()

    def _make_sender(self) -> _Sender:
        return _Sender(self._tls)


class _Sender:
    """One session: kept-alive connections, as many as are needed at once."""

    def __init__(self, tls: TLS | None) -> None:
        self._context = None if tls is None else tls.context()
        self._server_name = None if tls is None else tls.server_name
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            # On a fast network compressing takes longer than sending, and Triton would where it may.
            headers={"Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def send(self, endpoint: Endpoint, message: Message, headers: Mapping[str, str], seconds: float) -> Answer:
        if self._session.closed:
            raise AttemptFailed(InvalidRequest, "this client is closed")
        try:
            async with asyncio.timeout(seconds):
                return await self._exchange(endpoint, message, {**message.headers, **headers})
        except aiohttp.ConnectionTimeoutError as error:
            reason = f"no connection within {CONNECT_SECONDS:g} s"
            raise AttemptFailed(Unavailable, reason, connected=False) from error
        except TimeoutError as error:
            raise AttemptFailed(Timeout, "the time is up") from error
        except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
            raise _as_failure(error) from error

    async def close(self) -> None:
        await self._session.close()

    async def _exchange(self, endpoint: Endpoint, message: Message, headers: dict[str, str]) -> Answer:
        address, more = endpoint.address, {}
        if endpoint.name != address.host:
            headers["Host"] = f"{endpoint.name}:{address.port}"
        if self._context is not None:
            more = {"ssl": self._context, "server_hostname": self._server_name or endpoint.name}
        arguments: dict[str, Any] = {"data": message.body or None, "headers": headers, "allow_redirects": False, **more}
        async with self._session.request(message.method, f"{address}{message.path}", **arguments) as response:
            body = await response.read()
            return Answer(response.status, response.headers.get(HEADER_LENGTH), body)


def _as_failure(error: Exception) -> AttemptFailed:
    """What kept an answer away."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return AttemptFailed(Unavailable, "cannot reach the server: the host name is not known", connected=False)
    if isinstance(error, (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError, ssl.SSLError)):
        cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
        reason = getattr(cause, "verify_message", "") or str(getattr(cause, "reason", None) or cause)
        reason = reason.replace("_", " ").lower() if reason.isupper() else reason
        return AttemptFailed(Unavailable, f"cannot reach the server by TLS: {reason}", connected=False)
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno  # asyncio has words of its own for it
        reason = os.strerror(number) if number else str(error.os_error)
        return AttemptFailed(Unavailable, f"cannot reach the server: {reason}", connected=False)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return AttemptFailed(Unavailable, "the server closed the connection without an answer")
    if isinstance(error, aiohttp.ClientPayloadError):
        return AttemptFailed(Unavailable, "the answer breaks off")
    if isinstance(error, (aiohttp.ClientResponseError, aiohttp.InvalidURL)):
        return AttemptFailed(ServerFault, "the answer is not HTTP; is this the HTTP port?")
    return AttemptFailed(Unavailable, f"the connection was lost: {getattr(error, 'strerror', None) or error}")

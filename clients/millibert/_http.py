"""HTTP, for threads.

The sending is ours. tritonclient's own sender may not be shared between threads, leaves an event loop (two file
descriptors and a thread) behind for every thread that ever used it, and knows no deadline for a whole call.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import ClassVar

from millibert._client import Client
from millibert._endpoints import Endpoint
from millibert._errors import InvalidRequest, ServerFault, Timeout, Unavailable
from millibert._http_protocol import HEADER_LENGTH, Answer, HttpProtocol, Message
from millibert._protocol import CONNECT_SECONDS, AttemptFailed, Protocol
from millibert._security import TLS

_BLOCK = 1 << 16
# Servers and proxies close connections that lie idle, most after 60 s or more; one that is older is not trusted.
_IDLE_SECONDS = 45.0
# How a connection ends that the server closed while it lay idle.
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


class HttpClient(Client):
    """A service over HTTP: `HttpClient("http://127.0.0.1:8000", "banking77")`. Connects without proxies."""

    protocol: ClassVar[Protocol] = HttpProtocol()

    def _make_sender(self) -> _Sender:
        return _Sender(self._tls)


class _Sender:
    """Kept-alive connections to each endpoint, each used by one call at a time."""

    def __init__(self, tls: TLS | None) -> None:
        self._context = None if tls is None else tls.context()
        self._server_name = None if tls is None else tls.server_name
        self._idle: dict[Endpoint, list[_Connection]] = {}
        self._busy: set[_Connection] = set()
        self._lock = threading.Lock()
        self._closed = False

    def send(self, endpoint: Endpoint, message: Message, headers: Mapping[str, str], seconds: float) -> Answer:
        deadline = time.monotonic() + seconds
        whole = message._replace(headers={**message.headers, **headers})
        while True:
            connection, used_before = self._take(endpoint)
            try:
                answer = _exchange(connection, whole, deadline)
            except _STALE as error:
                self._end(connection)
                # Sending again is safe, for a classification changes nothing on the server. Ends, because
                # every round uses up an idle connection.
                if not used_before:
                    raise _as_failure(error, connection) from error
            except (OSError, http.client.HTTPException) as error:
                self._end(connection)
                raise _as_failure(error, connection) from error
            except BaseException:
                self._end(connection)
                raise
            else:
                self._give_back(endpoint, connection)
                return answer

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
            for connection in self._busy:
                connection.interrupt()
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _take(self, endpoint: Endpoint) -> tuple[_Connection, bool]:
        with self._lock:
            if self._closed:
                raise AttemptFailed(InvalidRequest, "this client is closed")
            idle = self._idle.get(endpoint, [])
            fresh = time.monotonic() - _IDLE_SECONDS
            while idle:
                connection = idle.pop()
                if connection.used_at >= fresh:
                    self._busy.add(connection)
                    return connection, True
                connection.close()
            connection = _Connection(endpoint, self._context, self._server_name)
            self._busy.add(connection)
            return connection, False

    def _give_back(self, endpoint: Endpoint, connection: _Connection) -> None:
        connection.used_at = time.monotonic()
        with self._lock:
            self._busy.discard(connection)
            if not self._closed and connection.sock is not None:
                self._idle.setdefault(endpoint, []).append(connection)
                return
        connection.close()

    def _end(self, connection: _Connection) -> None:
        """Its call has failed; of one that `close` has interrupted, that is what there is to say."""
        connection.close()
        with self._lock:
            self._busy.discard(connection)
            if self._closed:
                raise AttemptFailed(InvalidRequest, "this client is closed")


class _Connection(http.client.HTTPConnection):
    """A connection to an endpoint's address under the endpoint's name."""

    def __init__(self, endpoint: Endpoint, context: ssl.SSLContext | None, server_name: str | None) -> None:
        super().__init__(endpoint.name, endpoint.address.port)
        self._endpoint = endpoint
        self._context = context
        self._server_name = server_name or endpoint.name
        self.connected = False
        self.used_at = 0.0

    def connect(self) -> None:
        sock = socket.create_connection((self._endpoint.address.host, self.port), self.timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = sock if self._context is None else self._secured(sock)
        except BaseException:
            sock.close()
            raise
        self.connected = True

    def interrupt(self) -> None:
        """Let the thread that waits for it go on, with an error."""
        with suppress(OSError, AttributeError):  # it may not be connected yet, or not any more
            self.sock.shutdown(socket.SHUT_RDWR)

    def _secured(self, sock: socket.socket) -> ssl.SSLSocket:
        assert self._context is not None
        return self._context.wrap_socket(sock, server_hostname=self._server_name)


def _exchange(connection: _Connection, message: Message, deadline: float) -> Answer:
    """Send and read on one connection, waiting at each step no longer than the deadline leaves."""
    if connection.sock is None:
        connection.timeout = min(CONNECT_SECONDS, _left(deadline))
        connection.connect()
    sock = connection.sock
    sock.settimeout(_left(deadline))
    connection.request(*message)
    sock.settimeout(_left(deadline))
    response = connection.getresponse()
    blocks: list[bytes] = []
    while True:
        sock.settimeout(_left(deadline))
        if not (block := response.read1(_BLOCK)):
            break
        blocks.append(block)
    response.close()  # else the connection takes the answer for unread
    answer = b"".join(blocks)
    if response.length:
        raise http.client.IncompleteRead(answer, response.length)
    return Answer(response.status, response.getheader(HEADER_LENGTH), answer)


def _as_failure(error: OSError | http.client.HTTPException, connection: _Connection) -> AttemptFailed:
    """What kept an answer away."""
    connected = connection.connected
    if isinstance(error, TimeoutError):
        if connected or connection.timeout is None or connection.timeout < CONNECT_SECONDS:
            return AttemptFailed(Timeout, "the time is up", connected=connected)
        return AttemptFailed(Unavailable, f"no connection within {CONNECT_SECONDS:g} s", connected=False)
    if isinstance(error, http.client.RemoteDisconnected):
        return AttemptFailed(Unavailable, "the server closed the connection without an answer")
    if isinstance(error, http.client.BadStatusLine):
        return AttemptFailed(ServerFault, "the answer is not HTTP; is this the HTTP port?")
    if isinstance(error, http.client.IncompleteRead):
        return AttemptFailed(Unavailable, "the answer breaks off")
    if isinstance(error, http.client.HTTPException):
        return AttemptFailed(ServerFault, f"the answer is not HTTP: {type(error).__name__}")
    if isinstance(error, socket.gaierror):
        return AttemptFailed(Unavailable, "cannot reach the server: the host name is not known", connected=False)
    if isinstance(error, ssl.SSLError):
        return AttemptFailed(Unavailable, f"cannot reach the server by TLS: {tls_reason(error)}", connected=False)
    if not connected:
        return AttemptFailed(Unavailable, f"cannot reach the server: {error.strerror or error}", connected=False)
    return AttemptFailed(Unavailable, f"the connection was lost: {error.strerror or error}")


def tls_reason(error: ssl.SSLError) -> str:
    """What a person needs of OpenSSL's message."""
    return getattr(error, "verify_message", "") or (error.reason or str(error)).replace("_", " ").lower()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left

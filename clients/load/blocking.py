"""One request at a time for each thread, over gRPC and HTTP: what a closed loop sends with.

A thread that waits for its answer takes less CPU, and less time, than an event loop that is woken for it: over HTTP
half, over gRPC a fifth less with one request under way (docs/log.md).
"""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Callable, Iterator
from typing import TypeAlias

from load.transports import Request, Requests, judged_grpc, judged_http
from millibert._address import Address, parse_address

Send: TypeAlias = Callable[[Request], str]
"""`ANSWERED`, or what happened instead; see `transports.Transport`."""


@contextlib.contextmanager
def open_blocking(requests: Requests, patience_seconds: float) -> Iterator[Callable[[], Send]]:
    """A function that each thread calls for a `Send` of its own. An answer that takes longer than that is a timeout."""
    address = parse_address(requests.url)
    connected = _grpc if address.scheme == "grpc" else _http
    with connected(address, requests.path, patience_seconds) as make:
        yield make


@contextlib.contextmanager
def _grpc(address: Address, path: str, patience_seconds: float) -> Iterator[Callable[[], Send]]:
    """Unary calls, all on one channel; bytes go in and come out as they are."""
    import grpc

    from millibert._grpc_protocol import channel_options

    with grpc.insecure_channel(address.netloc, options=channel_options(address.host)) as channel:
        call = channel.unary_unary(path)

        def send(request: Request) -> str:
            try:
                answer = call(request.body, timeout=patience_seconds)
            except grpc.RpcError as error:
                return str(error.code().name)
            return judged_grpc(answer, request)

        yield lambda: send


@contextlib.contextmanager
def _http(address: Address, path: str, patience_seconds: float) -> Iterator[Callable[[], Send]]:
    """A kept-alive connection for each thread, and no proxy."""
    with contextlib.ExitStack() as opened:

        def make() -> Send:
            connection = _Connection(address, path, patience_seconds)
            opened.callback(connection.close)
            return connection.send

        yield make


class _Connection:
    """Requests go out in one piece: `http.client` sends head and body by themselves, which wakes the server twice."""

    def __init__(self, address: Address, path: str, patience_seconds: float) -> None:
        self._where = (address.host, address.port)
        self._patience = patience_seconds
        self._head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\n"
        self._socket: socket.socket | None = None

    def send(self, request: Request) -> str:
        try:
            answer, body = self._exchange(self._bytes(request))
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return type(error).__name__
        if answer.will_close:
            self.close()
        return judged_http(answer.status, body, dict(answer.getheaders()), request)

    def close(self) -> None:
        """The next request connects again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _bytes(self, request: Request) -> bytes:
        headers = {"Content-Length": len(request.body), **request.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{self._head}{lines}\r\n".encode() + request.body

    def _exchange(self, message: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        if self._socket is None:
            self._socket = socket.create_connection(self._where, self._patience)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(message)
        with http.client.HTTPResponse(self._socket, method="POST") as answer:
            answer.begin()
            return answer, answer.read()

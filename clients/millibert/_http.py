"""The HTTP transport.

tritonclient writes the requests and reads the answers; the sending is ours. tritonclient's own sender may
not be shared between threads, leaves an event loop (two file descriptors and a thread) behind for every
thread that ever used it, and knows no deadline for a whole call.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote

from tritonclient import http as triton

from millibert._client import DEFAULT_TIMEOUT, Address, Client
from millibert._codec import Config, Outputs, Request, error_class, plain_reason, read_outputs
from millibert._errors import ServerFault, ServiceError, Timeout, Unavailable
from millibert_ensemble.contract import LABELS_PARAMETER, TEXT

_BLOCK = 1 << 16
_HEADER_LENGTH = "Inference-Header-Content-Length"
_LONGEST_REASON = 500
# How a connection ends that the server closed while it lay idle.
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


class HttpClient(Client):
    """A service over HTTP: `HttpClient("http://127.0.0.1:8000", "banking77")`. Connects without proxies."""

    scheme: ClassVar[str] = "http"

    def __init__(self, url: str, model: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        super().__init__(url, model, timeout)
        self._connections = _Connections(self.address)
        self._model_path = f"/v2/models/{quote(model, safe='')}"

    def close(self) -> None:
        """Close the idle connections now, and those in use when their call ends."""
        self._connections.close()

    def _infer(self, request: Request, seconds: float) -> Outputs:
        tensor = triton.InferInput(TEXT.name, list(request.tensor.shape), TEXT.datatype)
        tensor.set_data_from_numpy(request.tensor)
        body, header_length = triton.InferenceServerClient.generate_request_body(
            [tensor], parameters=request.parameters
        )
        post = _Message("POST", f"{self._model_path}/infer", body, {_HEADER_LENGTH: str(header_length)})
        answer = self._checked(self._send(post, seconds))
        return read_outputs(lambda: _parsed(answer))

    def _ready(self, seconds: float) -> bool:
        start = time.monotonic()
        if not self._is_ok("/v2/health/ready", seconds):
            return False
        left = seconds - (time.monotonic() - start)
        return left > 0 and self._is_ok(f"{self._model_path}/ready", left)

    def _is_ok(self, path: str, seconds: float) -> bool:
        answer = self._send(_Message("GET", path), seconds)
        # Triton says "not ready" with 400, also for a model it does not know.
        return answer.status != http.client.BAD_REQUEST and self._checked(answer) is answer

    def _config(self, seconds: float) -> Config:
        answer = self._checked(self._send(_Message("GET", f"{self._model_path}/config"), seconds))
        try:
            config = json.loads(answer.body)
            labels = config.get("parameters", {}).get(LABELS_PARAMETER, {}).get("string_value", "[]")
            return Config.of(config.get("max_batch_size", 0), labels)
        except (ValueError, AttributeError, TypeError) as error:
            raise self._error(ServerFault, f"the answer is not a model configuration: {error}") from error

    def _send(self, message: _Message, seconds: float) -> _Answer:
        """Exchange a request for an answer of any status; what keeps an answer away becomes our error."""
        if self._connections.closed:
            raise self._closed()
        try:
            return self._connections.exchange(message, time.monotonic() + seconds)
        except TimeoutError as error:
            raise self._too_late(seconds) from error
        except http.client.RemoteDisconnected as error:
            raise self._error(Unavailable, "the server closed the connection without an answer") from error
        except http.client.BadStatusLine as error:
            raise self._error(ServerFault, "the answer is not HTTP; is this the HTTP port?") from error
        except http.client.HTTPException as error:
            reason = f"the answer breaks off or is not HTTP: {type(error).__name__}"
            raise self._error(ServerFault, reason) from error
        except OSError as error:
            reason = f"cannot reach the server: {error.strerror or error}"
            raise self._error(Unavailable, reason) from error

    def _checked(self, answer: _Answer) -> _Answer:
        if answer.status == http.client.OK:
            return answer
        raise self._translated(answer)

    def _translated(self, answer: _Answer) -> ServiceError:
        reason = _reason(answer)
        kind = error_class(str(answer.status), reason)
        if kind is Timeout:
            reason = f"a proxy or the server gave up waiting: {reason}"
        return self._error(kind, reason)


class _Message(NamedTuple):
    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


class _Answer(NamedTuple):
    status: int
    header_length: str | None
    body: bytes


def _parsed(answer: _Answer) -> Any:
    length = None if answer.header_length is None else int(answer.header_length)
    return triton.InferenceServerClient.parse_response_body(answer.body, header_length=length)


def _reason(answer: _Answer) -> str:
    """Say what the server said: Triton's `{"error": …}`, or the text of something in front of it."""
    try:
        return plain_reason(str(json.loads(answer.body)["error"]))
    except (ValueError, KeyError, TypeError):
        text = " ".join(answer.body[:_LONGEST_REASON].decode(errors="replace").split())
        return f"HTTP status {answer.status}: {text}" if text else f"HTTP status {answer.status}"


class _Connections:
    """Kept-alive connections to one address, each used by one call at a time."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self.closed = False

    def exchange(self, message: _Message, deadline: float) -> _Answer:
        """Send one request and read its whole answer by `deadline` (of `time.monotonic`)."""
        while True:
            connection, used_before = self._take()
            try:
                answer = _exchange(connection, message, deadline)
            except _STALE:
                connection.close()
                # Sending again is safe, for a classification changes nothing on the server. Ends, because
                # every round uses up an idle connection.
                if not used_before:
                    raise
            except BaseException:
                connection.close()
                raise
            else:
                self._give_back(connection)
                return answer

    def close(self) -> None:
        with self._lock:
            self.closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        return http.client.HTTPConnection(self._address.host, self._address.port), False

    def _give_back(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if not self.closed and connection.sock is not None:
                self._idle.append(connection)
                return
        connection.close()


def _exchange(connection: http.client.HTTPConnection, message: _Message, deadline: float) -> _Answer:
    """Send and read on one connection, waiting at each step no longer than the deadline leaves."""
    if connection.sock is None:
        connection.timeout = _left(deadline)
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
    return _Answer(response.status, response.getheader(_HEADER_LENGTH), answer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left

"""Servers of our own over real sockets, that do what real ones do on their bad days.

`Proxy` stands in front of a real Triton and spoils connections; `Recorder` answers like a model, over either protocol,
and keeps what it was asked.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import grpc
from tritonclient.grpc import service_pb2

from millibert_ensemble.contract import REQUEST_TENSORS, RESPONSE_TENSORS

PASS, RESET, CUT, HANG = "pass", "reset", "cut", "hang"
_BLOCK = 1 << 16


class Proxy:
    """Passes connections on to `target`, or spoils them: as `modes` say, in the order of connections, then `last`.

    reset: reads something and resets. cut: passes the request on and ends amid the answer. hang: never answers.
    """

    def __init__(self, target: int, *modes: str, last: str = PASS, host: str = "127.0.0.1", port: int = 0) -> None:
        self._target = target
        self._modes = list(modes)
        self.last = last
        self.connections = 0
        self._open: list[socket.socket] = []
        self._listening = socket.create_server((host, port))
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more, and reset every connection."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for each in self._open:
            _reset(each)
        self._thread.join(5)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(client)
            mode = self._modes.pop(0) if self._modes else self.last
            threading.Thread(target=self._serve, args=[client, mode], daemon=True).start()

    def _serve(self, client: socket.socket, mode: str) -> None:
        with contextlib.suppress(OSError):
            if mode == RESET:
                client.recv(1)
                _reset(client)
            elif mode != HANG:
                self._pass(client, mode)

    def _pass(self, client: socket.socket, mode: str) -> None:
        server = socket.create_connection(("127.0.0.1", self._target))
        self._open.append(server)
        threading.Thread(target=_copy, args=[client, server], daemon=True).start()
        if mode == CUT:
            self._cut(server, client)
        else:
            _copy(server, client)

    def _cut(self, server: socket.socket, client: socket.socket) -> None:
        """Of gRPC the settings pass, so that the request is sent; an answer ends in its middle."""
        while block := server.recv(_BLOCK):
            if b"greeting" in block:
                client.sendall(block[: block.index(b"greeting")])
                _reset(client)
                return
            client.sendall(block)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while block := source.recv(_BLOCK):
            sink.sendall(block)
        sink.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    connection.close()


class Asked(NamedTuple):
    """One request that a `Recorder` got."""

    headers: Mapping[str, str]
    parameters: Mapping[str, Any]
    id: str


class Reply(NamedTuple):
    """What a `Recorder` answers."""

    status: str = "OK"  # gRPC's; HTTP gets its number
    message: str = ""
    body: bytes | None = None  # instead of a response
    id: str | None = None  # instead of the request's
    without: str = ""  # an output that is left out


GOOD = Reply()
_HTTP_STATUS = {"OK": 200, "INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "UNAVAILABLE": 503, "INTERNAL": 500}
_VALUES: dict[str, Any] = {"LABEL": "greeting", "SCORE": 0.8, "LABEL_ID": 0, "ACCEPTED": True, "TRUNCATED": False}
_RAW = {
    "LABEL": struct.pack("<I", 8) + b"greeting",
    "SCORE": struct.pack("<f", 0.8),
    "LABEL_ID": struct.pack("<i", 0),
    "ACCEPTED": b"\1",
    "TRUNCATED": b"\0",
}


class Recorder:
    """A server of one protocol; `replies` in the order of requests, then `GOOD`."""

    def __init__(self, protocol: str, *replies: Reply, before: Callable[[], None] | None = None) -> None:
        self.asked: list[Asked] = []
        self.ended = threading.Event()
        """gRPC: a call has ended, also by the caller's will."""
        self._replies = list(replies)
        self._before = before or (lambda: None)
        self.url = ""
        self._start = self._grpc if protocol == "grpc" else self._http

    @contextlib.contextmanager
    def serve(self) -> Iterator[Recorder]:
        """Listen on a free port."""
        with self._start():
            yield self

    def _reply(self, asked: Asked) -> Reply:
        self.asked.append(asked)
        self._before()
        return self._replies.pop(0) if self._replies else GOOD

    @contextlib.contextmanager
    def _grpc(self) -> Iterator[None]:
        recorder = self

        class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
            def service(self, details: Any) -> Any:
                headers = dict(details.invocation_metadata)
                return grpc.unary_unary_rpc_method_handler(
                    lambda request, context: recorder._grpc_answer(request, context, headers)
                )

        pool = ThreadPoolExecutor(4)
        server = grpc.server(pool, handlers=[Handler()])
        self.url = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield
        finally:
            server.stop(0).wait()
            pool.shutdown()

    def _grpc_answer(self, request: bytes, context: Any, headers: Mapping[str, str]) -> bytes:
        context.add_callback(self.ended.set)
        asked = service_pb2.ModelInferRequest.FromString(request)
        parameters = {name: value.int64_param for name, value in asked.parameters.items()}
        reply = self._reply(Asked(headers, parameters, asked.id))
        if reply.status != "OK":
            context.abort(grpc.StatusCode[reply.status], reply.message)
        if reply.body is not None:
            return reply.body
        answer = service_pb2.ModelInferResponse(id=reply.id or asked.id)
        for tensor in RESPONSE_TENSORS:
            if tensor.name != reply.without:
                answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=[1, 1])
                answer.raw_output_contents.append(_RAW[tensor.name])
        return bytes(answer.SerializeToString())

    @contextlib.contextmanager
    def _http(self) -> Iterator[None]:
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                status, body = recorder._http_answer(self)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            self.url = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever, args=[0.02])
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()

    def _http_answer(self, request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        asked = json.loads(body[: int(request.headers["Inference-Header-Content-Length"])])
        assert [each["name"] for each in asked["inputs"]] == [tensor.name for tensor in REQUEST_TENSORS]
        headers = {name.lower(): value for name, value in request.headers.items()}
        reply = self._reply(Asked(headers, asked["parameters"], asked["id"]))
        if reply.body is not None:
            return 200, reply.body
        if reply.status != "OK":
            return _HTTP_STATUS[reply.status], json.dumps({"error": reply.message}).encode()
        outputs = [
            {"name": each.name, "datatype": each.datatype, "shape": [1, 1], "data": [_VALUES[each.name]]}
            for each in RESPONSE_TENSORS
            if each.name != reply.without
        ]
        return 200, json.dumps({"id": reply.id or asked["id"], "outputs": outputs}).encode()

"""`/ready`, `/live` and `/metrics` of a supervised server, on a port of its own, for a kubelet and for Prometheus."""

from __future__ import annotations

import http.client
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from types import TracebackType

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from millibert._errors import UsageError
from millibert_ensemble.health import Health

_TEXT = "text/plain; charset=utf-8"


class HealthServer:
    """Answers from `with` to its end: also while the server starts, starts again, and stops.

    `/ready` and `/live` answer 200, or 503 and the reason in one line. Port 0 is any free one. Raises UsageError when
    the port is taken.
    """

    def __init__(self, health: Health, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(health)
        try:
            self._server = _Server((host, port), health, registry)
        except OSError as error:
            advice = "choose another with --health-port N, or 0 for any free one"
            raise UsageError(f"cannot listen on {host}:{port} (health): {error.strerror}; {advice}") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on, from the start."""
        return int(self._server.server_address[1])

    def __enter__(self) -> HealthServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    # Not http.server's own class, which looks up the host's name first.
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], health: Health, registry: CollectorRegistry) -> None:
        super().__init__(address, _Handler)
        self.health = health
        self.registry = registry


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 5  # for whoever connects and says nothing

    def do_GET(self) -> None:
        health = self.server.health
        match self.path:
            case "/ready":
                self._verdict("ready", health.unready())
            case "/live":
                self._verdict("alive", health.dead())
            case "/metrics":
                self._answer(http.client.OK, CONTENT_TYPE_LATEST, generate_latest(self.server.registry))
            case _:
                self._answer(http.client.NOT_FOUND, _TEXT, b"here are /ready, /live and /metrics\n")

    def _verdict(self, good: str, bad: str | None) -> None:
        status = http.client.OK if bad is None else http.client.SERVICE_UNAVAILABLE
        self._answer(status, _TEXT, f"{bad or good}\n".encode())

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A probe every few seconds is not worth a line."""

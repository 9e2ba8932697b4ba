"""The HTTP clients and answers that no Triton would give: other servers, hang-ups, bytes that trickle in."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from tests.clients import open_client

import millibert
from millibert import Retry

ONCE = Retry(attempts=1)


def read_request(connection: socket.socket) -> None:
    """Read it all: closing a socket with something unread resets the connection instead of ending it."""
    with connection.makefile("rb") as file:
        file.readline()
        headers = http.client.parse_headers(file)
        file.read(int(headers.get("Content-Length", 0)))


@contextmanager
def http_server(*answers: bytes) -> Iterator[str]:
    """A server that answers the first request of each connection with the next of `answers` and hangs up."""

    def serve(listening: socket.socket) -> None:
        for answer in answers:
            connection, _ = listening.accept()
            with connection:
                read_request(connection)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=[listening], daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(5)
    assert not thread.is_alive(), "fewer connections than answers"


def ok(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@pytest.mark.parametrize("http_form", ["http", "http-aio"])
@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        (ok(b"<h1>oh</h1>", b"502 Bad Gateway"), millibert.Unavailable, "HTTP status 502: <h1>oh</h1>"),
        (ok(b"", b"404 Not Found"), millibert.NotFound, "HTTP status 404"),
        (ok(b"", b"301 Moved Permanently"), millibert.ServerFault, "HTTP status 301"),
        (ok(b"ok"), millibert.ServerFault, "not an inference response"),
        (ok(b"[]"), millibert.ServerFault, "not an inference response"),
        (ok(b"{}"), millibert.ServerFault, "LABEL is missing"),
        (ok(b"{}")[:-1], millibert.Unavailable, "breaks off"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", millibert.ServerFault, "is not HTTP"),
        (b"", millibert.Unavailable, "closed the connection without an answer"),
    ],
)
def test_http_answers_that_are_not_tritons(http_form: str, answer: bytes, kind: type[Exception], reason: str) -> None:
    with (
        http_server(answer) as url,
        open_client(http_form, url, "m", timeout=5, retry=ONCE) as client,
        pytest.raises(kind, match=reason),
    ):
        client.classify("a")


@pytest.mark.parametrize("http_form", ["http", "http-aio"])
def test_http_survives_a_connection_that_went_stale(http_form: str) -> None:
    # Each answer is followed by a hang-up, which the client notices only at its next request.
    with http_server(*[ok(b"")] * 4) as url, open_client(http_form, url, "m", timeout=5) as client:
        assert [client.ready(), client.ready()] == [True, True]


@pytest.mark.parametrize("http_form", ["http", "http-aio"])
def test_http_deadline_of_an_answer_that_trickles_in(http_form: str) -> None:
    def trickle(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, suppress(ConnectionError):  # the client gives up and leaves
            connection.recv(65536)
            connection.sendall(ok(b"x" * 1000)[:-1000])
            for _ in range(20):  # each byte well within the deadline, all of them far beyond it
                time.sleep(0.1)
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=trickle, args=[listening], daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with open_client(http_form, url, "m") as client, pytest.raises(millibert.Timeout, match=r"within 0\.5 s"):
            client.classify("a", timeout=0.5)
        thread.join(5)

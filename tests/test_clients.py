from __future__ import annotations

import http.client
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import millibert
from millibert._client import Address, parse_address
from millibert._codec import CodecError, decode, encode, error_class, plain_reason

if TYPE_CHECKING:
    from tests.conftest import RunningServer

REPOSITORY = Path(__file__).parent / "client_repository"
MODEL = "echo"
SCHEMES = ("grpc", "http")
TENSORS: dict[str, Any] = {
    "LABEL": np.array([[b"a", "ö".encode()], [b"b", b"a"]], dtype=object),
    "SCORE": np.array([[0.75, 0.25], [0.5, 0.5]], np.float32),
    "LABEL_ID": np.array([[0, 2], [1, 0]], np.int32),
    "ACCEPTED": np.array([[True, False], [False, False]]),
    "TRUNCATED": np.array([[False], [True]]),
}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


# The package


def test_exported_names() -> None:
    assert millibert.__all__ == sorted(millibert.__all__)
    assert set(millibert.__all__) == {
        "Classification", "Client", "GrpcClient", "HttpClient", "InvalidRequest", "MillibertError",
        "NotFound", "Prediction", "ServerFault", "ServiceError", "Timeout", "Unavailable", "UsageError",
        "connect",
    }  # fmt: skip
    assert all(getattr(millibert, name).__name__ == name for name in millibert.__all__)
    assert set(millibert.__all__) <= set(dir(millibert))
    with pytest.raises(AttributeError, match="'millibert' has no attribute 'Nothing'"):
        _ = millibert.Nothing


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import millibert", ["torch", "transformers", "grpc", "gevent", "tritonclient"]),
        ("from millibert import HttpClient", ["torch", "transformers", "grpc"]),
        ("from millibert import GrpcClient", ["torch", "transformers", "gevent"]),
    ],
)
def test_light_import(statement: str, absent: list[str]) -> None:
    loaded = python(f"import sys; {statement}; print(*(name for name in {absent} if name in sys.modules))")
    assert loaded.split() == []


def test_errors_survive_pickling() -> None:
    error = millibert.NotFound("no such model", endpoint="grpc://a:1", model="m")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is millibert.NotFound
    assert str(again) == str(error) == "no such model (model 'm' at grpc://a:1)"
    assert (again.reason, again.endpoint, again.model) == ("no such model", "grpc://a:1", "m")


# What is sent and what comes back


def test_encode() -> None:
    request = encode(["a", "größe", ""], np.int64(2))  # type: ignore[arg-type]
    assert request.texts == ("a", "größe", "")
    assert request.tensor.tolist() == [[b"a"], ["größe".encode()], [b""]]
    assert request.parameters == {"top_k": 2}
    assert encode(["a"], None).parameters == {}


@pytest.mark.parametrize(
    ("texts", "top_k", "reason"),
    [
        ([], None, "no text to classify"),
        (b"bytes", None, "not bytes"),
        ({"a"}, None, "not set"),
        (7, None, "not int"),
        (["a", None], None, "text 1 is not a str but NoneType"),
        (["a", b"b"], None, "text 1 is not a str but bytes"),
        (
            ["a", "b\ud800"],
            None,
            r"text 1 cannot be written as UTF-8: lone surrogate '\\ud800' at position 1",
        ),
        (["a"], 0, "top_k must be an integer of at least 1, not 0"),
        (["a"], True, "not True"),
        (["a"], 2.0, "not 2.0"),
        (["a"], 2**40, "top_k"),
    ],
)
def test_encode_refuses(texts: Any, top_k: Any, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        encode(texts, top_k)


def test_decode() -> None:
    first, second = decode(["x", "y"], TENSORS)
    assert first.predictions == (millibert.Prediction("a", 0, 0.75), millibert.Prediction("ö", 2, 0.25, False))
    assert (first.text, first.best, first.label, first.score) == ("x", first.predictions[0], "a", 0.75)
    assert (first.truncated, second.truncated) == (False, True)
    assert str(first) == "a 0.750, ö 0.250"
    assert str(second) == "b 0.500, a 0.500 (don't know, text truncated)"
    assert (first.known, first.accepted, second.known, second.accepted) == (True, ("a",), False, ())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"SCORE": None}, "SCORE is missing"),
        ({"LABEL": np.array([[b"a"]], dtype=object)}, r"LABEL has the shape \[1, 1\] for 2 texts"),
        ({"LABEL": np.empty((2, 0), dtype=object)}, r"LABEL has the shape \[2, 0\]"),
        ({"LABEL_ID": np.zeros((2, 1), np.int32)}, r"LABEL_ID has the shape \[2, 1\], expected \[2, 2\]"),
        ({"TRUNCATED": np.zeros(2, bool)}, r"TRUNCATED has the shape \[2\], expected \[2, 1\]"),
        ({"LABEL": np.array([[b"\xff", b"a"]] * 2, dtype=object)}, "not UTF-8"),
        ({"LABEL": np.ones((2, 2))}, "expected text"),
    ],
)
def test_decode_refuses(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        decode(["x", "y"], {**TENSORS, **changed})


@pytest.mark.parametrize(
    ("statuses", "reason", "kind"),
    [
        ("INVALID_ARGUMENT 400 413 403 PERMISSION_DENIED", "", millibert.InvalidRequest),
        ("NOT_FOUND 404", "", millibert.NotFound),
        ("UNAVAILABLE 503 RESOURCE_EXHAUSTED 429 502", "", millibert.Unavailable),
        ("DEADLINE_EXCEEDED 504 408", "", millibert.Timeout),
        ("INTERNAL 500 UNKNOWN DATA_LOSS 301", "", millibert.ServerFault),
        ("RESOURCE_EXHAUSTED", "Received message larger than max (5 vs. 4)", millibert.InvalidRequest),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'x'", millibert.InvalidRequest),
    ],
)
def test_error_of_a_status(statuses: str, reason: str, kind: type[Exception]) -> None:
    assert {error_class(status, reason) for status in statuses.split()} == {kind}


def test_plain_reason() -> None:
    assert plain_reason("[request id: <id_unknown>] too many") == "too many"
    assert plain_reason("RuntimeError: boom\n\nAt:\n  model.py(3): execute\n") == "RuntimeError: boom"


# Addresses and constructors


@pytest.mark.parametrize(
    ("url", "address", "netloc"),
    [
        ("grpc://127.0.0.1:9001", Address("grpc", "127.0.0.1", 9001), "127.0.0.1:9001"),
        ("grpc://triton", Address("grpc", "triton", 8001), "triton:8001"),
        ("http://triton/", Address("http", "triton", 8000), "triton:8000"),
        ("http://[::1]:80", Address("http", "::1", 80), "[::1]:80"),
    ],
)
def test_address(url: str, address: Address, netloc: str) -> None:
    assert parse_address(url) == address
    assert address.netloc == netloc
    assert isinstance(millibert.connect(url, "m"), millibert.GrpcClient if url[0] == "g" else millibert.HttpClient)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("127.0.0.1:8001", "scheme is missing"),
        ("localhost:8001", "scheme is missing"),
        ("", "scheme is missing"),
        ("ftp://host", "scheme 'ftp' is unknown"),
        ("grpc://", "host is missing"),
        ("grpc://host:port", "port"),
        ("http://host:99999", "[Pp]ort"),
        ("http://host/path", "more than a host and a port"),
        ("http://user:secret@host", "more than a host and a port"),
    ],
)
def test_address_refused(url: str, reason: str) -> None:
    with pytest.raises(millibert.UsageError, match=reason):
        millibert.connect(url, "m")


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(millibert.UsageError, match=r"grpc://host:8001 or http://host:8000"):
        millibert.connect("tcp://host:1", "m")


@pytest.mark.parametrize("arguments", [("",), ("a\nb",), ("m", 0), ("m", -1.0), ("m", float("nan")), ("m", True)])
def test_constructor_refuses(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(millibert.UsageError):
        millibert.connect("grpc://host", *arguments)


def test_a_client_refuses_the_other_scheme() -> None:
    with pytest.raises(millibert.UsageError, match="GrpcClient needs a url with grpc://"):
        millibert.GrpcClient("http://host", "m")


# Failures, over real sockets


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where connections are accepted and nothing is ever answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_connection_refused(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with millibert.connect(f"{scheme}://127.0.0.1:{port}", "m") as client:
        with pytest.raises(millibert.Unavailable) as caught:
            client.classify("a")
        assert str(caught.value) == (
            f"cannot reach the server: Connection refused (model 'm' at {scheme}://127.0.0.1:{port})"
        )
        assert client.ready() is False


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unknown_host(scheme: str) -> None:
    with (
        millibert.connect(f"{scheme}://host.invalid", "m", timeout=5) as client,
        pytest.raises((millibert.Unavailable, millibert.Timeout), match=r"host\.invalid"),
    ):
        client.classify("a")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_deadline(scheme: str, silent_port: int) -> None:
    with millibert.connect(f"{scheme}://127.0.0.1:{silent_port}", "m", timeout=30) as client:
        start = time.monotonic()
        with pytest.raises(millibert.Timeout, match=r"no answer within 0\.3 s"):
            client.classify("a", timeout=0.3)
        assert client.ready(timeout=0.3) is False
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_wrong_use(scheme: str) -> None:
    client = millibert.connect(f"{scheme}://127.0.0.1:1", "m")
    with pytest.raises(millibert.InvalidRequest, match=f"list is empty .*at {scheme}://127.0.0.1:1"):
        client.classify([])
    with pytest.raises(millibert.InvalidRequest, match="timeout must be a positive number"):
        client.classify("a", timeout=0)
    client.close()
    client.close()
    with pytest.raises(millibert.InvalidRequest, match="this client is closed"):
        client.classify("a")


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


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        (ok(b"<h1>oh</h1>", b"502 Bad Gateway"), millibert.Unavailable, "HTTP status 502: <h1>oh</h1>"),
        (ok(b"", b"404 Not Found"), millibert.NotFound, "HTTP status 404"),
        (ok(b"", b"301 Moved Permanently"), millibert.ServerFault, "HTTP status 301"),
        (ok(b"ok"), millibert.ServerFault, "not an inference response"),
        (ok(b"[]"), millibert.ServerFault, "not an inference response"),
        (ok(b"{}"), millibert.ServerFault, "LABEL is missing"),
        (ok(b"{}")[:-1], millibert.ServerFault, "breaks off"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", millibert.ServerFault, "is not HTTP"),
        (b"", millibert.Unavailable, "closed the connection without an answer"),
    ],
)
def test_http_answers_that_are_not_tritons(answer: bytes, kind: type[Exception], reason: str) -> None:
    with (
        http_server(answer) as url,
        millibert.connect(url, "m", timeout=5) as client,
        pytest.raises(kind, match=reason),
    ):
        client.classify("a")


def test_http_survives_a_connection_that_went_stale() -> None:
    # Each answer is followed by a hang-up, which the client notices only at its next request.
    with http_server(*[ok(b"")] * 4) as url, millibert.connect(url, "m", timeout=5) as client:
        assert [client.ready(), client.ready()] == [True, True]


def test_http_deadline_of_an_answer_that_trickles_in() -> None:
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
        with millibert.connect(url, "m") as client, pytest.raises(millibert.Timeout, match=r"within 0\.5 s"):
            client.classify("a", timeout=0.5)
        thread.join(5)


# Against a real Triton


@pytest.fixture(scope="module")
def server(triton: Callable[..., AbstractContextManager[RunningServer]]) -> Iterator[RunningServer]:
    with triton(REPOSITORY) as running:
        yield running


@pytest.fixture(params=SCHEMES)
def client(request: pytest.FixtureRequest, server: RunningServer) -> Iterator[millibert.Client]:
    url = server.grpc_url if request.param == "grpc" else server.http_url
    with millibert.connect(url, MODEL) as connected:
        yield connected


@pytest.mark.e2e
def test_classify(client: millibert.Client) -> None:
    assert client.ready()
    assert client.max_batch_size() == 8
    assert client.labels() == ("greeting", "nap", "other", "größe")
    one = client.classify("hello you")
    assert str(one) == "greeting 0.800, nap 0.100, other 0.060"
    assert one.text == "hello you"
    assert client.classify(["hello you"]) == (one,)
    several = client.classify(("sleep 0", "", "größe"), top_k=4)
    assert [answer.label for answer in several] == ["nap", "other", "other"]
    assert [len(answer.predictions) for answer in several] == [4, 4, 4]
    assert several[0].predictions[3] == millibert.Prediction("größe", 3, float(np.float32(0.04)), False)


@pytest.mark.e2e
def test_long_texts(client: millibert.Client) -> None:
    # 8 MB in a request; gRPC's own limit is 4.
    answers = client.classify(["ü" * 500_000] * 8, timeout=60)
    assert [answer.truncated for answer in answers] == [True] * 8
    assert not client.classify("ü" * 10_000).truncated


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("texts", "top_k", "kind", "reason"),
    [
        ("a", 5, millibert.InvalidRequest, "top_k must be 1 to 4, not 5 "),
        (["a"] * 9, None, millibert.InvalidRequest, "batch-size must be <= 8"),
        ("busy", None, millibert.Unavailable, "the queue is full "),
        ("crash", None, millibert.ServerFault, r"boom \(model 'echo' at "),
    ],
)
def test_refusals_and_failures(
    client: millibert.Client, texts: Any, top_k: int | None, kind: type[Exception], reason: str
) -> None:
    with pytest.raises(kind, match=reason):
        client.classify(texts, top_k)
    assert client.classify("hello").label == "greeting"


@pytest.mark.e2e
def test_a_late_answer_spoils_nothing(client: millibert.Client) -> None:
    with pytest.raises(millibert.Timeout, match=r"no answer within 0\.2 s"):
        client.classify("sleep 0.6", timeout=0.2)
    assert client.classify("hello").label == "greeting"


@pytest.mark.e2e
def test_unknown_model(client: millibert.Client) -> None:
    with millibert.connect(str(client.address), "nobody") as other:
        assert not other.ready()
        for call in (lambda: other.classify("a"), other.max_batch_size):
            with pytest.raises(millibert.NotFound, match=r"unknown model.*\(model 'nobody' at "):
                call()


@pytest.mark.e2e
def test_many_threads_share_a_client(client: millibert.Client) -> None:
    texts = ["hello" if number % 2 else "other" for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client.classify, texts))
    assert [answer.label for answer in answers] == [{"hello": "greeting"}.get(text, text) for text in texts]


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["http_proxy", "grpc_proxy"])
def test_this_machine_is_reached_past_a_proxy(
    client: millibert.Client, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    with millibert.connect(str(client.address), MODEL) as behind_proxy:
        assert behind_proxy.classify("hello").label == "greeting"


@pytest.mark.e2e
def test_the_wrong_port(server: RunningServer) -> None:
    crossed = [server.http_url.replace("http", "grpc"), server.grpc_url.replace("grpc", "http")]
    for url in crossed:
        with millibert.connect(url, MODEL) as wrong, pytest.raises(millibert.ServiceError, match="port"):
            wrong.classify("a")

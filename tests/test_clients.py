"""The four clients against a real Triton: what they answer and refuse."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from tests.clients import FORMS, open_client, protocol
from tests.conftest import CLIENT_REPOSITORY, RunningServer

import millibert

MODEL = "echo"
LIMIT = 8  # texts a request


@pytest.fixture(scope="module")
def server(triton: Callable[..., AbstractContextManager[RunningServer]]) -> Iterator[RunningServer]:
    # Triton waits for a request whose caller hung up (one test does) for as long as it may.
    with triton(CLIENT_REPOSITORY, "--drain-seconds", "3") as running:
        yield running


def url_of(server: RunningServer, form: str) -> str:
    return server.grpc_url if protocol(form) == "grpc" else server.http_url


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(form: str, server: RunningServer) -> Iterator[Any]:
    with open_client(form, url_of(server, form)) as connected:
        yield connected


def counted_since(client: Any, before: dict[str, Any], model: str, requests: int) -> Any:
    """Triton counts a request after it has sent the answer, so the caller may be there first."""
    end = time.monotonic() + 5
    while (counted := client.statistics()[model] - before[model]).requests < requests and time.monotonic() < end:
        time.sleep(0.01)
    return counted


@pytest.mark.e2e
def test_classify(client: Any) -> None:
    assert client.ready()
    client.wait_until_ready(5)
    one = client.classify("hello you")
    assert str(one) == "greeting 0.800, nap 0.100, other 0.060"
    assert one.text == "hello you"
    assert client.classify(["hello you"]) == (one,)
    several = client.classify(("sleep 0", "", "größe"), top_k=4)
    assert [answer.label for answer in several] == ["nap", "other", "other"]
    assert [len(answer.predictions) for answer in several] == [4, 4, 4]
    assert several[0].predictions[3] == millibert.Prediction("größe", 3, float(np.float32(0.04)), False)
    assert one.accepted == ("greeting",)
    assert client.classify("hello", threshold=0.1).accepted == ("greeting", "nap")


@pytest.mark.e2e
def test_what_the_server_says_of_itself(client: Any) -> None:
    assert client.max_batch_size() == LIMIT
    assert client.labels() == ("greeting", "nap", "other", "größe")
    assert client.steps() == ("worker",)
    assert client.configuration()["platform"] == "ensemble"
    assert client.configuration("worker")["backend"] == "python"
    assert client.models() == tuple(millibert.ModelState(name, "1", "READY", "") for name in ("echo", "worker"))
    assert (client.server().name, client.server().version[:2]) == ("triton", "2.")
    before = client.statistics()
    client.classify(["a", "b"])
    for name in ("echo", "worker"):
        counted = counted_since(client, before, name, requests=1)
        assert (counted.requests, counted.texts, counted.failures) == (1, 2, 0)


@pytest.mark.e2e
def test_more_texts_than_a_request_may_hold_are_split(client: Any, server: RunningServer) -> None:
    texts = [f"{'hello' if number % 3 else 'sleep 0'} {number}" for number in range(4 * LIMIT + 3)]
    for _ in range(2):
        before = client.statistics()
        answers = client.classify(texts)
        assert [answer.text for answer in answers] == texts
        assert [answer.label for answer in answers] == ["greeting" if number % 3 else "nap" for number in range(35)]
        assert counted_since(client, before, "worker", requests=5).requests == 5


@pytest.mark.e2e
def test_long_texts(client: Any) -> None:
    # 8 MB in a request; gRPC's own limit is 4.
    answers = client.classify(["ü" * 500_000] * 8, timeout=60)
    assert [answer.truncated for answer in answers] == [True] * 8
    assert not client.classify("ü" * 10_000).truncated


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("texts", "top_k", "kind", "reason"),
    [
        ("a", 5, millibert.InvalidRequest, "top_k must be 1 to 4, not 5 "),
        ("busy", None, millibert.Busy, "the queue is full .*; send less, or try again later"),
        ("crash", None, millibert.ServerFault, r"boom \(model 'echo' at .*, request .*\); the server's log"),
        ([], None, millibert.InvalidRequest, "the list is empty"),
        (["a", 3], None, millibert.InvalidRequest, "text 1 is not a str but int"),
    ],
)
def test_refusals_and_failures(client: Any, texts: Any, top_k: int | None, kind: type[Exception], reason: str) -> None:
    with pytest.raises(kind, match=reason) as caught:
        client.classify(texts, top_k, request_id="mine-7")
    assert isinstance(caught.value, millibert.ServiceError)
    assert (caught.value.request_id, caught.value.model) == ("mine-7", MODEL)
    assert client.classify("hello").label == "greeting"


@pytest.mark.e2e
def test_wrong_timeouts_and_a_closed_client(form: str, server: RunningServer) -> None:
    with open_client(form, url_of(server, form)) as client:
        for timeout in (0, -1, float("nan"), True, "1", 1e9):
            with pytest.raises(millibert.InvalidRequest, match="timeout must be a positive number"):
                client.classify("a", timeout=timeout)
        client.close()
        with pytest.raises(millibert.InvalidRequest, match="this client is closed"):
            client.classify("a")
        with pytest.raises(millibert.InvalidRequest, match="this client is closed"):
            client.ready()


@pytest.mark.e2e
def test_a_late_answer_spoils_nothing(client: Any) -> None:
    with pytest.raises(millibert.Timeout, match=r"no answer within 0\.2 s"):
        client.classify("sleep 0.6", timeout=0.2)
    assert client.classify("hello").label == "greeting"


@pytest.mark.e2e
def test_unknown_model(form: str, server: RunningServer) -> None:
    with open_client(form, url_of(server, form), "nobody") as other:
        assert not other.ready()
        with pytest.raises(millibert.Timeout, match=r"not ready within 0\.5 s"):
            other.wait_until_ready(0.5)
        for call in (lambda: other.classify("a"), other.max_batch_size, other.labels):
            with pytest.raises(millibert.NotFound, match=r"unknown model.*\(model 'nobody' at "):
                call()


@pytest.mark.e2e
def test_the_facade(server: RunningServer) -> None:
    with millibert.IntentClassifier(server.grpc_url, MODEL, timeout=5) as intents:
        assert [str(each) for each in intents.classify_intent("hello")] == [
            "greeting 0.800",
            "nap 0.100",
            "other 0.060",
        ]
        assert len(intents.classify_intent("hello", 1)) == 1


@pytest.mark.e2e
def test_the_hook_is_told_of_every_call(form: str, server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[millibert.Call] = []
    with open_client(form, url_of(server, form), on_call=calls.append) as client:
        client.classify(["hello", "secret text"], request_id="r-1")
        with pytest.raises(millibert.Busy):
            client.classify("busy")
        client.ready()
    first, second, third = calls
    assert (first.method, first.model, first.request_id, first.texts) == ("classify", MODEL, "r-1", 2)
    assert (first.endpoint, first.attempts, first.outcome, first.error) == (url_of(server, form), 1, "answered", None)
    assert 0 < first.seconds < 10
    assert (second.outcome, type(second.error), second.request_id != "r-1") == ("Busy", millibert.Busy, True)
    assert (third.method, third.outcome) == ("ready", "answered")
    assert "secret text" not in repr(calls)
    with open_client(form, url_of(server, form), on_call=lambda call: 1 / 0) as client:
        assert client.classify("hello").label == "greeting", "a hook that fails fails no call"
    assert "the on_call hook failed" in caplog.text
    assert "secret text" not in caplog.text


@pytest.mark.e2e
def test_many_threads_share_a_client(server: RunningServer) -> None:
    texts = ["hello" if number % 2 else "other" for number in range(200)]
    for url in (server.grpc_url, server.http_url):
        with millibert.connect(url, MODEL) as client, ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(client.classify, texts))
        assert [answer.label for answer in answers] == [{"hello": "greeting"}.get(text, text) for text in texts]


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["http_proxy", "grpc_proxy"])
def test_this_machine_is_reached_past_a_proxy(
    form: str, server: RunningServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    with open_client(form, url_of(server, form)) as behind_proxy:
        assert behind_proxy.classify("hello").label == "greeting"


@pytest.mark.e2e
def test_the_wrong_port(form: str, server: RunningServer) -> None:
    crossed = server.http_url.replace("http", "grpc"), server.grpc_url.replace("grpc", "http")
    with (
        open_client(form, crossed[protocol(form) == "http"]) as wrong,
        pytest.raises(millibert.ServiceError, match="port"),
    ):
        wrong.classify("a")


# Many texts


@pytest.mark.e2e
def test_many_texts_in_order_with_failures_in_their_places(client: Any) -> None:
    texts: list[Any] = [f"{('hello', 'sleep 0', 'x')[number % 3]} {number}" for number in range(500)]
    texts[7], texts[8], texts[123], texts[124] = "crash", 9, "crash", "\ud800"
    answers = list(client.classify_many(iter(texts), concurrency=3))
    assert [answer.text for answer in answers] == texts
    failed = {number: answer for number, answer in enumerate(answers) if isinstance(answer, millibert.Failure)}
    assert sorted(failed) == [7, 8, 123, 124]
    assert [type(failed[number].error).__name__ for number in (7, 8, 124)] == [
        "ServerFault",
        "InvalidRequest",
        "InvalidRequest",
    ]
    assert "boom" in str(failed[7])
    assert "not a str but int" in str(failed[8])
    good = [answer for number, answer in enumerate(answers) if number not in failed]
    assert {answer.label for answer in good} == {"greeting", "nap", "other"}


@pytest.mark.e2e
def test_what_is_wrong_with_every_text_is_raised_and_not_tried_on_all(client: Any) -> None:
    before = client.statistics()["worker"].failures
    with pytest.raises(millibert.InvalidRequest, match="top_k must be 1 to 4"):
        list(client.classify_many((f"x {number}" for number in range(1000)), top_k=9, concurrency=1))
    assert client.statistics()["worker"].failures - before <= 8
    for wrong in ({"batch_size": 0}, {"concurrency": 1.5}):
        with pytest.raises(millibert.UsageError, match="must be an integer of at least 1"):
            list(client.classify_many(["a"], **wrong))


@pytest.mark.e2e
def test_many_texts_are_taken_as_they_are_needed(client: Any) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "hello"

    answers = client.classify_many(endless(), concurrency=2, batch_size=4)
    for _ in range(100):
        next(answers)
    assert taken <= 100 + 4 * (2 * 2 + 1)
    (getattr(answers, "close", None) or answers.aclose)()


@pytest.mark.e2e
def test_what_came_before_a_failing_source_is_answered(client: Any) -> None:
    def source() -> Iterator[str]:
        yield from (f"hello {number}" for number in range(21))
        raise OSError("the disk is gone")

    found: list[str] = []

    def collect() -> None:
        found.extend(answer.text for answer in client.classify_many(source(), batch_size=4))

    with pytest.raises(OSError, match="the disk is gone"):
        collect()
    assert found == [f"hello {number}" for number in range(21)]


@pytest.mark.e2e
def test_closing_ends_the_calls_of_other_threads(server: RunningServer) -> None:
    for url in (server.grpc_url, server.http_url):
        client = millibert.connect(url, MODEL)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(client.classify, "sleep 3")
            time.sleep(0.3)
            start = time.monotonic()
            client.close()
            with pytest.raises(millibert.InvalidRequest, match="this client is closed"):
                slow.result()
            assert time.monotonic() - start < 2


@pytest.mark.e2e
def test_many_texts_from_an_asynchronous_source(server: RunningServer) -> None:
    async def source() -> Any:
        for number in range(50):
            await asyncio.sleep(0)
            yield f"hello {number}"

    async def main() -> list[Any]:
        async with millibert.connect_async(server.grpc_url, MODEL) as client:
            return [answer async for answer in client.classify_many(source(), batch_size=7)]

    assert [answer.text for answer in asyncio.run(main())] == [f"hello {number}" for number in range(50)]

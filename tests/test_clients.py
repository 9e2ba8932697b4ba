"""The four clients against a real Triton: what they answer, refuse and leave behind."""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.clients import FORMS, open_client, protocol

import millibert

if TYPE_CHECKING:
    from tests.conftest import RunningServer

REPOSITORY = Path(__file__).parent / "client_repository"
MODEL = "echo"
LIMIT = 8  # texts a request
SHARED_MEMORY = Path("/dev/shm")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


# The package


def test_exported_names() -> None:
    assert set(millibert.__all__) == {
        "AsyncClient", "AsyncGrpcClient", "AsyncHttpClient", "Busy", "Call", "Classification", "Client", "Counters",
        "Failure", "GrpcClient", "HttpClient", "IntentClassifier", "InvalidRequest", "MillibertError", "ModelState",
        "NotFound", "Prediction", "Retry", "ServerFault", "ServerInfo", "ServiceError", "TLS", "Timeout",
        "Unavailable", "UsageError", "connect", "connect_async",
    }  # fmt: skip
    assert all(getattr(millibert, name).__name__ == name for name in millibert.__all__)
    assert set(millibert.__all__) <= set(dir(millibert))
    with pytest.raises(AttributeError, match="'millibert' has no attribute 'Nothing'"):
        _ = millibert.Nothing


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import millibert", ["grpc", "gevent", "aiohttp", "tritonclient"]),
        ("from millibert import HttpClient", ["grpc"]),
        ("from millibert import AsyncHttpClient", ["grpc"]),
        ("from millibert import GrpcClient", ["gevent", "aiohttp"]),
        ("from millibert import AsyncGrpcClient", ["gevent", "aiohttp"]),
        ("import millibert; millibert.connect('http://a', 'm')", ["grpc"]),
        ("import millibert; millibert.connect_async('grpc://a', 'm')", ["gevent", "aiohttp"]),
    ],
)
def test_light_import(statement: str, absent: list[str]) -> None:
    absent = [*absent, "torch", "transformers", "opentelemetry"]
    loaded = python(f"import sys; {statement}; print(*(name for name in {absent} if name in sys.modules))")
    assert loaded.split() == []


@pytest.mark.parametrize(("absent", "url"), [("grpc", "http://a"), ("geventhttpclient", "grpc://a")])
def test_each_protocol_without_the_other_installed(absent: str, url: str) -> None:
    # None in sys.modules makes an import fail as that of a package that is not installed.
    print(python(f"import sys; sys.modules[{absent!r}] = None; import millibert; millibert.connect({url!r}, 'm')"))


def test_the_base_install_is_what_the_protocols_need() -> None:
    base = [each for each in importlib.metadata.requires("millibert") or [] if "extra ==" not in each]
    assert sorted(re.split(r"[^\w-]", each)[0] for each in base) == ["numpy", "tqdm", "tritonclient"]
    assert any(each.startswith("tritonclient[grpc,http]") for each in base)


def test_errors_survive_pickling() -> None:
    error = millibert.NotFound("no such model", endpoint="grpc://a:1", model="m", request_id="r-1", attempts=2)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is millibert.NotFound
    assert str(again) == str(error)
    assert str(error).startswith("no such model (model 'm' at grpc://a:1, request r-1, 2 attempts); `millibert status`")
    assert (again.reason, again.endpoint, again.model) == ("no such model", "grpc://a:1", "m")
    assert (again.request_id, again.attempts) == ("r-1", 2)


# Against a real Triton


@pytest.fixture(scope="module")
def server(triton: Callable[..., AbstractContextManager[RunningServer]]) -> Iterator[RunningServer]:
    with triton(REPOSITORY) as running:
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
    assert client.models() == tuple(millibert.ModelState(name, "1", "READY", "") for name in ("echo", "worker"))
    assert (client.server().name, client.server().version[:2]) == ("triton", "2.")
    before = client.statistics()
    client.classify(["a", "b"])
    counted = {name: counters - before[name] for name, counters in client.statistics().items()}
    for name in ("echo", "worker"):
        assert (counted[name].requests, counted[name].texts, counted[name].failures) == (1, 2, 0)


@pytest.mark.e2e
def test_more_texts_than_a_request_may_hold_are_split(client: Any, server: RunningServer) -> None:
    texts = [f"{'hello' if number % 3 else 'sleep 0'} {number}" for number in range(4 * LIMIT + 3)]
    for _ in range(2):
        before = client.statistics()["worker"].requests
        answers = client.classify(texts)
        assert [answer.text for answer in answers] == texts
        assert [answer.label for answer in answers] == ["greeting" if number % 3 else "nap" for number in range(35)]
        assert client.statistics()["worker"].requests - before == 5


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


# Event loops and processes


@pytest.mark.e2e
def test_a_client_serves_one_event_loop_after_another(server: RunningServer) -> None:
    for url in (server.grpc_url, server.http_url):
        client = millibert.connect_async(url, MODEL)
        for _ in range(3):
            assert asyncio.run(client.classify("hello")).label == "greeting"
        asyncio.run(client.close())
    gc.collect()  # the connections of a loop that is over go with it


FORKED = """
import os, sys, asyncio, threading
import millibert
urls = sys.argv[1:]
clients = [millibert.connect(url, "echo", timeout=5) for url in urls]
asynchronous = millibert.connect_async(urls[1], "echo", timeout=5)

def check(who):
    assert [client.classify("hello").label for client in clients] == ["greeting"] * 2, who
    assert asyncio.run(asynchronous.classify("hello")).label == "greeting", who
    print(who, flush=True)

stop = threading.Event()
def load():
    while not stop.is_set():
        for client in clients:
            client.classify("hello")
threads = [threading.Thread(target=load) for _ in range(3)]
check("parent")
for thread in threads: thread.start()
for number in range(3):
    if os.fork() == 0:
        check(f"child {number}")
        os._exit(0)
    _, status = os.wait()
    assert status == 0, status
check("parent again")
stop.set()
for thread in threads: thread.join()

grpc_with_asyncio = millibert.connect_async(urls[0], "echo", timeout=5)
asyncio.run(grpc_with_asyncio.classify("hello"))
if os.fork() == 0:
    assert clients[1].classify("hello").label == "greeting"
    for call in (lambda: clients[0].classify("hello"), lambda: asyncio.run(grpc_with_asyncio.classify("hello"))):
        try:
            call()
        except millibert.UsageError as error:
            print(str(error)[:42], flush=True)
    os._exit(0)
os.wait()
check("parent")
for client in clients: client.close()
"""


@pytest.mark.e2e
def test_a_forked_child_can_use_its_parents_clients(server: RunningServer) -> None:
    command = [sys.executable, "-c", FORKED, server.grpc_url, server.http_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = ["gRPC cannot be used in this process: it wa"] * 2
    assert done.stdout.splitlines() == ["parent", "child 0", "child 1", "child 2", "parent again", *told, "parent"]


# Shared memory


def regions(client: Any) -> list[str]:
    """What is registered at the server."""
    question = client.protocol.regions()
    if isinstance(client, millibert.Client):
        with client._asking("regions", 5) as asked:
            found: list[str] = client._run(client._ask(asked, question))
    else:
        with client.client._asking("regions", 5) as asked:
            found = client.runner.run(client.client._run(client.client._ask(asked, question)))
    return found


@pytest.mark.e2e
def test_large_requests_through_shared_memory(form: str, server: RunningServer) -> None:
    with open_client(form, url_of(server, form), shared_memory=True) as client:
        assert client.classify("hello").label == "greeting"
        assert regions(client) == [], "small requests go through the connection"
        for size in (20_000, 60_000, 20_000):
            answers = client.classify([f"{word} {'ü' * size}" for word in ("hello", "sleep 0", "x", "y")])
            assert [answer.label for answer in answers] == ["greeting", "nap", "other", "other"]
            assert [answer.truncated for answer in answers] == [True] * 4
        names = regions(client)
        assert len(names) == 2, "one for each size, used again"
        assert not [path for path in SHARED_MEMORY.iterdir() if path.name in names], "nothing to leave behind"
        with pytest.raises(millibert.ServerFault):
            client.classify(["crash", "x" * 100_000])
        assert client.classify(["x" * 100_000])[0].truncated
        assert list(client.classify_many(["x" * 50_000] * 40))[39].truncated
        with open_client(form, url_of(server, form)) as other:
            client.close()
            assert regions(other) == []


KILLED = """
import os, signal, sys, millibert
client = millibert.connect(sys.argv[1], "echo", shared_memory=True)
client.classify(["x" * 100_000])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.e2e
def test_what_a_killed_client_left_is_cleaned_up_by_the_next(form: str, server: RunningServer) -> None:
    url = url_of(server, form)
    killed = subprocess.run([sys.executable, "-c", KILLED, url], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not list(SHARED_MEMORY.glob("millibert-client-*"))
    with open_client(form, url, shared_memory=True) as client:
        (left,) = regions(client)
        client.classify(["x" * 100_000])
        assert left not in regions(client)
        assert len(regions(client)) == 1


# Nothing grows


def footprint() -> tuple[int, int, float]:
    """File descriptors, threads, and resident MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), threading.active_count(), pages * os.sysconf("SC_PAGESIZE") / 2**20


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_nothing_grows_over_a_hundred_thousand_calls(form: str, server: RunningServer) -> None:
    """25,000 with each of the four clients: half of them by several threads or tasks at once."""
    with open_client(form, url_of(server, form)) as client:
        call_many(client, 2_500)
        before = footprint()
        for _ in range(5):
            call_many(client, 5_000)
        after = footprint()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 1
    assert after[2] <= before[2] + 8, "MiB"


def call_many(client: Any, count: int) -> None:
    for _ in range(count // 2):
        assert client.classify("hello").label == "greeting"
    if isinstance(client, millibert.Client):
        with ThreadPoolExecutor(4) as pool:
            assert {answer.label for answer in pool.map(client.classify, ["hello"] * (count // 2))} == {"greeting"}
        return

    async def concurrently() -> None:
        async def some() -> None:
            for _ in range(count // 8):
                assert (await client.client.classify("hello")).label == "greeting"

        await asyncio.gather(*(some() for _ in range(4)))

    client.runner.run(concurrently())


@pytest.mark.e2e
def test_clients_that_come_and_go_leave_nothing(server: RunningServer) -> None:
    def come_and_go() -> None:
        for form in FORMS:
            with open_client(form, url_of(server, form)) as client:
                client.classify("hello")

    come_and_go()
    time.sleep(0.5)
    before = footprint()
    for _ in range(50):
        come_and_go()
    deadline = time.monotonic() + 10
    while footprint()[0] > before[0] + 2 and time.monotonic() < deadline:
        time.sleep(0.1)  # gRPC closes in the background
    after = footprint()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 1

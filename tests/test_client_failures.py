"""The clients when things go wrong: with servers of our own, and with a real Triton behind a proxy of ours."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.clients import FORMS, open_client, protocol
from tests.misbehaving import CUT, GOOD, HANG, RESET, Proxy, Recorder, Reply

import millibert
from millibert import Retry

if TYPE_CHECKING:
    from tests.conftest import RunningServer

ONCE = Retry(attempts=1)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def port(form: str, server: RunningServer) -> int:
    url = server.grpc_url if protocol(form) == "grpc" else server.http_url
    return int(url.rpartition(":")[2])


def url_of(form: str, *ports: int) -> str:
    return f"{protocol(form)}://{','.join(f'127.0.0.1:{port}' for port in ports)}"


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


# Nobody there


def test_connection_refused(form: str) -> None:
    url = url_of(form, unused_port())
    with open_client(form, url, "m") as client:
        start = time.monotonic()
        with pytest.raises(millibert.Unavailable) as caught:
            client.classify("a", request_id="r-1")
        assert time.monotonic() - start < 8
        assert str(caught.value) == (
            f"cannot reach the server: Connection refused (model 'm' at {url}, request r-1, 4 attempts); "
            "`millibert status` asks whether it is up and ready"
        )
        assert client.ready() is False


def test_unknown_host(form: str) -> None:
    for scheme in (protocol(form), f"{protocol(form)}+dns"):
        with (
            open_client(form, f"{scheme}://host.invalid", "m", timeout=5) as client,
            pytest.raises((millibert.Unavailable, millibert.Timeout), match=r"host\.invalid"),
        ):
            client.classify("a")


def test_deadline(form: str) -> None:
    with Proxy(0, last=HANG) as silent, open_client(form, url_of(form, silent.port), "m", timeout=30) as client:
        start = time.monotonic()
        with pytest.raises(millibert.Timeout, match=r"no answer within 0\.3 s"):
            client.classify("a", timeout=0.3)
        assert client.ready(timeout=0.3) is False
        assert time.monotonic() - start < 10


@pytest.mark.e2e
def test_the_deadline_counts_over_all_attempts(form: str) -> None:
    retry = Retry(attempts=1000, pause_seconds=0.1, longest_pause_seconds=0.2, budget=1000)
    with open_client(form, url_of(form, unused_port()), "m", retry=retry) as client:
        start = time.monotonic()
        with pytest.raises(millibert.Unavailable) as caught:
            client.classify("a", timeout=1)
        assert 0.5 < time.monotonic() - start < 4
        assert caught.value.attempts > 3


def test_waiting_for_a_server_ends_in_time(form: str) -> None:
    with open_client(form, url_of(form, unused_port()), "m") as client:
        for seconds in (0.001, 0.2, 0.21, 0.41):
            with pytest.raises(millibert.Timeout, match=rf"not ready within {seconds} s"):
                client.wait_until_ready(seconds)


# A connection that breaks


@pytest.mark.e2e
@pytest.mark.parametrize("modes", [(RESET, RESET), (CUT,), (CUT, RESET)])
def test_a_lost_connection_is_made_up_for(form: str, port: int, modes: tuple[str, ...]) -> None:
    calls: list[millibert.Call] = []
    with Proxy(port, *modes) as proxy, open_client(form, url_of(form, proxy.port), on_call=calls.append) as client:
        assert client.classify("hello").label == "greeting"
        assert calls[0].attempts == 1 + len(modes)
        assert proxy.connections >= 1 + len(modes)


@pytest.mark.e2e
def test_an_error_says_what_became_of_the_connection(form: str, port: int) -> None:
    with Proxy(port, CUT) as proxy, open_client(form, url_of(form, proxy.port), retry=ONCE) as client:
        with pytest.raises(millibert.Unavailable, match=r"breaks off|connection was lost"):
            client.classify("hello")
        assert client.classify("hello").label == "greeting"


@pytest.mark.e2e
def test_a_server_that_comes_back_is_found_again(form: str, port: int) -> None:
    proxy = Proxy(port)
    with open_client(form, url_of(form, proxy.port)) as client:
        assert client.classify("hello").label == "greeting"
        proxy.close()
        with pytest.raises(millibert.Unavailable):
            client.classify("hello")
        with Proxy(port, port=proxy.port):
            client.wait_until_ready(10)
            assert client.classify("hello").label == "greeting"


@pytest.mark.e2e
def test_many_texts_outlast_an_outage(form: str, port: int) -> None:
    proxy = Proxy(port)
    texts = [f"hello {number}" for number in range(400)]
    with open_client(form, url_of(form, proxy.port), retry=Retry(budget=1000)) as client:
        answers = client.classify_many(texts, batch_size=2, concurrency=2)
        found = [next(answers) for _ in range(50)]
        proxy.close()
        back: list[Proxy] = []
        timer = threading.Timer(2.0, lambda: back.append(Proxy(port, port=proxy.port)))
        timer.start()
        found += answers
        timer.join()
        assert [answer.text for answer in found] == texts
        back[0].close()
        with pytest.raises(millibert.Unavailable):
            list(client.classify_many(texts, batch_size=2, patience=0.3))


# What a server says


@pytest.mark.parametrize(
    ("reply", "kind", "reason"),
    [
        (Reply("UNAVAILABLE", "in ensemble 'm', busy: no engine free in time"), millibert.Busy, "busy: no engine"),
        (Reply("UNAVAILABLE", "going away"), millibert.Unavailable, "going away"),
        (Reply("INTERNAL", "Stub process 'm_0' is not healthy."), millibert.Unavailable, "is not healthy"),
        (Reply("INTERNAL", "boom"), millibert.ServerFault, "boom"),
        (Reply("NOT_FOUND", "Request for unknown model: 'm'"), millibert.NotFound, "unknown model"),
        (Reply("INVALID_ARGUMENT", "no"), millibert.InvalidRequest, "no"),
        (Reply(without="LABEL"), millibert.ServerFault, "breaks the contract: the output LABEL is missing"),
        (Reply(without="TRUNCATED"), millibert.ServerFault, "breaks the contract: the output TRUNCATED is missing"),
        (Reply(id="another"), millibert.ServerFault, "breaks the contract: it is for the request 'another'"),
        (Reply(body=b"\xff\xfe"), millibert.ServerFault, "(?i)response"),
        (Reply(body=b""), millibert.ServerFault, "breaks the contract"),
    ],
)
def test_replies(form: str, reply: Reply, kind: type[Exception], reason: str) -> None:
    with Recorder(protocol(form), reply).serve() as server, open_client(form, server.url, "m", retry=ONCE) as client:
        with pytest.raises(kind, match=reason) as caught:
            client.classify("secret text")
        assert "secret text" not in f"{caught.value} {caught.value!r}"
        assert client.classify("a").label == "greeting"
        assert len(server.asked) == 2


def test_what_is_repeated_and_what_is_not(form: str) -> None:
    unavailable, busy, broken = Reply("UNAVAILABLE", "going away"), Reply("UNAVAILABLE", "busy: x"), Reply("INTERNAL")
    replies = unavailable, unavailable, GOOD, busy, broken
    with Recorder(protocol(form), *replies).serve() as server, open_client(form, server.url, "m") as client:
        assert client.classify("a").label == "greeting"
        assert len(server.asked) == 3
        assert len({asked.id for asked in server.asked}) == 1, "the same request"
        limits = [asked.parameters["queue_timeout_ms"] for asked in server.asked]
        assert 9_000 < limits[2] <= limits[1] <= limits[0] <= 10_000, "the server is told how long it is worth it"
        for kind in (millibert.Busy, millibert.ServerFault):
            with pytest.raises(kind):
                client.classify("a")
        assert len(server.asked) == 5, "asked once each"


def test_the_budget_keeps_an_outage_from_growing(form: str) -> None:
    with (
        Recorder(protocol(form), *[Reply("UNAVAILABLE", "away")] * 200).serve() as server,
        open_client(form, server.url, "m", retry=Retry(pause_seconds=0, budget=10)) as client,
    ):
        for _ in range(50):
            with pytest.raises(millibert.Unavailable):
                client.classify("a")
        assert len(server.asked) == 50 + 10


def test_a_busy_server_is_left_for_another(form: str) -> None:
    with (
        Recorder(protocol(form), *[Reply("UNAVAILABLE", "busy: x")] * 50).serve() as busy,
        Recorder(protocol(form)).serve() as free,
        open_client(form, [busy.url, free.url], "m") as client,
    ):
        assert {client.classify("a").label for _ in range(20)} == {"greeting"}
        assert len(busy.asked) == 10, "and asked again in its turn"
        assert len(free.asked) == 20


def test_a_cancelled_call_ends_at_the_server() -> None:
    release = threading.Event()

    async def main(server: Recorder) -> None:
        async with millibert.connect_async(server.url, "m", on_call=calls.append) as client:
            task = asyncio.create_task(client.classify("a"))
            while not server.asked:
                await asyncio.sleep(0.01)
            assert not server.ended.is_set()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.ended.wait, 10)

    def hold() -> None:
        release.wait(15)

    calls: list[millibert.Call] = []
    with Recorder("grpc", before=hold).serve() as server:
        asyncio.run(main(server))
        release.set()
    assert [call.outcome for call in calls] == ["cancelled"]


# Several endpoints


@pytest.mark.e2e
def test_endpoints_share_the_load(form: str, port: int) -> None:
    asked: list[str] = []
    with Proxy(port) as one, Proxy(port) as two:
        url = url_of(form, one.port, two.port)
        with open_client(form, url, on_call=lambda call: asked.append(call.endpoint)) as client:
            for _ in range(20):
                client.classify("hello")
    assert {endpoint: asked.count(endpoint) for endpoint in asked} == {
        url_of(form, each.port): 10 for each in (one, two)
    }


@pytest.mark.e2e
def test_a_dead_endpoint_is_left_out_and_taken_back(form: str, port: int) -> None:
    calls: list[millibert.Call] = []
    dead = Proxy(port)
    with Proxy(port) as alive, open_client(form, url_of(form, dead.port, alive.port), on_call=calls.append) as client:
        dead.close()
        for _ in range(100):
            client.classify("hello")
        assert sum(call.attempts for call in calls) <= 106
        with Proxy(port, port=dead.port) as again:
            back, deadline = url_of(form, again.port), time.monotonic() + 15
            while calls[-1].endpoint != back and time.monotonic() < deadline:
                client.classify("hello")
                time.sleep(0.02)
            calls.clear()
            for _ in range(20):
                client.classify("hello")
            assert [call.endpoint for call in calls].count(back) == 10


@pytest.mark.e2e
def test_an_endpoint_that_hangs_is_left_out(form: str, port: int) -> None:
    late = 0
    with Proxy(0, last=HANG) as hangs, open_client(form, url_of(form, hangs.port, port), timeout=1.0) as client:
        for _ in range(20):
            try:
                assert client.classify("hello").label == "greeting"
            except millibert.Timeout:
                late += 1
    assert 1 <= late <= 5


@pytest.mark.e2e
def test_all_addresses_of_a_name_are_used(form: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a headless Kubernetes service: pods come and go behind one name."""
    pods = ["127.0.0.1", "127.0.0.2"]
    look_up = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **named: Any) -> Any:
        if host != "millibert-headless":
            return look_up(host, *arguments, **named)
        return [found for pod in pods for found in look_up(pod, *arguments, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    asked: list[str] = []
    with Proxy(port) as one, Proxy(port, host="127.0.0.2", port=one.port) as two:
        url = f"{protocol(form)}+dns://millibert-headless:{one.port}"
        with open_client(form, url, on_call=lambda call: asked.append(call.endpoint)) as client:
            for _ in range(20):
                client.classify("hello")
            assert {each: asked.count(each) for each in asked} == {
                f"{protocol(form)}://{pod}:{one.port}": 10 for pod in pods
            }
            two.close()
            pods[:] = ["127.0.0.1", "127.0.0.3"]
            with Proxy(port, host="127.0.0.3", port=one.port) as three:
                deadline = time.monotonic() + 15
                while not three.connections and time.monotonic() < deadline:
                    client.classify("hello")
                    time.sleep(0.02)
                assert three.connections


def test_a_look_up_that_hangs_ends_with_the_deadline(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    with open_client(form, f"{protocol(form)}+dns://slow.test", "m") as client:
        start = time.monotonic()
        with pytest.raises(millibert.Timeout, match=r"no answer within 0\.3 s"):
            client.classify("a", timeout=0.3)
        assert time.monotonic() - start < 2

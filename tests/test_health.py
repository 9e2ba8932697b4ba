"""What probes are told: by a clock in the test's hand, by the canary, and over HTTP."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from millibert._errors import UsageError
from millibert_ensemble import canary
from millibert_ensemble.canary import Canary, through
from millibert_ensemble.health import LIVE_SECONDS, READY_SECONDS, Health, Outcome, Phase
from millibert_ensemble.health_server import HealthServer


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    made = Health(clock)
    made.enter(Phase.SERVING)
    return made


def test_it_is_not_ready_before_it_serves_and_when_it_stops_but_alive(health: Health) -> None:
    assert Health().unready() == "starting"
    assert Health().dead() is None
    assert health.unready() is None
    health.enter(Phase.STOPPING)
    assert health.unready() == "stopping"
    assert health.dead() is None


def test_a_death_is_known_at_once_and_over_when_it_serves_again(health: Health) -> None:
    health.died("bert")
    assert health.unready() == "starting"
    assert not health.serving
    assert health.dead() is None
    health.enter(Phase.SERVING)
    assert health.unready() is None


def test_a_failed_canary_makes_it_unready_and_the_next_good_one_ready(health: Health) -> None:
    health.heard(Outcome.FAILED, 0.1)
    assert "failed" in str(health.unready())
    assert health.dead() is None
    health.heard(Outcome.ANSWERED, 0.1)
    assert health.unready() is None


def test_busy_is_an_answer(health: Health, clock: Clock) -> None:
    for _ in range(100):
        clock.now += READY_SECONDS / 2
        health.heard(Outcome.BUSY, 1.0)
        assert health.unready() is None
        assert health.dead() is None


def test_silence_makes_it_unready_and_later_dead(health: Health, clock: Clock) -> None:
    clock.now += READY_SECONDS + 1
    health.heard(Outcome.LATE, READY_SECONDS)
    assert "no text has been answered for 21 s" in str(health.unready())
    assert health.dead() is None
    clock.now += LIVE_SECONDS
    health.heard(Outcome.LATE, READY_SECONDS)
    assert "no text has been answered for 81 s" in str(health.dead())


def test_nothing_but_failures_is_silence_too(health: Health, clock: Clock) -> None:
    for _ in range(7):
        clock.now += 10
        health.heard(Outcome.FAILED, 0.1)
    assert health.dead() is not None


def samples(text: str) -> dict[tuple[str, str], float]:
    found = [it for family in text_string_to_metric_families(text) for it in family.samples]
    return {(it.name, ",".join(it.labels.values())): it.value for it in found}


def test_over_http(health: Health) -> None:
    health.watch(["tokenizer", "bert"])
    with HealthServer(health, "127.0.0.1", 0) as server:
        assert get(server, "/ready") == (200, "ready\n")
        assert get(server, "/live") == (200, "alive\n")
        assert get(server, "/")[0] == 404
        health.heard(Outcome.ANSWERED, 0.25)
        health.died("bert")
        assert get(server, "/ready") == (503, "starting\n")
        found = samples(get(server, "/metrics")[1])
    assert found["millibert_server_ready", ""] == 0
    assert found["millibert_process_deaths_total", "bert"] == 1
    assert found["millibert_process_deaths_total", "tokenizer"] == 0
    assert {found["millibert_canary_total", outcome] for outcome in ("busy", "failed", "late")} == {0}
    assert found["millibert_canary_total", "answered"] == 1
    assert found["millibert_canary_seconds", ""] == 0.25


def test_whoever_connects_and_says_nothing_holds_nobody_up(health: Health) -> None:
    with HealthServer(health, "127.0.0.1", 0) as server, socket.create_connection(("127.0.0.1", server.port)):
        assert get(server, "/ready")[0] == 200


def test_a_taken_port_is_a_usage_error(health: Health) -> None:
    with HealthServer(health, "127.0.0.1", 0) as server, pytest.raises(UsageError, match="--health-port N"):
        HealthServer(health, "127.0.0.1", server.port)


def get(server: HealthServer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def answering() -> Iterator[Callable[..., int]]:
    """A function of HTTP statuses: a server that answers with them in turn, and its port."""
    servers = []

    def start(*statuses: int) -> int:
        left = iter(statuses)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(next(left))
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, Outcome.ANSWERED), (503, Outcome.BUSY), (500, Outcome.FAILED), (400, Outcome.FAILED)],
)
def test_what_triton_says_to_a_canary(answering: Callable[..., int], status: int, outcome: Outcome) -> None:
    assert through("127.0.0.1", answering(status), ["a"])() is outcome


def test_of_several_services_the_worst_counts(answering: Callable[..., int]) -> None:
    assert through("127.0.0.1", answering(200, 500, 503), ["a", "b", "c"])() is Outcome.FAILED


def test_a_refused_connection_is_a_failure_and_silence_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        monkeypatch.setattr(canary, "READY_SECONDS", 0.2)
        assert through("127.0.0.1", port, ["a"])() is Outcome.LATE
    assert through("127.0.0.1", port, ["a"])() is Outcome.FAILED


def test_canaries_are_sent_only_while_it_serves(health: Health) -> None:
    sent = threading.Semaphore(0)

    def send() -> Outcome:
        sent.release()
        return Outcome.FAILED

    with Canary(health, send, period=0.01):
        assert sent.acquire(timeout=10)
        health.enter(Phase.STOPPING)
        while sent.acquire(timeout=0.2):
            pass
        health.enter(Phase.SERVING)
        assert sent.acquire(timeout=10)


def test_what_was_sent_before_a_death_says_nothing_of_the_server_after_it(health: Health) -> None:
    sent, back = threading.Semaphore(0), threading.Semaphore(0)

    def send() -> Outcome:
        sent.release()
        assert back.acquire(timeout=10)
        return Outcome.FAILED

    with Canary(health, send, period=0.01):
        assert sent.acquire(timeout=10)
        health.died("bert")
        back.release()
        # The first one is back and forgotten once there could be a second.
        assert not sent.acquire(timeout=0.2)
        health.enter(Phase.SERVING)
        assert sent.acquire(timeout=10)
        assert health.unready() is None
        back.release()

"""Locust on our clients: the open loop, its shapes, and what becomes of requests that are not answered.

Locust changes the process that imports it, so it always runs in one of its own here.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import CLIENT_REPOSITORY, RunningServer
from tests.misbehaving import Proxy

from load.locust_run import LOCUSTFILE, LocustLoad, arguments, read_requests, run, send
from load.locust_shapes import SHAPES, Schedule, levels_of
from millibert._errors import MillibertError, UsageError

MODEL = "echo"
needs_locust = pytest.mark.skipif(find_spec("locust") is None, reason="Locust is not installed")

# A text is answered when it is asked for the first time, as a reference before the load does, and not again.
SECOND_TIME = """

_seen = set()
_first_response, _first_ranked = _response, _ranked


def _response(request):
    texts = [text.decode() for text in pb.get_input_tensor_by_name(request, "TEXT").as_numpy().ravel()]
    again = {text.split()[0] for text in texts if text in _seen}
    response = None
    if "tires" in again:
        response = _error("busy: no engine free in time", pb.TritonError.UNAVAILABLE)
    elif "breaks" in again:
        response = _error("boom", pb.TritonError.INTERNAL)
    elif "dawdles" in again:
        time.sleep(0.5)
    response = response or _first_response(request)
    _seen.update(texts)
    return response


def _ranked(text):
    return _first_ranked("hello" if text.startswith("flips") and text in _seen else text)
"""


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_as_long_as_asked_for_and_never_above_the_largest(shape: str) -> None:
    levels = levels_of(shape, 40.0)
    assert sum(level.seconds for level in levels) == pytest.approx(40)
    assert max(level.share for level in levels) == 1


def test_a_spike_comes_and_goes() -> None:
    before, spike, after = (level.share for level in levels_of("spike", 10.0))
    assert before == after < spike
    with pytest.raises(UsageError, match="there is no shape 'ramp'; there are steady, step, spike, soak"):
        levels_of("ramp", 1.0)


@pytest.mark.parametrize("poisson", [False, True])
def test_workers_share_a_schedule_exactly(poisson: bool) -> None:
    schedule = Schedule(levels_of("step", 10.0), 100.0, poisson)
    whole = list(schedule.share(0, 1, 1))
    shares = [list(schedule.share(first, own, 3)) for first, own in ((0, 1), (1, 2))]
    assert sorted(itertools.chain(*shares)) == whole
    assert len(shares[1]) == pytest.approx(2 * len(shares[0]), abs=2)
    assert schedule.seconds == 10
    if not poisson:
        # Five steps of 2 s at a fifth of the rate, two fifths, …
        assert [sum(2 * step <= due < 2 * step + 2 for due in whole) for step in range(5)] == [40, 80, 120, 160, 200]


def test_a_schedule_without_an_end_goes_on() -> None:
    even = list(itertools.islice(Schedule([], 7.0, False).share(0, 1, 1), 1000))
    assert np.diff(even) == pytest.approx(1 / 7)
    poisson = list(itertools.islice(Schedule([], 50.0, True).share(0, 1, 1), 4000))
    assert np.diff(poisson).min() >= 0
    # Gaps of a Poisson process are as different as they are long.
    assert np.std(np.diff(poisson)) == pytest.approx(1 / 50, rel=0.1)


def test_a_load_has_users_or_a_rate() -> None:
    for both in ({}, {"users": 1, "rate": 2.0}):
        with pytest.raises(UsageError, match=r"users .* or a rate"):
            LocustLoad("grpc://127.0.0.1:1", {MODEL: 1}, "texts.csv", 1.0, **both)  # type: ignore[arg-type]


def test_files_of_other_kinds_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "requests.1"
    path.write_text('{"format": "other"}\n')
    with pytest.raises(UsageError, match=r"holds no requests in the form millibert-locust-requests/1"):
        read_requests([path])
    with pytest.raises(MillibertError, match="Locust has sent nothing"):
        read_requests([])


@pytest.fixture(scope="module")
def server(
    triton: Callable[..., AbstractContextManager[RunningServer]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    repository = tmp_path_factory.mktemp("locust") / "repository"
    shutil.copytree(CLIENT_REPOSITORY, repository, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(repository / MODEL, repository / "second")
    model = repository / "worker" / "1" / "model.py"
    model.write_text(model.read_text() + SECOND_TIME)
    with triton(repository) as running:
        yield running


@pytest.fixture
def texts(tmp_path: Path) -> Callable[..., str]:
    """A function of texts that writes them and returns their file."""

    def write(*each: str) -> str:
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in each))
        return str(path)

    return write


@pytest.mark.e2e
@needs_locust
def test_an_open_loop_above_the_capacity_shows_the_queue_that_a_closed_one_hides(
    server: RunningServer, texts: Callable[..., str], tmp_path: Path
) -> None:
    # One at a time, each 20 ms: no machine answers more than 50 a second.
    source = texts("sleep 0.02")
    above = LocustLoad(server.grpc_url, {MODEL: 1}, source, 3.0, rate=100.0, timeout=60.0)
    sent = read_requests(send(above, tmp_path)).answers
    closed = run(LocustLoad(server.grpc_url, {MODEL: 1}, source, 2.0, users=2))
    # All were sent, and what was due at t had t × 100 × 20 ms of work before it, of which t were over.
    assert len(sent.due) == 300
    assert set(sent.outcome) == {"answered"}
    assert (sent.latency >= sent.due - 0.25).all()
    assert sent.latency[sent.due > 2.5].min() > 2.0
    assert closed.latency_ms is not None
    assert closed.latency_ms.p50 < 1000 * np.median(sent.latency) / 5
    assert (closed.counts.errors, closed.arrival.under_way) == (0, 2)


@pytest.mark.e2e
@needs_locust
@pytest.mark.parametrize("url", ["grpc_url", "http_url"])
def test_what_is_not_answered_is_counted_by_what_became_of_it(
    server: RunningServer, texts: Callable[..., str], url: str
) -> None:
    each = [f"{kind} {url}" for kind in ("hello", "flips", "tires", "breaks")]
    found = run(LocustLoad(getattr(server, url), {MODEL: 1}, texts(*each), 1.0, users=1))
    counts = found.counts
    assert counts.timed_out == 0
    # In turn, so that there are as many of each, but for the last round.
    shares = (counts.answered, counts.wrong, counts.refused, counts.failed)
    assert max(shares) - min(shares) <= 1 < min(shares)
    assert sorted(found.reasons, key=lambda reason: reason.split(":")[0]) == [
        "failed: in ensemble 'echo', boom",
        "refused: in ensemble 'echo', busy: no engine free in time",
        "wrong: not other",
    ]


@pytest.mark.e2e
@needs_locust
def test_what_takes_longer_than_the_timeout_is_counted_as_timed_out(
    server: RunningServer, texts: Callable[..., str]
) -> None:
    found = run(LocustLoad(server.grpc_url, {MODEL: 1}, texts("dawdles"), 1.0, users=1, timeout=0.2))
    assert found.counts.sent == found.counts.timed_out > 0
    assert found.latency_ms is None


@pytest.mark.e2e
@needs_locust
def test_two_workers_share_the_rate_and_two_models_the_requests(
    server: RunningServer, texts: Callable[..., str], tmp_path: Path
) -> None:
    models = {MODEL: 3.0, "second": 1.0}
    load = LocustLoad(server.grpc_url, models, texts("hello", "you"), 3.0, rate=60.0, poisson=True, processes=2)
    before = _requests(server)
    paths = send(load, tmp_path)
    due = list(Schedule(levels_of("steady", 3.0), 60.0, True).share(0, 1, 1))
    parts = sorted(len(read_requests([path]).answers.due) for path in paths)
    assert parts == [len(due) // 2, (len(due) + 1) // 2]
    after = _requests(server)
    assert after[MODEL] - before[MODEL] > after["second"] - before["second"] > 0


def _requests(server: RunningServer) -> dict[str, int]:
    import millibert

    with millibert.connect(server.http_url, MODEL) as client:
        return {name: counters.requests for name, counters in client.statistics().items()}


@pytest.mark.e2e
@needs_locust
@pytest.mark.parametrize("url", ["grpc_url", "http_url"])
def test_a_server_that_goes_away_and_comes_back(
    server: RunningServer, texts: Callable[..., str], tmp_path: Path, url: str
) -> None:
    target = urllib.parse.urlsplit(getattr(server, url))
    assert target.port is not None
    with ThreadPoolExecutor(1) as pool:
        with Proxy(target.port) as proxy:
            here = f"{target.scheme}://127.0.0.1:{proxy.port}"
            load = LocustLoad(here, {MODEL: 1}, texts("hello"), 6.0, rate=40.0, timeout=2.0)
            before = _requests(server)[MODEL]
            sending = pool.submit(send, load, tmp_path)
            _wait_for(lambda: _requests(server)[MODEL] - before, lambda count: count >= 40)
        time.sleep(1.0)
        with Proxy(target.port, port=proxy.port):
            sent = read_requests(sending.result(60))
    answers = sent.answers
    # The load did not wait: it was sent as it was due, and everything has an outcome.
    assert len(answers.due) == 240
    assert set(answers.outcome) == {"answered", "failed"}
    assert sum(sent.reasons.values()) == (answers.outcome == "failed").sum()
    answered, failed = (answers.due[answers.outcome == outcome] for outcome in ("answered", "failed"))
    assert 20 <= len(failed) <= 160
    # Away for a while, and then back.
    assert answered.min() < failed.min() < failed.max() < answered.max()


@pytest.mark.e2e
@needs_locust
def test_ctrl_c_ends_a_load_and_keeps_what_was_measured(
    server: RunningServer, texts: Callable[..., str], tmp_path: Path
) -> None:
    load = LocustLoad(server.grpc_url, {MODEL: 1}, texts("hello"), 600.0, rate=50.0)
    given = [*arguments(load), "--requests-file", str(tmp_path / "requests")]
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *given]
    before = _requests(server)[MODEL]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        _wait_for(lambda: _requests(server)[MODEL] - before, lambda count: count >= 50)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    found = read_requests(sorted(tmp_path.glob("requests.*"))).answers
    assert 50 <= len(found.due) < 50 * 60
    assert set(found.outcome) == {"answered"}


@pytest.mark.e2e
@needs_locust
def test_the_web_page_starts_a_load_with_other_arguments(server: RunningServer, texts: Callable[..., str]) -> None:
    given = ["--host", server.http_url, "--models", MODEL, "--texts", texts("hello"), "--rate", "1"]
    with _web_page(*given) as page:
        for _ in range(2):
            form = {"user_count": "1", "spawn_rate": "1", "host": server.grpc_url, "rate": "50", "models": MODEL}
            swarmed = json.loads(_get(f"{page}/swarm", urllib.parse.urlencode(form).encode()))
            assert swarmed["success"], swarmed
            stats = _wait_for(lambda: _stats(page), lambda found: found["total"]["num_requests"] >= 20)
            _get(f"{page}/stop", b"")
            assert {(each["method"], each["name"]) for each in stats["stats"][:-1]} == {("gRPC", MODEL)}
            assert stats["errors"] == []
            _wait_for(lambda: _stats(page), lambda found: found["state"] == "stopped")


@contextmanager
def _web_page(*given: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--web-host", "127.0.0.1"]
    process = subprocess.Popen([*command, "--web-port", str(port), *given], stderr=subprocess.DEVNULL)
    try:
        page = f"http://127.0.0.1:{port}"
        _wait_for(lambda: _answers(page), bool)
        yield page
    finally:
        process.terminate()
        process.wait(30)


def _answers(page: str) -> bool:
    try:
        return "locust" in _get(page).lower()
    except urllib.error.URLError:
        return False


def _stats(page: str) -> dict[str, Any]:
    found = json.loads(_get(f"{page}/stats/requests"))
    found["total"] = found["stats"][-1]
    return dict(found)


def _get(url: str, data: bytes | None = None) -> str:
    with urllib.request.urlopen(url, data, timeout=30) as answer:
        return str(answer.read().decode())


def _wait_for(look: Callable[[], Any], enough: Callable[[Any], bool], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not enough(found := look()):
        assert time.monotonic() < end, found
        time.sleep(0.2)
    return found


@pytest.mark.e2e
@needs_locust
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--models", "none"], "model 'none' at grpc"),
        (["--models", f"{MODEL}=x"], "the weight of echo is a number, not 'x'"),
        (["--models", MODEL, "--texts-per-request", "9"], "echo takes at most 8 texts a request, not 9"),
        (["--models", MODEL, "--protocol", "http"], "--protocol http, and the url grpc://"),
    ],
)
def test_what_cannot_be_sent_is_told_before_the_load(server: RunningServer, given: list[str], reason: str) -> None:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--duration", "1"]
    command += ["--host", server.grpc_url, "--texts", "synthetic:fixed:words=3,count=20", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr

"""What the manifests say is run: the Pod's own arguments, probes, preStop and grace, with a real Triton, under load."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from tests.conftest import Release, leftovers
from tests.kubelet import Pod
from tests.manifests import OVERLAYS, Rendered, quantity, render

import millibert
from millibert_ensemble import processes

TEXTS = ["where is my parcel?", "cancel it", "I was charged twice for one pair of boots", "thanks", "?"]
THREADS = 6


@pytest.fixture(scope="module")
def manifests() -> Rendered:
    return render(OVERLAYS["prod-cpu"])


@pytest.fixture(scope="module")
def store(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with one good release and one that is damaged."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(release.repository, folder / "good", copy_function=os.link)
    shutil.copytree(release.repository, folder / "damaged")
    (folder / "damaged" / "tokenizer" / "1" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def new_pod(manifests: Rendered, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pod]:
    def make(name: str = "good") -> Pod:
        config = {"release": {"MODEL_RELEASE": name}, "millibert-admin": {"key": "let me in"}}
        (pods,) = manifests.servers()
        return Pod(pods, tmp_path_factory.mktemp("pod"), store, config)

    return make


@pytest.fixture(scope="module")
def pods(triton: object, new_pod: Callable[..., Pod]) -> Iterator[list[Pod]]:
    """Two Pods that have started; the tests below are in the order of a Pod's life."""
    with ExitStack() as stack:
        both = [stack.enter_context(new_pod()) for _ in range(2)]
        for pod in both:
            pod.wait_started()
        yield both
        for pod in both:
            if pod.process.poll() is None:
                pod.terminate(pod.grace_seconds)
    assert [trace for pod in both for trace in leftovers(pod.process.pid)] == []


def test_a_damaged_release_ends_before_the_server(new_pod: Callable[..., Pod]) -> None:
    done = new_pod("damaged").initialise()
    assert done.returncode == 1
    assert "tokenizer/1/tokenizer.json" in done.stdout + done.stderr


def test_a_release_that_is_not_there_ends_before_the_server(new_pod: Callable[..., Pod]) -> None:
    done = new_pod("missing").initialise()
    assert done.returncode == 1
    assert "missing" in done.stderr


def test_a_started_pod_passes_all_probes_and_serves(pods: list[Pod]) -> None:
    for pod in pods:
        assert [pod.probe(name) for name in ("startupProbe", "readinessProbe", "livenessProbe")] == [True] * 3
        with millibert.connect(pod.urls["grpc"], pod.models[0]) as client:
            assert client.classify("where is my parcel?").label


def test_it_listens_where_the_manifest_says_and_nowhere_else(pods: list[Pod]) -> None:
    tree = [psutil.Process(pods[0].process.pid), *psutil.Process(pods[0].process.pid).children(recursive=True)]
    listening = [it for process in tree for it in process.net_connections("tcp") if it.status == psutil.CONN_LISTEN]
    ports = {int(url.rpartition(":")[2]) for url in pods[0].urls.values()}
    assert {it.laddr.port for it in listening} == ports
    assert len(ports) == len(pods[0].container["ports"])


@pytest.mark.parametrize("path", ["logging", "trace/setting", "systemsharedmemory/status", "cudasharedmemory/status"])
def test_what_changes_the_server_needs_the_key(pods: list[Pod], path: str) -> None:
    assert status(f"{pods[0].urls['http']}/v2/{path}") == 403
    assert status(f"{pods[0].urls['http']}/v2/{path}", {"millibert-admin": "let me in"}) != 403


def test_the_models_are_those_of_the_repository_and_cannot_be_changed(pods: list[Pod]) -> None:
    url = f"{pods[0].urls['http']}/v2/repository/models/{pods[0].models[0]}/unload"
    assert status(url, {"millibert-admin": "let me in"}, b"{}") != 200
    assert pods[0].probe("readinessProbe")


def status(url: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers or {}), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


class Load:
    """Texts, one after another from several threads to all Pods, from `with` to its end; keeps every failure."""

    def __init__(self, pods: list[Pod]) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._over = threading.Event()
        self._client = millibert.connect([pod.urls["grpc"] for pod in pods], pods[0].models[0])
        self._pool = ThreadPoolExecutor(THREADS)

    def __enter__(self) -> Load:
        self._running = [self._pool.submit(self._ask, number) for number in range(THREADS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._running:
            thread.result()
        self._pool.shutdown()
        self._client.close()

    def wait_answered(self, more: int) -> None:
        enough = self.answered + more
        while self.answered < enough and not self.failures:
            self._over.wait(0.05)

    def _ask(self, number: int) -> None:
        for text in itertools.cycle(TEXTS[number % len(TEXTS) :] + TEXTS[: number % len(TEXTS)]):
            if self._over.is_set():
                return
            try:
                answer = self._client.classify(text)
            except millibert.MillibertError as error:
                self.failures.append(f"{text}: {error}")
            else:
                assert answer.label
                self.answered += 1


@pytest.mark.timeout(240)
def test_a_pod_that_is_told_to_go_loses_no_request(pods: list[Pod]) -> None:
    """The client is not told: it keeps both addresses, which is harder than what a cluster does."""
    going, staying = pods
    with Load(pods) as load:
        load.wait_answered(200)
        assert shared_memory(going) <= quantity(dshm(going)["sizeLimit"])
        before = answered(going)
        spent = going.run_pre_stop()
        assert answered(going) > before, "it must serve until everybody knows"
        assert going.probe("livenessProbe")
        assert going.terminate(going.grace_seconds - spent) == 0
        load.wait_answered(200)
    assert load.failures == []
    assert not going.probe("readinessProbe")
    assert staying.probe("readinessProbe")


@pytest.mark.timeout(120)
def test_a_dead_stub_fails_the_readiness_probe_until_it_is_replaced(pods: list[Pod]) -> None:
    pod = pods[1]
    stub = processes.stubs(pod.server_pid)[0]
    os.kill(stub.pid, signal.SIGKILL)
    pod.wait_probe("readinessProbe", False)
    # Started again in place: to kill the container would only take longer.
    assert pod.probe("livenessProbe")
    pod.wait_probe("readinessProbe", True)
    deaths = f'millibert_process_deaths_total{{process="{stub.model}"}} 1.0'
    with urllib.request.urlopen(f"{pod.urls['health']}/metrics", timeout=10) as answer:
        assert deaths in answer.read().decode().splitlines()
    with millibert.connect(pod.urls["grpc"], pod.models[0]) as client:
        assert client.classify("where is my parcel?").label


def dshm(pod: Pod) -> dict[str, str]:
    (volume,) = (it for it in pod.spec["volumes"] if it["name"] == "dshm")
    found: dict[str, str] = volume["emptyDir"]
    return found


def shared_memory(pod: Pod) -> int:
    """Bytes of the regions of a Pod's Triton."""
    sizes = [path.stat().st_size for path in Path("/dev/shm").glob(f"millibert-{pod.process.pid}-*")]
    assert sum(sizes) > 0
    return sum(sizes)


def answered(pod: Pod) -> float:
    with urllib.request.urlopen(f"{pod.urls['metrics']}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    line = next(
        it for it in page.splitlines() if it.startswith(f'nv_inference_request_success{{model="{pod.models[0]}"')
    )
    return float(line.split()[-1])

"""The fixtures `release`, a small real release, and `triton`: a real server, as users start it, on free ports.

`server` is one that answers at once, for the clients and commands.

    def test_something(triton):
        with triton(repository) as server:
            server.grpc_url, server.http_url, server.metrics_url, server.models, server.log()

It skips where there is no tritonserver, and asserts that a server leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from millibert._errors import UsageError
from millibert_ensemble import installation

# Before torch is loaded: where another process is busy, OpenMP's spinning makes training many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# The drain of `millibert serve`, and some more.
STOP_SECONDS = 45
# Models that answer at once, for the clients and commands.
CLIENT_REPOSITORY = Path(__file__).parent / "client_repository"
CUSTOMER_SERVICE = Path(__file__).parents[1] / "build" / "scenarios" / "customer_service"


# What a test with one of these needs is a real server, or a release that is built.
_SLOW = {"triton", "release", "tensorrt_release"}


# Slow files that take a minute or more, longest first: with several workers, what starts last is what all wait for.
_LONGEST = ["tune", "build", "load", "native_config", "retune", "engine", "verify_gpu", "multi_label"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a server or a release, so that all else can run first; the longest files come first."""
    rank = {f"test_{name}.py": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    for item in items:
        if _SLOW & set(getattr(item, "fixturenames", ())) or item.get_closest_marker("e2e"):
            item.add_marker("slow")


@dataclass
class RunningServer:
    """`millibert serve` in a process of its own, and where it can be reached."""

    process: subprocess.Popen[str]
    log_file: Path
    models: list[str]
    grpc_url: str
    http_url: str
    metrics_url: str
    # With --health-port.
    health_url: str | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return self.log_file.read_text()

    def tritonserver(self) -> psutil.Process:
        return self._child("tritonserver")

    def guardian(self) -> psutil.Process:
        return self._child("python")

    def stub(self) -> psutil.Process:
        (stub,) = self.tritonserver().children()
        return stub

    def stop(self) -> int:
        """Ask it to end; returns its exit status."""
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)

    def leftovers(self) -> list[str]:
        return leftovers(self.pid)

    def _child(self, name: str) -> psutil.Process:
        (child,) = [it for it in psutil.Process(self.pid).children() if it.name().startswith(name)]
        return child


def leftovers(supervisor: int) -> list[str]:
    """Every process, file and region that a `millibert serve` with that pid has left on this machine."""
    mark = f"millibert-{supervisor}-"
    folders = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    found = [str(path) for folder in folders for path in folder.glob(f"*{mark}*")]
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if mark in command:
            found.append(f"{process.pid} {command}")
    return found


@pytest.fixture(scope="session")
def triton(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., contextlib.AbstractContextManager[RunningServer]]:
    """A function of a repository (and more arguments for `millibert serve`) that serves it in a `with`."""
    try:
        installation.locate()
    except UsageError as error:
        pytest.skip(str(error))

    @contextlib.contextmanager
    def serve(repository: Path, *options: str) -> Iterator[RunningServer]:
        log_file = tmp_path_factory.mktemp("serve") / "log"
        command = [sys.executable, "-m", "millibert.cli", "serve", "--repository", str(repository), "--json"]
        any_ports = [f"--{use}-port=0" for use in ("http", "grpc", "metrics")]
        with log_file.open("w") as log:
            process = subprocess.Popen([*command, *any_ports, *options], stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            assert ready, f"millibert serve ended with {process.wait()}:\n{log_file.read_text()}"
            facts = json.loads(ready)
            urls = [facts[it] for it in ("grpc", "http", "metrics", "health")]
            yield RunningServer(process, log_file, facts["models"], *urls)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(STOP_SECONDS)
            process.stdout.close()
        # A supervisor that was killed cannot tidy up; the next start does.
        if process.returncode >= 0:
            assert leftovers(process.pid) == []

    return serve


@pytest.fixture(scope="module")
def server(triton: Callable[..., contextlib.AbstractContextManager[RunningServer]]) -> Iterator[RunningServer]:
    """CLIENT_REPOSITORY, served once for a file; a file that needs another has a `server` of its own."""
    with triton(CLIENT_REPOSITORY) as running:
        yield running


@dataclass(frozen=True)
class Release:
    """A release built by `millibert build`, and what it takes to build it again."""

    repository: Path
    work: Path
    scenario: Path

    def build(self, out: Path, scenario: Path | None = None, *options: str) -> subprocess.CompletedProcess[str]:
        return self._run(out, "--scenario", str(scenario or self.scenario), *options)

    def retune(self, out: Path, add: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self._run(out, "--from-release", str(self.repository), "--add", add, *options)

    def _run(self, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "millibert.cli", "build", "--out", str(out), "--work", str(self.work)]
        return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


SCENARIO = """
name = "support"
top_k = 3
max_tokens = 64
max_texts = 16

[data]
train = "{data}/train.csv"
test = "{data}/test.csv"

[training]
epochs = 2
batch_size = 16

[gates]
min_accuracy = {min_accuracy}

[serving]
# A machine that tests share may stand still for longer than the usual second, and then the server says "busy".
queue_timeout_microseconds = 20000000
"""


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first worker to need it makes, and all workers of this run share."""
    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent
    folder, made = run / name, run / f"{name}.made"
    with FileLock(run / f"{name}.lock"):
        if not made.exists():
            # What is left of a worker that failed would hide from this one why.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The demo's data and base model, trained for two epochs: small, quick, and real. Tests do not change it."""

    def make(folder: Path) -> None:
        new = Release(folder / "repository", folder / "work", folder / "scenario.toml")
        new.scenario.write_text(SCENARIO.format(data=CUSTOMER_SERVICE, min_accuracy=0.2))
        done = new.build(new.repository, None, "--precision", "fp32")
        assert done.returncode == 0, done.stderr

    folder = once(tmp_path_factory, "release", make)
    # Builds write their reports into the work folder, and only one at a time: each worker has its own.
    work = shutil.copytree(folder / "work", tmp_path_factory.mktemp("work"), dirs_exist_ok=True)
    return Release(folder / "repository", work, folder / "scenario.toml")


@pytest.fixture(scope="session", params=["packed", "padded"])
def tensorrt_release(
    request: pytest.FixtureRequest, release: Release, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same checkpoint with a graph for TensorRT, in each layout; tests work on copies of it."""

    def make(folder: Path) -> None:
        graph = ["--tensorrt", "fp16", "--tensorrt-layout", request.param]
        done = release.build(folder / "repository", None, "--precision", "fp32", *graph)
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, f"tensorrt-{request.param}", make) / "repository"


@pytest.fixture
def repository(tensorrt_release: Path, tmp_path: Path) -> Path:
    """A copy of its own, made of hard links: what a test changes it must write anew, not in place."""
    return Path(shutil.copytree(tensorrt_release, tmp_path / "repository", copy_function=os.link))


def rewrite(path: Path, content: str | bytes) -> None:
    """Give a file new content without touching what other links to it see."""
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)

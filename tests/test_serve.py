from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
import pytest

from millibert_ensemble import contract, workspace
from millibert_ensemble.server import TritonServer

if TYPE_CHECKING:
    from tests.conftest import RunningServer

    Triton = Callable[..., contextlib.AbstractContextManager[RunningServer]]

REPOSITORY = Path(__file__).parent / "tiny_repository"
SERVICE = "tiny"
MODEL = "words"
# What the design promises: after this long no server calls itself ready and fails.
HONEST_SECONDS = 10.0
ANY_PORTS = ("--http-port=0", "--grpc-port=0", "--metrics-port=0")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REPOSITORY, tmp_path / "repository"))


def ask(url: str, text: str) -> tuple[int, Any]:
    """One text over HTTP: the status and the labels, or Triton's error."""
    tensor = {"name": contract.TEXT.name, "datatype": "BYTES", "shape": [1, 1], "data": [text]}
    status, body = call(url, "POST", f"/v2/models/{SERVICE}/infer", json.dumps({"inputs": [tensor]}))
    if status != 200:
        return status, body
    return status, {output["name"]: output["data"] for output in json.loads(body)["outputs"]}["LABEL"]


def call(url: str, method: str, path: str, body: str | None = None) -> tuple[int, str]:
    """Status 0 stands for a server that is not there."""
    address = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)) as connection:
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error)


def is_ready(url: str) -> bool:
    return call(url, "GET", "/v2/health/ready")[0] == 200


def answers(url: str) -> bool:
    return ask(url, "hello")[0] == 200


def until(true: Callable[[], bool], seconds: float = HONEST_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A `millibert serve` that is expected to end by itself, and to leave nothing behind."""
    command = [sys.executable, "-m", "millibert.cli", "serve", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            process.terminate()
    assert traces(process.pid) == []
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def traces(pid: int) -> list[str]:
    return [path.name for path in workspace.REGIONS.iterdir() if path.name.startswith(f"millibert-{pid}-")]


def regions(pid: int) -> list[str]:
    return [name for name in traces(pid) if not name.endswith(".lock")]


# Serving


@pytest.mark.e2e
def test_the_ready_line_is_true(triton: Triton) -> None:
    with triton(REPOSITORY) as server:
        assert server.models == [SERVICE]
        assert ask(server.http_url, "hello you") == (200, ["greeting", "nap", "other"])
        assert "nv_inference_request_success" in call(server.metrics_url, "GET", "/metrics")[1]
        assert grpc_labels(server.grpc_url, "hello you") == [b"greeting", b"nap", b"other"]
        assert regions(server.pid), "a Python model without shared memory: the checks below see nothing"


@pytest.mark.e2e
def test_sigterm_ends_it_without_a_trace(triton: Triton) -> None:
    with triton(REPOSITORY) as server:
        family = [server.tritonserver(), server.stub()]
        assert server.stop() == 0
        assert not any(process.is_running() for process in family)
        assert server.leftovers() == []
        assert "ready" not in server.log(), "standard error repeats the ready line"


@pytest.mark.e2e
def test_sigterm_waits_for_requests_in_flight(triton: Triton) -> None:
    with triton(REPOSITORY) as server:
        got: dict[str, Any] = {}

        def over_http() -> None:
            got["http"] = ask(server.http_url, "sleep 1.5 and then answer")

        def over_grpc() -> None:
            got["grpc"] = grpc_labels(server.grpc_url, "sleep 1.5 and then answer")

        threads = [threading.Thread(target=target) for target in (over_http, over_grpc)]
        for thread in threads:
            thread.start()
        time.sleep(0.8)
        status = server.stop()
        for thread in threads:
            thread.join()
        assert got == {"http": (200, ["nap", "greeting", "other"]), "grpc": [b"nap", b"greeting", b"other"]}
        assert status == 0


@pytest.mark.e2e
def test_a_second_signal_hurries(triton: Triton) -> None:
    # SIGTERM: a SIGINT that this test run was told to ignore is ignored by its children too.
    with triton(REPOSITORY) as server:
        slow = threading.Thread(target=ask, args=(server.http_url, "sleep 60"))
        slow.start()
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "a second signal hurries" in server.log())
        time.sleep(0.5)
        assert server.process.poll() is None, "it did not wait for the request at all"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(HONEST_SECONDS) == 1
        slow.join()


@pytest.mark.e2e
def test_a_signal_before_it_is_ready_ends_it(repository: Path) -> None:
    model = repository / MODEL / "1" / "model.py"
    model.write_text(model.read_text() + "\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "millibert.cli", "serve", "--repository", str(repository), *ANY_PORTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        until(lambda: bool(regions(process.pid)))
        process.terminate()
        assert process.wait(10) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b""
    assert traces(process.pid) == []


@pytest.mark.e2e
def test_in_process_it_is_a_context_manager(triton: Triton) -> None:
    del triton  # only for its skip
    with TritonServer(REPOSITORY) as server:
        assert answers(server.http_url)
        (stub,) = server.stub_pids()
        assert psutil.pid_exists(stub)
    assert not psutil.pid_exists(stub)
    assert not psutil.pid_exists(server.pid)
    assert traces(os.getpid()) == []


# Deaths


@pytest.mark.e2e
def test_a_dead_stub_is_never_called_ready(triton: Triton) -> None:
    with triton(REPOSITORY) as server:
        server.stub().kill()
        died = time.monotonic()
        lies = []
        # Past the promise, every look must find a server that answers, or none.
        while time.monotonic() < died + HONEST_SECONDS + 1:
            if is_ready(server.http_url) and not answers(server.http_url):
                lies.append(time.monotonic() - died)
            time.sleep(0.1)
        assert [moment for moment in lies if moment > HONEST_SECONDS] == []
        assert answers(server.http_url), "it did not come back"


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("victim", "named"),
    [("stub", f"the process of the model '{MODEL}'"), ("tritonserver", "tritonserver was killed by SIGKILL")],
)
def test_after_a_death_it_comes_back_once(triton: Triton, victim: str, named: str) -> None:
    with triton(REPOSITORY) as server:
        first = {"stub": server.stub(), "tritonserver": server.tritonserver()}
        first[victim].kill()
        until(lambda: "serving again" in server.log())
        assert answers(server.http_url)
        assert not any(process.is_running() for process in first.values()), "dead, but not reaped"
        assert len(regions(server.pid)) == 1
        assert named in server.log()

        {"stub": server.stub, "tritonserver": server.tritonserver}[victim]().kill()
        assert server.process.wait(HONEST_SECONDS) == 1, "a second death is the orchestrator's"
        assert server.leftovers() == []
        assert named in server.log().splitlines()[-1]


@pytest.mark.e2e
def test_a_stub_that_dies_while_it_answers(triton: Triton) -> None:
    with triton(REPOSITORY) as server:
        slow = threading.Thread(target=ask, args=(server.http_url, "sleep 60"))
        slow.start()
        time.sleep(0.5)
        server.stub().kill()
        until(lambda: "serving again" in server.log())
        assert answers(server.http_url)
        slow.join()


@pytest.mark.e2e
def test_nothing_outlives_a_killed_supervisor(triton: Triton) -> None:
    with triton(REPOSITORY) as killed:
        family = [killed.tritonserver(), killed.stub(), killed.guardian()]
        family[1].suspend()  # a stub that cannot even notice
        assert len(killed.leftovers()) > len(family), "nothing to remove: this test shows nothing"
        killed.process.kill()
        killed.process.wait()
        until(lambda: killed.leftovers() == [], 5)
        assert not any(is_alive(process) for process in family)


@pytest.mark.e2e
def test_the_next_start_sweeps_only_what_is_dead(triton: Triton) -> None:
    with triton(REPOSITORY) as living, triton(REPOSITORY) as killed:
        orphan, stuck = killed.tritonserver(), killed.stub()
        stuck.suspend()
        killed.guardian().kill()
        killed.process.kill()
        killed.process.wait()
        until(lambda: not is_alive(orphan), 5)
        assert is_alive(stuck)
        assert regions(killed.pid)
        with triton(REPOSITORY):
            assert not is_alive(stuck)
            assert killed.leftovers() == []
            assert answers(living.http_url)
            assert regions(living.pid)


def test_the_guardian_waits_for_a_dying_owner() -> None:
    script = (
        "import os, time\n"
        "from millibert_ensemble.workspace import Workspace\n"
        "space = Workspace()\n"
        "space._guardian.stdin.close()  # as the kernel closes it, before it lets go of the lock\n"
        "time.sleep(1)\n"
        "print(space.name, flush=True)\n"
        "os._exit(0)\n"
    )
    dead = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    until(lambda: list(workspace.REGIONS.glob(f"{dead.stdout.strip()}*")) == [])


def test_a_sweep_needs_no_server() -> None:
    script = (
        "import os, psutil\n"
        "from millibert_ensemble.workspace import REGIONS, Workspace\n"
        "space = Workspace()\n"
        "(REGIONS / (space.region_prefix + 'region')).touch()\n"
        "print(space.name, flush=True)\n"
        "[guardian.kill() for guardian in psutil.Process().children()]\n"
        "os._exit(0)\n"
    )
    dead = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    mine = workspace.Workspace()
    try:
        assert list(workspace.REGIONS.glob(f"{dead.stdout.strip()}*"))
        workspace.sweep()
        assert list(workspace.REGIONS.glob(f"{dead.stdout.strip()}*")) == []
        assert mine.folder.exists()
    finally:
        mine.close()
    assert traces(os.getpid()) == []


# What goes wrong before it serves


@pytest.mark.e2e
@pytest.mark.parametrize("use", ["http", "grpc", "metrics"])
def test_a_taken_port_is_named(triton: Triton, use: str) -> None:
    del triton
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve("--repository", str(REPOSITORY), *ANY_PORTS, f"--{use}-port={port}")
    assert done.returncode == 1
    assert f"port {port} ({use}) on 127.0.0.1 is taken" in done.stderr
    assert f"--{use}-port" in done.stderr


def test_a_repository_must_be_there(tmp_path: Path) -> None:
    done = serve("--repository", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"no model repository at {tmp_path / 'nowhere'}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_repository_must_hold_a_service(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = serve("--repository", str(tmp_path / "empty"))
    assert done.returncode == 1
    assert "is empty: no MODEL/config.pbtxt" in done.stderr
    shutil.rmtree(repository / SERVICE)
    # Alone, a model that answers texts with labels would be a service.
    config = repository / MODEL / "config.pbtxt"
    config.write_text(config.read_text().replace('"LABEL"', '"WORD"'))
    done = serve("--repository", str(repository))
    assert done.returncode == 1
    assert f"holds no service, only {MODEL}: none takes TEXT and answers LABEL" in done.stderr


def test_an_unknown_field_in_a_config_is_named(repository: Path) -> None:
    config = repository / SERVICE / "config.pbtxt"
    config.write_text(config.read_text() + "\nmax_batch: 3\n")
    done = serve("--repository", str(repository))
    assert done.returncode == 1
    assert str(config) in done.stderr
    assert "max_batch" in done.stderr


@pytest.mark.e2e
def test_a_model_that_does_not_load_says_why(triton: Triton, repository: Path) -> None:
    del triton
    (repository / MODEL / "1" / "model.py").write_text("raise ValueError('no labels.txt here')\n")
    done = serve("--repository", str(repository), *ANY_PORTS)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no labels.txt here" in done.stderr
    assert "before it was ready" in done.stderr.splitlines()[-1]


@pytest.mark.e2e
def test_a_model_that_loads_but_does_not_answer_is_not_ready(triton: Triton, repository: Path) -> None:
    del triton
    model = repository / MODEL / "1" / "model.py"
    model.write_text(model.read_text().replace("def _ranked(text):", "def _ranked(text):\n    1 / 0"))
    done = serve("--repository", str(repository), *ANY_PORTS)
    assert (done.returncode, done.stdout) == (1, "")
    assert "loaded but does not answer" in done.stderr.splitlines()[-1]
    assert "division by zero" in done.stderr.splitlines()[-1]


def is_alive(process: psutil.Process) -> bool:
    """Not gone, and not a dead one that its new parent has yet to reap."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def grpc_labels(url: str, text: str) -> list[bytes]:
    import numpy as np
    from tritonclient.grpc import InferenceServerClient, InferInput

    tensor = InferInput(contract.TEXT.name, [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=object))
    with InferenceServerClient(url.removeprefix("grpc://")) as client:
        labels: list[bytes] = client.infer(SERVICE, [tensor]).as_numpy("LABEL")[0].tolist()
    return labels

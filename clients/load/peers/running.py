"""A peer's server, while it is needed: started, proved by a real answer, and gone in the end with all its processes."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from load.peers import guard
from load.peers.peer import Peer
from millibert._errors import MillibertError

# Infinity warms up with 32 texts of 512 tokens, several times: minutes on a busy machine.
START_SECONDS = 600.0
# Of one request.
TIMEOUT_SECONDS = 120.0
_POLL_SECONDS = 0.1
_KILL_SECONDS = 10.0
_LOG_LINES = 30
# No reaching for the network: neither for models nor to report usage.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "INFINITY_ANONYMOUS_USAGE_STATS": "0",
}
# Settings of ours that would change what a peer does or loads.
_FOREIGN = ("INFINITY_", "HF_", "OMP_", "GOMP_", "KMP_", "MKL_", "PYTHON", "VIRTUAL_ENV", "UVICORN_", "LITSERVE_")


@contextlib.contextmanager
def running(
    peer: Peer, python: Path, checkpoint: Path, threads: int, start_seconds: float = START_SECONDS
) -> Iterator[str]:
    """Yield the server's URL, without the path, once it has classified a text.

    `python` is that of the peer's environment. The server's processes form a group of their own, which does not outlive
    the block, nor this process, however it ends. Raises MillibertError with the end of the server's log if it ends,
    refuses the text or gives no answer within `start_seconds`.
    """
    with tempfile.TemporaryDirectory(prefix=f"{peer.name}-") as folder:
        log = Path(folder, "log")
        port = _free_port()
        url = f"http://127.0.0.1:{port}"
        process = _start(peer, peer.command(python, checkpoint.resolve(), port, threads), threads, log)
        try:
            _await_answer(peer, url, process, log, time.monotonic() + start_seconds)
            yield url
        finally:
            _end(process)


def classify(peer: Peer, url: str, texts: Sequence[str]) -> list[str]:
    """The best label of each text, by one request to a running peer; raises MillibertError."""
    try:
        status, answer = _exchange(url, "POST", peer.path, peer.body(texts), TIMEOUT_SECONDS)
    except (OSError, http.client.HTTPException) as error:
        raise MillibertError(f"{peer.name} did not answer at {url}{peer.path}: {error}") from error
    if status != http.client.OK:
        raise MillibertError(f"{peer.name} answered with status {status}: {answer[:200].decode(errors='replace')}")
    labels = peer.labels(answer)
    if len(labels) != len(texts):
        raise MillibertError(f"{peer.name} gave {len(labels)} labels to {len(texts)} texts")
    return labels


def _start(peer: Peer, command: list[str], threads: int, log: Path) -> subprocess.Popen[bytes]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    folder = str(log.parent)  # where it may leave caches and temporary files
    places = {"TMPDIR": folder, "HF_HOME": folder}
    environment = {**own, **_OFFLINE, **places, "OMP_NUM_THREADS": str(threads), **peer.environment}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-I", guard.__file__, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )


def _await_answer(peer: Peer, url: str, process: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    """Ask until a text is answered; a server that is starting refuses the connection, or says 503."""
    seen = "nothing listened"
    while (left := deadline - time.monotonic()) > 0:
        if process.poll() is not None:
            raise _failure(f"{peer.name} ended with status {process.returncode} before it answered", log)
        try:
            status, answer = _try(peer, url, left)
        except (OSError, http.client.HTTPException) as error:
            seen = str(error)
        else:
            if status == http.client.OK:
                peer.labels(answer)
                return
            seen = f"status {status}: {answer[:200].decode(errors='replace')}"
            if status != http.client.SERVICE_UNAVAILABLE:
                raise _failure(f"{peer.name} refused a text with {seen}", log)
        time.sleep(_POLL_SECONDS)
    raise _failure(f"{peer.name} gave no answer in time; the last try: {seen}", log)


def _try(peer: Peer, url: str, seconds: float) -> tuple[int, bytes]:
    if peer.health is not None:
        status, answer = _exchange(url, "GET", peer.health, None, seconds)
        if status != http.client.OK:
            return status, answer
    return _exchange(url, "POST", peer.path, peer.body(["Is anybody there?"]), seconds)


def _exchange(url: str, method: str, path: str, body: bytes | None, seconds: float) -> tuple[int, bytes]:
    # http.client knows nothing of the proxies that the environment may name.
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=seconds)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def _failure(reason: str, log: Path) -> MillibertError:
    end = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return MillibertError(
        "\n".join([f"{reason}; the end of its log:", *end] if end else [f"{reason}; its log is empty"])
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the guard end the group; then end what is left of it, for a guard that was killed or that ended first."""
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(guard.GRACE_SECONDS + _KILL_SECONDS)
    deadline = time.monotonic() + _KILL_SECONDS
    with contextlib.suppress(ProcessLookupError):  # nobody is left in it
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()
            time.sleep(_POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

"""A tritonserver of our own: started on a model repository, proved ready, stopped without a trace.

    with TritonServer(repository) as server:
        millibert.Client(server.grpc_url)

The supervisor of `millibert serve` is built on this class; tests use it as it stands.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from millibert._errors import Timeout, Unavailable
from millibert_ensemble import installation, processes, readiness, workspace
from millibert_ensemble.models.bert.progress import room
from millibert_ensemble.ports import ANY_PORTS, EVERYWHERE, LOCALHOST, Ports, reserve
from millibert_ensemble.processes import Stub

# How long tritonserver lets requests in flight finish after SIGTERM, unless it is told otherwise.
DRAIN_SECONDS = 30
# Compiling a large model for this machine takes minutes at worst.
START_SECONDS = 600.0
_POLL_SECONDS = 0.05
# Names the file in which the texts let in are counted, and so many instances of who computes tell how far they are.
# Releases are older or newer than the server: where the file is laid out anew, it gets a new name.
_ADMISSION, _INSTANCES = "MILLIBERT_ADMISSION", 16
# Our only way to say "standard error, whatever Python has made of sys.stderr".
_STDERR = 2


class TritonServer:
    """One tritonserver process on one model repository, with its private workspace.

    `start` and `stop` may alternate; the ports stay the same. The server is killed when the thread that
    started it ends. `host` is the address to listen on; `options` are more arguments of tritonserver;
    `drain_seconds` is how long it lets requests in flight finish. Raises UsageError for a repository without a
    service, a port that is taken and a machine without a usable tritonserver.
    """

    def __init__(
        self,
        repository: Path,
        *,
        host: str = LOCALHOST,
        ports: Ports = ANY_PORTS,
        verbose: bool = False,
        options: Sequence[str] = (),
        drain_seconds: int = DRAIN_SECONDS,
    ) -> None:
        self.repository = repository.resolve()
        self.services = readiness.services(self.repository)
        installation.locate()
        self.host, self.ports = reserve(host, ports)
        self.verbose = verbose
        self.options = options
        self.drain_seconds = drain_seconds
        self._workspace: workspace.Workspace | None = None
        self._installation: installation.Installation | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def grpc_url(self) -> str:
        """`grpc://HOST:PORT`."""
        return f"grpc://{self.reachable_host}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        """`http://HOST:PORT`."""
        return f"http://{self.reachable_host}:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        """`http://HOST:PORT/metrics`, for Prometheus."""
        return f"http://{self.reachable_host}:{self.ports.metrics}/metrics"

    @property
    def reachable_host(self) -> str:
        """The address at which this machine reaches it."""
        return LOCALHOST if self.host == EVERYWHERE else self.host

    @property
    def pid(self) -> int:
        """The pid of the tritonserver process started last."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while tritonserver runs, else its exit status, or minus the signal that killed it."""
        assert self._process is not None, "start() comes first"
        return self._process.poll()

    def stubs(self) -> list[Stub]:
        """Return the processes in which Triton runs our Python models."""
        return processes.stubs(self.pid)

    def stub_pids(self) -> list[int]:
        """Return the pids of the processes in which Triton runs our Python models."""
        return [stub.pid for stub in self.stubs()]

    def start(self) -> None:
        """Start tritonserver, after sweeping up what dead servers left; its log goes to standard error."""
        if self._workspace is None:
            workspace.sweep()
            self._workspace = workspace.Workspace()
            self._installation = installation.prepare(self._workspace.folder)
        assert self._installation is not None
        admission = self._workspace.folder / "admission"
        admission.write_bytes(bytes(room(_INSTANCES)))
        self._process = subprocess.Popen(
            self._command(),
            env={**self._installation.environment, _ADMISSION: str(admission)},
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,
            # Ctrl-C in a terminal is for us alone: a second SIGINT makes Triton drop what it is answering.
            start_new_session=True,
            preexec_fn=processes.dies_with(os.getpid()),
        )

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Return once each service has answered a text.

        Raises Unavailable when tritonserver ends first, Timeout after `seconds`, and ServerFault when a
        loaded service does not answer.
        """
        deadline = time.monotonic() + seconds
        while not readiness.is_loaded(self.reachable_host, self.ports.http):
            if self.exit_status is not None:
                raise self._unavailable(f"{self.obituary()} before it was ready; its log says why")
            if time.monotonic() > deadline:
                reason = f"not ready within {seconds:.0f} s; its log says what it is loading"
                raise Timeout(reason, endpoint=self.http_url, model=", ".join(self.services))
            time.sleep(_POLL_SECONDS)
        readiness.prove(self.reachable_host, self.ports.http, self.services)

    def drain(self) -> None:
        """Ask tritonserver to finish what it is answering and end; returns at once."""
        if self.exit_status is None:
            self._signal(signal.SIGTERM)

    def stop(self, grace: float | None = None) -> None:
        """Drain for at most `grace` seconds (`drain_seconds`), then kill; removes the stubs and the shared memory."""
        grace = self.drain_seconds if grace is None else grace
        if self._process is not None:
            if grace > 0:
                self.drain()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(grace)
            self._signal(signal.SIGKILL)
            self._process.wait()
        if self._workspace is not None:
            self._workspace.clear()

    def close(self) -> None:
        """Kill what still runs and leave nothing behind."""
        self.stop(grace=0)
        if self._workspace is not None:
            self._workspace.close()
            self._workspace = None

    def obituary(self) -> str:
        """Say in words how tritonserver ended."""
        status = self.exit_status
        if status is None:
            return "tritonserver is alive"
        if status < 0:
            return f"tritonserver was killed by {signal.Signals(-status).name}"
        return f"tritonserver ended with status {status}"

    def __enter__(self) -> TritonServer:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _unavailable(self, reason: str) -> Unavailable:
        return Unavailable(reason, endpoint=self.http_url, model=", ".join(self.services))

    def _command(self) -> list[str]:
        assert self._workspace is not None
        assert self._installation is not None
        command = [
            str(self._installation.binary),
            f"--model-repository={self.repository}",
            f"--backend-directory={self._installation.backends}",
            f"--http-address={self.host}",
            f"--grpc-address={self.host}",
            f"--metrics-address={self.host}",
            f"--http-port={self.ports.http}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-port={self.ports.metrics}",
            "--model-control-mode=none",
            "--exit-on-error=true",
            "--strict-readiness=true",
            f"--exit-timeout-secs={self.drain_seconds}",
            f"--log-info={str(self.verbose).lower()}",
            f"--backend-config=python,shm-region-prefix-name={self._workspace.region_prefix}",
            # By default a model has 30 s to initialise; compiling one may take longer.
            f"--backend-config=python,stub-timeout-seconds={START_SECONDS:.0f}",
            *self.options,
        ]
        if not has_gpu():
            # Spares the log three warnings about what is not there.
            command += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
        return command


def has_gpu() -> bool:
    """Return whether this machine has an NVIDIA driver."""
    return shutil.which("nvidia-smi") is not None

"""Keep a TritonServer honest: it either answers or is not there.

A Python-backend stub that dies takes its model with it, while Triton goes on to call itself ready and fails
every request. So when a stub or tritonserver itself dies, the whole server is taken down at once and started
again; when that happens twice in short order, it is the orchestrator's turn.

    start ─► prove ─► announce ─► watch ─┬─ SIGTERM, SIGINT, SIGHUP ─► drain ─► 0   (a second one hurries: 1)
      ▲                                  ├─ a death ─► stop ─┐
      └──────────────────────────────────┼───────────────────┘
                                         └─ a death within RELAPSE_SECONDS of a restart ─► error
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple

from millibert._errors import Unavailable
from millibert_ensemble import processes
from millibert_ensemble.health import Health, Phase
from millibert_ensemble.server import TritonServer

RELAPSE_SECONDS = 60.0
# What still can be answered beside a dead stub is answered within this; a drain might hang on it.
_GRACE_SECONDS = 2.0
# tritonserver ends by itself after its time to drain; how much longer we believe that.
PATIENCE_SECONDS = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STOP = "stop"
_SERVER = "tritonserver"


class _Death(NamedTuple):
    process: str
    story: str


class Supervisor:
    """Runs a server in the main thread until a signal or a second death ends it."""

    def __init__(
        self, server: TritonServer, *, health: Health, announce: Callable[[], None], report: Callable[[str], None]
    ) -> None:
        """`announce` is called once, when inference works; `report` and `health` are told what happens in between."""
        self.server = server
        self._health = health
        self._announce = announce
        self._report = report
        self._signals = _StopSignals()

    def run(self) -> int:
        """Serve; returns 0 after a drained stop and 1 after a hurried one.

        Takes the process for itself: children of others that die meanwhile are reaped unseen.
        Raises Unavailable when the server cannot be kept up, and what TritonServer raises on starting.
        """
        processes.adopt_orphans()
        with self._signals:
            try:
                return self._serve()
            finally:
                self.server.close()

    def _serve(self) -> int:
        if not self._start():
            return 0
        self._announce()
        restarted = False
        while True:
            ready_at = time.monotonic()
            self._health.enter(Phase.SERVING)
            dead = self._watch()
            if dead is None:
                return self._drain()
            self._health.died(dead.process)
            casualty, lasted = dead.story, time.monotonic() - ready_at
            self._report(f"{casualty}: taking the server down")
            self.server.stop(_GRACE_SECONDS)
            processes.reap()
            if restarted and lasted < RELAPSE_SECONDS:
                raise Unavailable(
                    f"{casualty} again, {lasted:.0f} s after a restart; the log above may say why",
                    endpoint=self.server.http_url,
                    model=", ".join(self.server.services),
                )
            if not self._start():
                return 0
            self._report("serving again")
            restarted = True

    def _start(self) -> bool:
        """Start the server and prove it; False when a signal came first. Nobody is being served yet."""
        self.server.start()
        done = os.eventfd(0)
        with ThreadPoolExecutor(max_workers=1) as pool, _Watch() as watch:
            proof = pool.submit(self.server.wait_ready)
            proof.add_done_callback(lambda _: os.eventfd_write(done, 1))
            watch.adopt(done, "proof")
            watch.add(self._signals.fileno(), _STOP)
            if watch.wait() == _STOP:
                self.server.stop(grace=0)  # the proof then fails, and the pool can close
                return False
            proof.result()
            # Before anybody is told that it serves: what is counted is there from the start.
            self._health.watch([_SERVER, *(stub.model for stub in self.server.stubs())])
            return True

    def _watch(self) -> _Death | None:
        """Wait for a signal (None) or a death."""
        stubs = {f"stub {stub.pid}": stub for stub in self.server.stubs()}
        with _Watch() as watch:
            watch.add(self._signals.fileno(), _STOP)
            watch.add_process(self.server.pid, _SERVER)
            for name, stub in stubs.items():
                watch.add_process(stub.pid, name)
            event = watch.wait()
        if event == _STOP:
            return None
        # The stubs of a server that dies die too, and may be seen first.
        if event in stubs and self.server.exit_status is None:
            stub = stubs[event]
            return _Death(stub.model, f"the process of the model {stub.model!r} (pid {stub.pid}) died")
        return _Death(_SERVER, self.server.obituary())

    def _drain(self) -> int:
        self._signals.clear()
        self._health.enter(Phase.STOPPING)
        self._report("stopping: requests in flight are answered first; a second signal hurries")
        with _Watch() as watch:
            watch.add(self._signals.fileno(), _STOP)
            watch.add_process(self.server.pid, _SERVER)
            self.server.drain()
            event = watch.wait(self.server.drain_seconds + PATIENCE_SECONDS)
        if event == _SERVER and self.server.exit_status == 0:
            return 0
        why = "hurried" if event == _STOP else f"connections were still open after {self.server.drain_seconds} s"
        self._report(f"stopped without a full drain: {why}")
        return 1


class _Watch:
    """Waits for the first of several things to happen, each known by a name. Nothing is polled."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._owned = ExitStack()

    def add(self, descriptor: int, name: str) -> None:
        """Watch a descriptor become readable."""
        self._selector.register(descriptor, selectors.EVENT_READ, name)

    def adopt(self, descriptor: int, name: str) -> None:
        """Watch a descriptor and close it in the end."""
        self._owned.callback(os.close, descriptor)
        self.add(descriptor, name)

    def add_process(self, pid: int, name: str) -> None:
        """Watch a process end."""
        try:
            self.adopt(os.pidfd_open(pid), name)
        except ProcessLookupError:  # it has ended, and somebody has reaped it
            ended = os.eventfd(1)
            self.adopt(ended, name)

    def wait(self, seconds: float | None = None) -> str | None:
        """Return the name of what happened, in the order in which they were added; None after `seconds`."""
        happened = {str(key.data) for key, _ in self._selector.select(seconds)}
        known = [str(key.data) for key in self._selector.get_map().values()]
        return next((name for name in known if name in happened), None)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()
        self._owned.close()


class _StopSignals:
    """Turns the signals that ask us to stop into a descriptor that becomes readable."""

    def fileno(self) -> int:
        return self._reader.fileno()

    def clear(self) -> None:
        """Forget the signals seen so far."""
        self._reader.recv(4096)

    def __enter__(self) -> _StopSignals:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        # A signal that our caller ignores (nohup, a shell's background job) stays ignored.
        self._before = {
            number: signal.signal(number, lambda *_: None)
            for number in _SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

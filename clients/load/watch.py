"""What a server and the load on it use while a run lasts: CPUs, memory, shared memory, and the time of each stage.

Processes can be seen where the server runs on this machine; what each stage takes comes from Triton's own counters,
from anywhere.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

import psutil

from load.results import LOAD, Resources, Stage
from millibert._address import parse_address
from millibert._client import Client
from millibert._statistics import Counters
from millibert_ensemble import processes
from millibert_ensemble.cpu_time import SERVER, server_at

_PERIOD_SECONDS = 1.0
_REGIONS = "/dev/shm/"  # noqa: S108 - where Triton's are


class Watch:
    """Looks once a second from `with` to its end; what it saw is in `resources`."""

    def __init__(self, url: str) -> None:
        address = parse_address(url)
        self.resources: list[Resources] = []
        self._server = server_at(address.host, address.port)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        start = before_at = time.monotonic()
        before = {name: _cpu(found) for name, found in self._processes().items()}
        while not self._over.wait(_PERIOD_SECONDS):
            now, found = time.monotonic(), self._processes()
            spent = {name: _cpu(each) for name, each in found.items()}
            self.resources.append(
                Resources(
                    at=round(now - start, 3),
                    # A process that has just come was not there before; one that has gone took its time with it.
                    cpus={
                        name: max(0.0, seconds - before.get(name, 0.0)) / (now - before_at)
                        for name, seconds in spent.items()
                    },
                    memory_mib={name: _memory(each) / 2**20 for name, each in found.items()},
                    shared_memory_mib=None if self._server is None else _shared_memory(found[SERVER]) / 2**20,
                )
            )
            before, before_at = spent, now

    def _processes(self) -> dict[str, list[psutil.Process]]:
        """By what they do: the server, each model, and the load itself with all that it started."""
        here = psutil.Process()
        found = {LOAD: [here, *here.children(recursive=True)]}
        if self._server is None:
            return found
        found[SERVER] = _existing([self._server])
        for stub in processes.stubs(self._server):
            found.setdefault(stub.model, []).extend(_existing([stub.pid]))
        # A server that this process has started is no part of the load.
        apart = {process.pid for name, group in found.items() if name != LOAD for process in group}
        found[LOAD] = [process for process in found[LOAD] if process.pid not in apart]
        return found


def stages(client: Client, before: dict[str, Counters], after: dict[str, Counters]) -> tuple[list[Stage], float | None]:
    """Each stage's means between two looks at Triton's counters, and what of the ensemble's is in none of them.

    Of a service without stages, it is its own stage and the rest is None.
    """
    spent = {name: counters - before.get(name, Counters()) for name, counters in after.items()}
    steps = [name for name in client.steps() if name in spent]
    found = [_stage(name, spent[name]) for name in steps or [client.model]]
    if not steps:
        return found, None
    return found, spent[client.model].milliseconds("total") - sum(stage.total_ms for stage in found)


def _stage(name: str, counters: Counters) -> Stage:
    return Stage(
        model=name,
        queue_ms=counters.milliseconds("queue"),
        input_ms=counters.milliseconds("input"),
        compute_ms=counters.milliseconds("compute"),
        output_ms=counters.milliseconds("output"),
        total_ms=counters.milliseconds("total"),
        texts_per_execution=counters.texts_per_execution,
    )


def _existing(pids: list[int]) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def _cpu(group: list[psutil.Process]) -> float:
    """Seconds of user and system time; of a process that has ended, none."""
    total = 0.0
    for process in group:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _memory(group: list[psutil.Process]) -> int:
    total = 0
    for process in group:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _shared_memory(server: list[psutil.Process]) -> int:
    """Bytes of the regions that the server has mapped."""
    names: set[str] = set()
    for process in server:
        try:
            # Not smaps, which psutil reads: the kernel walks all pages for that, and the server waits meanwhile.
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        names |= {line[line.index(_REGIONS) :] for line in lines if _REGIONS in line}
    return sum(path.stat().st_size for path in map(Path, names) if path.exists())

"""How many CPUs this process may use, and how many threads are best for one execution."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

# Clearly faster.
_WORTH_IT = 0.85
# So many threads are taken without a trial.
_UNTRIED = 2
# How often each number of threads has its turn, and runs of a turn.
_TURNS, _RUNS = 10, 10


def cpu_limit(cgroup_root: Path = Path("/sys/fs/cgroup"), cgroup_of: Path = Path("/proc/self/cgroup")) -> int:
    """Whole CPUs from the affinity mask and the cgroup's CPU quota (v2 and v1), at least 1.

    The host's count is wrong in a container: threads beyond the quota are throttled together, which shows as
    tail latency.
    """
    limits = [float(len(os.sched_getaffinity(0))), *_quotas(cgroup_root, cgroup_of)]
    return max(1, int(min(limits)))


def _quotas(root: Path, cgroup_of: Path) -> list[float]:
    """The quotas, in CPUs, of this process's cgroup and of all above it."""
    lines = cgroup_of.read_text().splitlines() if cgroup_of.exists() else []
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root
        folder = mount / path.lstrip("/")
        for place in (folder, *folder.parents):
            quotas += _quota(place)
            if place == mount:
                break
    return quotas


def _quota(folder: Path) -> list[float]:
    if (folder / "cpu.max").is_file():  # v2: "max 100000" or "150000 100000"
        quota, period = (folder / "cpu.max").read_text().split()
        return [] if quota == "max" else [int(quota) / int(period)]
    if (folder / "cpu.cfs_quota_us").is_file():  # v1: -1 is no limit
        quota = (folder / "cpu.cfs_quota_us").read_text()
        return [] if int(quota) < 0 else [int(quota) / int((folder / "cpu.cfs_period_us").read_text())]
    return []


def share_of(cpus: int, instances: int) -> int:
    """Threads of each instance where its config leaves them open."""
    return max(1, cpus // instances)


def fastest(most: int, start: Callable[[int], Callable[[], object]]) -> int:
    """How many threads to use, of 2, 4, 8, … `most`: more than two only where they are clearly faster than fewer.

    `start` gives what runs with so many threads; no more than two of these are kept at a time. They take turns, and the
    best time of each counts: what else runs on the machine, most of all while a server starts, only ever makes it
    longer. One thread is not tried: a virtual machine may be without its second core for seconds, and one would be the
    choice for as long as the server runs (docs/log.md).
    """
    if most <= _UNTRIED:
        return most
    best, run = _UNTRIED, start(_UNTRIED)
    for count in sorted({*(1 << power for power in range(2, most.bit_length())), most}):
        other = start(count)
        seconds, of_other = _in_turns(run, other)
        if of_other < _WORTH_IT * seconds:
            best, run = count, other
        del other  # before the next one is made
    return best


def _in_turns(one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """The least seconds of a run of each."""
    least = [math.inf, math.inf]
    for _ in range(_TURNS):
        for place, run in enumerate((one, other)):
            least[place] = min(least[place], _least_seconds(run))
    return least[0], least[1]


def _least_seconds(run: Callable[[], object]) -> float:
    seconds = math.inf
    for _ in range(_RUNS):
        begun = time.perf_counter()
        run()
        seconds = min(seconds, time.perf_counter() - begun)
    return seconds

"""How many CPUs this process may use."""

from __future__ import annotations

import os
from pathlib import Path


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

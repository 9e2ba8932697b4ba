"""What the figures were measured on."""

from __future__ import annotations

from typing import Any

from millibert_build.release import cpu_name
from millibert_ensemble.models.bert.threads import cpu_limit


def describe_machine() -> dict[str, Any]:
    """The CPU's name, and how many of its CPUs this process and the server may use."""
    return {"cpu": cpu_name(), "cpus": cpu_limit()}

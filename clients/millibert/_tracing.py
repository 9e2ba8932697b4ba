"""The trace context of the application, W3C's `traceparent`, where it has one."""

from __future__ import annotations

import sys


def trace_headers() -> dict[str, str]:
    """What OpenTelemetry's propagators put into a request now; nothing in an application that never loaded it."""
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier

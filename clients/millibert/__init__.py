"""Clients of a millibert service.

    import millibert

    with millibert.connect("grpc://127.0.0.1:8001", "banking77") as client:
        print(client.classify("Where is my new card?").label)

The protocol modules are imported when first asked for: whoever speaks HTTP never loads gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from millibert._errors import (
    InvalidRequest,
    MillibertError,
    NotFound,
    ServerFault,
    ServiceError,
    Timeout,
    Unavailable,
    UsageError,
)
from millibert._types import Classification, Prediction

if TYPE_CHECKING:
    from millibert._client import Client
    from millibert._connect import connect
    from millibert._grpc import GrpcClient
    from millibert._http import HttpClient

__all__ = [
    "Classification",
    "Client",
    "GrpcClient",
    "HttpClient",
    "InvalidRequest",
    "MillibertError",
    "NotFound",
    "Prediction",
    "ServerFault",
    "ServiceError",
    "Timeout",
    "Unavailable",
    "UsageError",
    "connect",
]

_HOME_OF = {
    "Client": "millibert._client",
    "connect": "millibert._connect",
    "GrpcClient": "millibert._grpc",
    "HttpClient": "millibert._http",
}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

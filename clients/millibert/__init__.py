"""Clients of a millibert service.

    import millibert

    with millibert.connect("grpc://127.0.0.1:8001", "banking77") as client:
        print(client.classify("Where is my new card?").label)

`connect_async` makes the same for asyncio.
The protocol modules are imported when first asked for: whoever speaks HTTP never loads gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from millibert._errors import (
    Busy,
    InvalidRequest,
    MillibertError,
    NotFound,
    ServerFault,
    ServiceError,
    Timeout,
    Unavailable,
    UsageError,
)
from millibert._types import Call, Classification, Failure, ModelState, Prediction, ServerInfo

if TYPE_CHECKING:
    from millibert._async_client import AsyncClient
    from millibert._client import Client
    from millibert._connect import connect, connect_async
    from millibert._grpc import GrpcClient
    from millibert._grpc_aio import AsyncGrpcClient
    from millibert._http import HttpClient
    from millibert._http_aio import AsyncHttpClient
    from millibert._intent import IntentClassifier
    from millibert._retry import Retry
    from millibert._security import TLS
    from millibert._statistics import Counters

__all__ = [
    "TLS",
    "AsyncClient",
    "AsyncGrpcClient",
    "AsyncHttpClient",
    "Busy",
    "Call",
    "Classification",
    "Client",
    "Counters",
    "Failure",
    "GrpcClient",
    "HttpClient",
    "IntentClassifier",
    "InvalidRequest",
    "MillibertError",
    "ModelState",
    "NotFound",
    "Prediction",
    "Retry",
    "ServerFault",
    "ServerInfo",
    "ServiceError",
    "Timeout",
    "Unavailable",
    "UsageError",
    "connect",
    "connect_async",
]

_HOME_OF = {
    "AsyncClient": "millibert._async_client",
    "AsyncGrpcClient": "millibert._grpc_aio",
    "AsyncHttpClient": "millibert._http_aio",
    "Client": "millibert._client",
    "Counters": "millibert._statistics",
    "GrpcClient": "millibert._grpc",
    "HttpClient": "millibert._http",
    "IntentClassifier": "millibert._intent",
    "Retry": "millibert._retry",
    "TLS": "millibert._security",
    "connect": "millibert._connect",
    "connect_async": "millibert._connect",
}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

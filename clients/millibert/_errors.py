"""The errors of millibert, drawn once.

MillibertError
├── UsageError           wrong input to one of our commands or builds: what, where, what to do
└── ServiceError         a call to a server failed; says which endpoint and model
    ├── InvalidRequest   the server or the client refused the request itself; retrying cannot help
    ├── NotFound         no such model on this server
    ├── Unavailable      the server is down, not ready, or too busy
    ├── Timeout          no answer within the deadline
    └── ServerFault      the server failed while answering
"""

from __future__ import annotations

from functools import partial


class MillibertError(Exception):
    """Anything millibert raises on purpose."""


class UsageError(MillibertError):
    """Wrong input to a command or a build; the message says what, where and what to do next."""


class ServiceError(MillibertError):
    """A call to a server failed."""

    def __init__(self, reason: str, *, endpoint: str, model: str) -> None:
        super().__init__(f"{reason} (model {model!r} at {endpoint})")
        self.reason = reason
        self.endpoint = endpoint
        self.model = model

    def __reduce__(self) -> tuple[partial[ServiceError], tuple[str]]:
        # By default an exception is pickled as its class and its message, and worker processes that hand
        # one back would fail on the missing endpoint and model.
        return partial(type(self), endpoint=self.endpoint, model=self.model), (self.reason,)


class InvalidRequest(ServiceError):  # noqa: N818 - reads better at the call site
    """The request itself was refused: retrying it cannot help."""


class NotFound(ServiceError):  # noqa: N818
    """The server has no such model."""


class Unavailable(ServiceError):  # noqa: N818
    """The server is down, not ready, or too busy."""


class Timeout(ServiceError):  # noqa: N818
    """No answer came within the deadline."""


class ServerFault(ServiceError):  # noqa: N818
    """The server failed while answering."""

"""The errors of millibert, drawn once.

MillibertError
├── UsageError           wrong input to one of our commands, builds or constructors: what, where, what to do
└── ServiceError         a call to a server failed; says which endpoint, model and request, and what to do
    ├── InvalidRequest   the server or the client refused the request itself; retrying cannot help
    ├── NotFound         no such model on this server
    ├── Busy             the server is there and has too much to do: send less, or later
    ├── Timeout          no answer within the deadline
    ├── Unavailable      the server is down, not ready, or the connection to it was lost
    └── ServerFault      the server failed while answering
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar


class MillibertError(Exception):
    """Anything millibert raises on purpose."""


class UsageError(MillibertError):
    """Wrong input to a command, a build or a constructor; the message says what, where and what to do next."""


class ServiceError(MillibertError):
    """A call to a server failed. Its message holds all of its attributes, and never a text or a secret."""

    advice: ClassVar[str] = ""
    """What to do about errors of this kind."""

    def __init__(self, reason: str, *, endpoint: str, model: str, request_id: str = "", attempts: int = 1) -> None:
        request = f", request {request_id}" if request_id else ""
        tries = f", {attempts} attempts" if attempts > 1 else ""
        advice = f"; {self.advice}" if self.advice else ""
        super().__init__(f"{reason} (model {model!r} at {endpoint}{request}{tries}){advice}")
        self.reason = reason
        self.endpoint = endpoint
        self.model = model
        self.request_id = request_id
        self.attempts = attempts

    def __reduce__(self) -> tuple[partial[ServiceError], tuple[str]]:
        # By default an exception is pickled as its class and its message, and worker processes that hand
        # one back would fail on the missing endpoint and model.
        facts = {"endpoint": self.endpoint, "model": self.model}
        return partial(type(self), **facts, request_id=self.request_id, attempts=self.attempts), (self.reason,)


class InvalidRequest(ServiceError):  # noqa: N818 - reads better at the call site
    """The request itself was refused: retrying it cannot help."""


class NotFound(ServiceError):  # noqa: N818
    """The server has no such model."""

    advice = "`millibert status` lists the models that a server has"


class Busy(ServiceError):  # noqa: N818
    """The server is there, and has too much to do to answer in time."""

    advice = "send less, or try again later"


class Timeout(ServiceError):  # noqa: N818
    """No answer came within the deadline."""

    advice = "`millibert stages` shows where a server's time goes; give a longer timeout if it needs one"


class Unavailable(ServiceError):  # noqa: N818
    """The server is down, not ready, or the connection to it was lost."""

    advice = "`millibert status` asks whether it is up and ready"


class ServerFault(ServiceError):  # noqa: N818
    """The server failed while answering."""

    advice = "the server's log has the cause"

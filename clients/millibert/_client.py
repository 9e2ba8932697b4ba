"""What all clients share: the address, the checks, the deadline, the meaning of errors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from types import TracebackType
from typing import ClassVar, NamedTuple, Self, overload
from urllib.parse import SplitResult, urlsplit

from millibert._codec import CodecError, Config, Outputs, Request, decode, encode
from millibert._errors import (
    InvalidRequest,
    NotFound,
    ServerFault,
    ServiceError,
    Timeout,
    Unavailable,
    UsageError,
)
from millibert._types import Classification

DEFAULT_TIMEOUT = 10.0
"""Seconds a call may take where nobody says otherwise."""
LONGEST_TIMEOUT = 86_400.0
"""Seconds; beyond a day a timeout is a mistake, and gRPC overflows far beyond it."""
DEFAULT_PORTS = {"grpc": 8001, "http": 8000}
"""The schemes there are, and Triton's port for each."""


class Address(NamedTuple):
    """Where a server listens."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        """`host:port`, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}"


def parse_address(url: str) -> Address:
    """Read `grpc://host[:port]` or `http://host[:port]`; raises `UsageError` for anything else."""
    split = _split(url)
    allowed = " or ".join(f"{scheme}://host:{port}" for scheme, port in DEFAULT_PORTS.items())
    if split.scheme not in DEFAULT_PORTS:
        wrong = f"the scheme {split.scheme!r} is unknown" if "://" in url else "the scheme is missing"
        raise UsageError(f"cannot use the url {url!r}: {wrong}; expected {allowed}")
    if not split.hostname:
        raise UsageError(f"cannot use the url {url!r}: the host is missing; expected {allowed}")
    if split.path.strip("/") or split.query or split.fragment or "@" in split.netloc:
        raise UsageError(f"cannot use the url {url!r}: it has more than a host and a port; expected {allowed}")
    port = DEFAULT_PORTS[split.scheme] if split.port is None else split.port
    return Address(split.scheme, split.hostname, port)


def _split(url: str) -> SplitResult:
    try:
        split = urlsplit(url)
        _ = split.port  # urllib checks the port only when asked for it
    except ValueError as error:
        raise UsageError(f"cannot use the url {url!r}: {error}") from error
    return split


class Client(ABC):
    """A service at one endpoint: one model on one server. Safe to share between threads.

    `url` is `grpc://host:port` or `http://host:port`, `timeout` the seconds that a call may take from its
    start to the complete answer. Nothing is sent before the first call. Every failed call raises a
    `ServiceError` that says which endpoint and model.
    """

    scheme: ClassVar[str]

    def __init__(self, url: str, model: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        address = parse_address(url)
        if address.scheme != self.scheme:
            raise UsageError(f"{type(self).__name__} needs a url with {self.scheme}://, not {url!r}")
        if not isinstance(model, str) or not model or not model.isprintable():
            raise UsageError(f"the model must be named, not {model!r}")
        if not _is_timeout(timeout):
            raise UsageError(f"timeout must be a positive number of seconds up to a day, not {timeout!r}")
        self.address = address
        self.model = model
        self.timeout = float(timeout)

    @overload
    def classify(self, texts: str, top_k: int | None = None, timeout: float | None = None) -> Classification: ...

    @overload
    def classify(
        self, texts: list[str] | tuple[str, ...], top_k: int | None = None, timeout: float | None = None
    ) -> tuple[Classification, ...]: ...

    def classify(
        self,
        texts: str | list[str] | tuple[str, ...],
        top_k: int | None = None,
        timeout: float | None = None,
    ) -> Classification | tuple[Classification, ...]:
        """Classify one text, or several in one request, in order.

        `top_k` is the number of labels per text (None: the model's default), `timeout` overrides the
        client's for this call, in seconds. Raises `InvalidRequest`, `NotFound`, `Unavailable`, `Timeout` or
        `ServerFault`.
        """
        seconds = self._seconds(timeout)
        try:
            request = encode([texts] if isinstance(texts, str) else texts, top_k)
        except CodecError as error:
            raise self._error(InvalidRequest, str(error)) from error
        try:
            answers = decode(request.texts, self._infer(request, seconds))
        except CodecError as error:
            raise self._error(ServerFault, f"the answer breaks the contract: {error}") from error
        return answers[0] if isinstance(texts, str) else answers

    def ready(self, timeout: float | None = None) -> bool:
        """Whether the server and the model take requests now; False too where no server answers."""
        try:
            return self._ready(self._seconds(timeout))
        except (NotFound, Timeout, Unavailable):
            return False

    def max_batch_size(self, timeout: float | None = None) -> int:
        """How many texts one request may hold, from the model's configuration on the server."""
        # Triton writes 0 for a model without a batch dimension: one text a request is all it could take.
        return max(1, self._config(self._seconds(timeout)).max_batch_size)

    def labels(self, timeout: float | None = None) -> tuple[str, ...]:
        """All labels the model can answer, in the order of their ids, from its configuration on the server."""
        found = self._config(self._seconds(timeout)).labels
        if not found:
            raise self._error(ServerFault, "its configuration does not list its labels; built by an older millibert?")
        return found

    @abstractmethod
    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards. May be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _infer(self, request: Request, seconds: float) -> Outputs:
        """Send the request; returns its outputs, or raises `ServiceError` or `CodecError`."""

    @abstractmethod
    def _ready(self, seconds: float) -> bool: ...

    @abstractmethod
    def _config(self, seconds: float) -> Config: ...

    def _seconds(self, timeout: float | None) -> float:
        if timeout is None:
            return self.timeout
        if not _is_timeout(timeout):
            reason = f"timeout must be a positive number of seconds up to a day, not {timeout!r}"
            raise self._error(InvalidRequest, reason)
        return float(timeout)

    def _error(self, kind: type[ServiceError], reason: str) -> ServiceError:
        return kind(reason, endpoint=str(self.address), model=self.model)

    def _too_late(self, seconds: float) -> ServiceError:
        return self._error(Timeout, f"no answer within {seconds:g} s")

    def _closed(self) -> ServiceError:
        return self._error(InvalidRequest, "this client is closed")


def _is_timeout(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and 0 < value <= LONGEST_TIMEOUT

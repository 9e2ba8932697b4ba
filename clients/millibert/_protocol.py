"""What the protocols have in common, seen from the calls: exchanges to be made, and how one can fail.

Nothing here or in a `Protocol` sends anything. A sender, of which each protocol has one for threads and one for
asyncio, takes an exchange's message to an endpoint and returns what came back.
"""

from __future__ import annotations

import ipaddress
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from millibert._codec import Outputs, Request
from millibert._errors import ServiceError
from millibert._shared_memory import Region

T = TypeVar("T")

CONNECT_SECONDS = 3.0
"""A machine that is gone does not refuse a connection, it says nothing; the next server is tried after so long."""


class AttemptFailed(Exception):  # noqa: N818 - no error of the API: the call turns it into one
    """One attempt, at one endpoint, brought no answer, or one that is an error."""

    def __init__(self, kind: type[ServiceError], reason: str, *, connected: bool = True, lost: bool = False) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.connected = connected
        """False where the endpoint could not even be connected to."""
        self.lost = lost or not connected
        """There is no connection any more."""


class Exchange(NamedTuple, Generic[T]):
    """A message for a sender of the same protocol, and how to read its answer."""

    message: Callable[[float], Any]
    """From the seconds that the call has left."""
    parse: Callable[[Any], T]
    """Raises `CodecError`, or `AttemptFailed` where the answer is an error."""


class Protocol(ABC):
    """How each question is put and its answer is read."""

    name: ClassVar[str]

    @abstractmethod
    def infer(self, model: str, request: Request, request_id: str, region: Region | None = None) -> Exchange[Outputs]:
        """Ask for the labels of texts; with a `region` of shared memory they are not in the message but there."""

    @abstractmethod
    def server_ready(self) -> Exchange[bool]:
        """Ask whether the server takes requests."""

    @abstractmethod
    def model_ready(self, model: str) -> Exchange[bool]:
        """Ask whether the model does."""

    @abstractmethod
    def config(self, model: str) -> Exchange[Any]:
        """Ask for a model's configuration, a document as in Triton's JSON; so do those that follow."""

    @abstractmethod
    def statistics(self) -> Exchange[Any]:
        """Ask for the statistics of all models."""

    @abstractmethod
    def models(self) -> Exchange[Any]:
        """Ask for the repository's index."""

    @abstractmethod
    def server(self) -> Exchange[Any]:
        """Ask for the server's metadata."""

    @abstractmethod
    def regions(self) -> Exchange[list[str]]:
        """Ask for the names of the registered regions of shared memory."""

    @abstractmethod
    def register(self, region: Region) -> Exchange[Any]:
        """Let the server map a region."""

    @abstractmethod
    def unregister(self, name: str) -> Exchange[Any]:
        """Let the server forget a region."""


def is_loopback(host: str) -> bool:
    """Whether the host is this machine, as far as its name says so."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: only the resolver knows where it leads

"""Who we are and whom we trust: TLS from files, and the headers of every call."""

from __future__ import annotations

import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from millibert._errors import UsageError

Headers: TypeAlias = Mapping[str, str]
HeaderSource: TypeAlias = Headers | Callable[[], Headers | Awaitable[Headers]]
TokenSource: TypeAlias = str | Callable[[], str | Awaitable[str]]

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, token
_GRPC_RESTRICTED = "triton-grpc-protocol-"


@dataclass(frozen=True)
class TLS:
    """Files in PEM for `grpcs://` and `https://`.

    `ca` holds the authorities to trust (None: this machine's), `cert` and `key` what this client shows of itself
    (mutual TLS), `server_name` the name to expect in the server's certificate where it is not the url's host.
    They are read when a client is made, and new connections may read them again: after they were renewed, make a new
    client.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise UsageError("mutual TLS needs both files: the certificate (cert) and its key")

    def check(self) -> None:
        """Read all files; raises `UsageError` that names the one that cannot be used."""
        self.context()

    def authorities(self) -> bytes | None:
        """What `ca` holds, or this machine's authorities; None where it has none in a file."""
        if self.ca is not None:
            return _read(self.ca)
        default = ssl.get_default_verify_paths().cafile
        return _read(default) if default else None

    def identity(self) -> tuple[bytes | None, bytes | None]:
        """The key and the certificate chain, or None for both."""
        if self.cert is None or self.key is None:
            return None, None
        return _read(self.key), _read(self.cert)

    def context(self) -> ssl.SSLContext:
        """The same for Python's ssl; raises `UsageError` that names the file that cannot be used."""
        if self.ca is not None:
            _read(self.ca)
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
        except ssl.SSLError as error:
            raise UsageError(f"{self.ca}: no certificates in PEM: {error.reason or error}") from error
        if self.cert is not None and self.key is not None:
            self.identity()
            try:
                context.load_cert_chain(str(self.cert), str(self.key), password=_no_password)
            except (ssl.SSLError, ValueError) as error:
                reason = getattr(error, "reason", None) or error
                raise UsageError(f"{self.cert} and {self.key} are no certificate and its key: {reason}") from error
        return context


def _no_password() -> str:
    # Else OpenSSL would ask on the terminal.
    raise ValueError("the key is encrypted; decrypt it first")


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Credentials:
    """Where the headers of a call come from. Never shows what it holds."""

    token: TokenSource | None = None
    headers: HeaderSource | None = None
    restricted: Headers | None = None

    def __post_init__(self) -> None:
        for given in (self.restricted, None if callable(self.headers) else self.headers):
            check_headers(given or {})
        if isinstance(self.token, str):
            check_headers({"authorization": self.token})

    def __repr__(self) -> str:
        given = [name for name in ("token", "headers", "restricted") if getattr(self, name) is not None]
        return f"Credentials({', '.join(given)})"

    def restricted_headers(self, protocol: str) -> dict[str, str]:
        """The key of Triton's restricted APIs, under the name that it has on `grpc` or `http`."""
        prefix = _GRPC_RESTRICTED if protocol == "grpc" else ""
        return {f"{prefix}{name}".lower(): value for name, value in (self.restricted or {}).items()}


def check_headers(headers: Headers) -> dict[str, str]:
    """Names in lower case, as gRPC wants them; raises `UsageError` that names a header and not its value."""
    checked = {}
    for name, value in dict(headers).items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be the name of a header")
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise UsageError(f"the header {name!r} must be printable ASCII text")
        checked[name.lower()] = value
    return checked

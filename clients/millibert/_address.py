"""Where servers are: urls to addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from millibert._errors import UsageError

DEFAULT_PORTS = {"grpc": 8001, "http": 8000, "grpcs": 443, "https": 443}
"""The schemes there are. Without TLS it is Triton's own port, with TLS that of a proxy or gateway."""
_DNS = "+dns"
_EXPECTED = "grpc://host:8001, http://host:8000, grpcs://host:443 or https://host:443"


class Address(NamedTuple):
    """Where a server listens."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        """`host:port`, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def protocol(self) -> str:
        """`grpc` or `http`."""
        return self.scheme.removesuffix("s")

    @property
    def secure(self) -> bool:
        """Whether the connection is TLS."""
        return self.scheme.endswith("s")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}"


@dataclass(frozen=True)
class Target:
    """What a url names: one address or several of the same scheme."""

    addresses: tuple[Address, ...]
    resolved: bool = False
    """Each host is a name with many addresses behind it, and the load goes to all of them in turn."""

    @property
    def scheme(self) -> str:
        """The scheme of all addresses."""
        return self.addresses[0].scheme

    def __str__(self) -> str:
        netlocs = ",".join(address.netloc for address in self.addresses)
        return f"{self.scheme}{_DNS * self.resolved}://{netlocs}"


def parse_address(url: str) -> Address:
    """Read the url of one server, `grpc://host[:port]`; raises `UsageError` for anything else."""
    target = parse_target(url)
    if len(target.addresses) > 1 or target.resolved:
        raise UsageError(f"cannot use the url {url!r}: one server is expected here, such as {target.addresses[0]}")
    return target.addresses[0]


def parse_target(url: str | Sequence[str]) -> Target:
    """Read one url, or several of the same scheme; raises `UsageError` for anything else.

    `grpc://a:8001,b:8001` names several servers, `dns:///name:8001` (short for `grpc+dns://name:8001`) all the
    addresses of a name, such as a headless Kubernetes service.
    """
    if not isinstance(url, str):
        return _merged(url)
    url_given, url = url, f"grpc{_DNS}://{url[7:]}" if url.startswith("dns:///") else url
    scheme, separator, rest = url.partition("://")
    plain, resolved = scheme.removesuffix(_DNS), scheme.endswith(_DNS)
    if plain not in DEFAULT_PORTS:
        wrong = f"the scheme {scheme!r} is unknown" if separator else "the scheme is missing"
        raise UsageError(f"cannot use the url {url_given!r}: {wrong}; expected {_EXPECTED}")
    netlocs = rest.rstrip("/").split(",")
    return Target(tuple(_address(plain, netloc, url_given) for netloc in netlocs), resolved)


def _merged(urls: Sequence[str]) -> Target:
    targets = [parse_target(url) for url in urls]
    if not targets:
        raise UsageError(f"no url; expected {_EXPECTED}")
    if len({(target.scheme, target.resolved) for target in targets}) > 1:
        raise UsageError(f"the urls {', '.join(map(str, targets))} have different schemes; give them all the same")
    return Target(tuple(address for target in targets for address in target.addresses), targets[0].resolved)


def _address(scheme: str, netloc: str, url: str) -> Address:
    split = _split(f"{scheme}://{netloc.strip()}", url)
    if not split.hostname:
        raise UsageError(f"cannot use the url {url!r}: the host is missing; expected {_EXPECTED}")
    if split.path.strip("/") or split.query or split.fragment or "@" in split.netloc:
        raise UsageError(f"cannot use the url {url!r}: it has more than a host and a port; expected {_EXPECTED}")
    return Address(scheme, split.hostname, DEFAULT_PORTS[scheme] if split.port is None else split.port)


def _split(one: str, url: str) -> SplitResult:
    try:
        split = urlsplit(one)
        _ = split.port  # urllib checks the port only when asked for it
    except ValueError as error:
        raise UsageError(f"cannot use the url {url!r}: {error}") from error
    return split

"""Urls, and the clients that they ask for."""

from __future__ import annotations

from typing import Any

import pytest

import millibert
from millibert._address import Address, parse_address, parse_target


@pytest.mark.parametrize(
    ("url", "address", "netloc"),
    [
        ("grpc://127.0.0.1:9001", Address("grpc", "127.0.0.1", 9001), "127.0.0.1:9001"),
        ("grpc://triton", Address("grpc", "triton", 8001), "triton:8001"),
        ("http://triton/", Address("http", "triton", 8000), "triton:8000"),
        ("http://[::1]:80", Address("http", "::1", 80), "[::1]:80"),
        ("grpcs://gateway", Address("grpcs", "gateway", 443), "gateway:443"),
        ("https://gateway:8443", Address("https", "gateway", 8443), "gateway:8443"),
    ],
)
def test_address(url: str, address: Address, netloc: str) -> None:
    assert parse_address(url) == address
    assert address.netloc == netloc
    assert isinstance(millibert.connect(url, "m"), millibert.GrpcClient if url[0] == "g" else millibert.HttpClient)


@pytest.mark.parametrize(
    ("url", "hosts", "resolved", "shown"),
    [
        ("grpc://a,b:9", ["a:8001", "b:9"], False, "grpc://a:8001,b:9"),
        (["http://a", "http://b:1,c:2"], ["a:8000", "b:1", "c:2"], False, "http://a:8000,b:1,c:2"),
        ("dns:///name:8001", ["name:8001"], True, "grpc+dns://name:8001"),
        ("https+dns://name", ["name:443"], True, "https+dns://name:443"),
    ],
)
def test_targets(url: Any, hosts: list[str], resolved: bool, shown: str) -> None:
    target = parse_target(url)
    assert [address.netloc for address in target.addresses] == hosts
    assert target.resolved == resolved
    assert str(target) == shown


def test_one_server_where_one_is_meant() -> None:
    for url in ("grpc://a,b", "dns:///a"):
        with pytest.raises(millibert.UsageError, match="one server is expected here, such as grpc://a:8001"):
            parse_address(url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("127.0.0.1:8001", "scheme is missing"),
        ("localhost:8001", "scheme is missing"),
        ("", "scheme is missing"),
        ("ftp://host", "scheme 'ftp' is unknown"),
        ("grpc://", "host is missing"),
        ("grpc://host:port", "port"),
        ("http://host:99999", "[Pp]ort"),
        ("http://host/path", "more than a host and a port"),
        ("http://user:secret@host", "more than a host and a port"),
        ("grpc://a,,b", "host is missing"),
        ("dns://name", "scheme 'dns' is unknown"),
        ("grpc+srv://name", r"scheme 'grpc\+srv' is unknown"),
        ([], "no url"),
        (["grpc://a", "http://b"], "different schemes"),
    ],
)
def test_address_refused(url: Any, reason: str) -> None:
    with pytest.raises(millibert.UsageError, match=reason):
        millibert.connect(url, "m")


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(
        millibert.UsageError, match=r"grpc://host:8001, http://host:8000, grpcs://host:443 or https://host:443"
    ):
        millibert.connect("tcp://host:1", "m")


@pytest.mark.parametrize("arguments", [("",), ("a\nb",), ("m", 0), ("m", -1.0), ("m", float("nan")), ("m", True)])
def test_constructor_refuses(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(millibert.UsageError):
        millibert.connect("grpc://host", *arguments)


def test_a_client_refuses_the_other_scheme() -> None:
    with pytest.raises(millibert.UsageError, match="GrpcClient needs a url with grpc://"):
        millibert.GrpcClient("http://host", "m")


def test_each_class_and_function_makes_its_client() -> None:
    made = {type(millibert.connect_async(f"{scheme}://host", "m")) for scheme in ("grpc", "grpcs", "http", "https")}
    assert made == {millibert.AsyncGrpcClient, millibert.AsyncHttpClient}
    assert isinstance(millibert.connect("grpcs://host", "m"), millibert.GrpcClient)
    with pytest.raises(millibert.UsageError, match="AsyncHttpClient needs a url with http://, not 'grpc://host:8001'"):
        millibert.AsyncHttpClient("grpc://host", "m")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tls": millibert.TLS()}, r"grpc://host:8001 is without TLS; with certificates it must be grpcs://"),
        ({"shared_memory": True}, "shared memory needs a server on this machine"),
        ({"headers": {"bad name": "x"}}, "'bad name' cannot be the name of a header"),
        ({"headers": {"name": "line\nbreak"}}, "the header 'name' must be printable ASCII"),
        ({"token": "secret\n"}, "the header 'authorization' must be printable ASCII"),
    ],
)
def test_options_refused(options: Any, reason: str) -> None:
    with pytest.raises(millibert.UsageError, match=reason) as caught:
        millibert.connect("grpc://host", "m", **options)
    assert "secret" not in str(caught.value)


def test_a_misspelt_option_is_no_option() -> None:
    with pytest.raises(TypeError, match="GrpcClient has no option tokn"):
        millibert.connect("grpc://host", "m", tokn="x")  # type: ignore[call-arg]


def test_a_client_does_not_show_its_secrets() -> None:
    client = millibert.connect("grpc://host", "m", token="secret", headers={"k": "secret"}, restricted={"k": "secret"})
    assert repr(client) == "<GrpcClient 'm' at grpc://host:8001>"
    assert "secret" not in repr(vars(client))

"""The package: what it exports, what an import loads, what an install needs."""

from __future__ import annotations

import importlib.metadata
import pickle
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import millibert

if TYPE_CHECKING:
    pass


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_exported_names() -> None:
    assert set(millibert.__all__) == {
        "AsyncClient", "AsyncGrpcClient", "AsyncHttpClient", "Busy", "Call", "Classification", "Client", "Counters",
        "Failure", "GrpcClient", "HttpClient", "IntentClassifier", "InvalidRequest", "MillibertError", "ModelState",
        "NotFound", "Prediction", "Retry", "ServerFault", "ServerInfo", "ServiceError", "TLS", "Timeout",
        "Unavailable", "UsageError", "connect", "connect_async",
    }  # fmt: skip
    assert all(getattr(millibert, name).__name__ == name for name in millibert.__all__)
    assert set(millibert.__all__) <= set(dir(millibert))
    with pytest.raises(AttributeError, match="'millibert' has no attribute 'Nothing'"):
        _ = millibert.Nothing


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import millibert", ["grpc", "gevent", "aiohttp", "tritonclient"]),
        ("from millibert import HttpClient", ["grpc"]),
        ("from millibert import AsyncHttpClient", ["grpc"]),
        ("from millibert import GrpcClient", ["gevent", "aiohttp"]),
        ("from millibert import AsyncGrpcClient", ["gevent", "aiohttp"]),
        ("import millibert; millibert.connect('http://a', 'm')", ["grpc"]),
        ("import millibert; millibert.connect_async('grpc://a', 'm')", ["gevent", "aiohttp"]),
    ],
)
def test_light_import(statement: str, absent: list[str]) -> None:
    absent = [*absent, "torch", "transformers", "opentelemetry"]
    loaded = python(f"import sys; {statement}; print(*(name for name in {absent} if name in sys.modules))")
    assert loaded.split() == []


@pytest.mark.parametrize(("absent", "url"), [("grpc", "http://a"), ("geventhttpclient", "grpc://a")])
def test_each_protocol_without_the_other_installed(absent: str, url: str) -> None:
    # None in sys.modules makes an import fail as that of a package that is not installed.
    print(python(f"import sys; sys.modules[{absent!r}] = None; import millibert; millibert.connect({url!r}, 'm')"))


def test_the_base_install_is_what_the_protocols_need() -> None:
    base = [each for each in importlib.metadata.requires("millibert") or [] if "extra ==" not in each]
    assert sorted(re.split(r"[^\w-]", each)[0] for each in base) == ["numpy", "tqdm", "tritonclient"]
    assert any(each.startswith("tritonclient[grpc,http]") for each in base)


def test_errors_survive_pickling() -> None:
    error = millibert.NotFound("no such model", endpoint="grpc://a:1", model="m", request_id="r-1", attempts=2)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is millibert.NotFound
    assert str(again) == str(error)
    assert str(error).startswith("no such model (model 'm' at grpc://a:1, request r-1, 2 attempts); `millibert status`")
    assert (again.reason, again.endpoint, again.model) == ("no such model", "grpc://a:1", "m")
    assert (again.request_id, again.attempts) == ("r-1", 2)

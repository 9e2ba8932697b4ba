"""TLS, mutual TLS, tokens, restricted APIs and trace context: behind nginx, and with Triton's own options."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.clients import FORMS, open_client, protocol
from tests.conftest import CLIENT_REPOSITORY
from tests.misbehaving import Recorder, Reply

import millibert
from millibert import TLS
from millibert_ensemble import installation
from millibert_ensemble.ports import ANY_PORTS, reserve
from millibert_ensemble.server import TritonServer

NAME = "gateway.test"
TOKEN = "letmein"


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass(frozen=True)
class Authority:
    """A certificate authority of our own, and certificates from it."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def cert(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def make(self, name: str, *names: str) -> None:
        """A key, and a certificate for DNS names and IP addresses."""
        (self.folder / "extensions").write_text(f"subjectAltName={','.join(names)}\n")
        request = self.folder / f"{name}.csr"
        self._openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
                      "-keyout", self.key(name), "-out", request)  # fmt: skip
        self._openssl("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self.key("ca"), "-CAcreateserial",
                      "-days", "2", "-extfile", self.folder / "extensions", "-out", self.cert(name))  # fmt: skip

    def make_itself(self) -> None:
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                      "-subj", "/CN=authority of a test", "-keyout", self.key("ca"), "-out", self.ca)  # fmt: skip

    @staticmethod
    def _openssl(*arguments: Any) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    made = Authority(tmp_path_factory.mktemp("certificates"))
    made.make_itself()
    made.make("server", f"DNS:{NAME}", "IP:127.0.0.1")
    made.make("client", "DNS:client")
    return made


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[TritonServer]:
    """Triton with mutual TLS of its own on gRPC, and a restricted API on HTTP."""
    try:
        installation.locate()
    except millibert.UsageError as error:
        pytest.skip(str(error))
    options = [
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={authority.cert('server')}",
        f"--grpc-server-key={authority.key('server')}",
        f"--grpc-root-cert={authority.ca}",
        "--http-restricted-api=statistics,model-repository:admin-key=hush",
        "--grpc-restricted-protocol=statistics,model-repository:admin-key=hush",
    ]
    with TritonServer(CLIENT_REPOSITORY, ports=ANY_PORTS, options=options) as running:
        yield running


NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ }}
http {{
  access_log off; client_max_body_size 64m; client_body_buffer_size 64m;
  ssl_certificate {cert}; ssl_certificate_key {key};
  client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  server {{
    listen 127.0.0.1:{https} ssl; {mutual}
    location / {{ if ($http_authorization != "Bearer {token}") {{ return 401; }}
                  proxy_pass http://127.0.0.1:{http}; proxy_http_version 1.1; }}
  }}
  server {{
    listen 127.0.0.1:{grpcs} ssl http2; {mutual}
    location / {{ if ($http_authorization != "Bearer {token}") {{ return 401; }}
                  grpc_pass grpcs://127.0.0.1:{grpc}; grpc_ssl_certificate {client_cert};
                  grpc_ssl_certificate_key {client_key}; }}
  }}
}}
"""


@contextmanager
def nginx(folder: Path, authority: Authority, server: TritonServer, mutual: bool) -> Iterator[dict[str, str]]:
    """A proxy that ends TLS in front of the server and asks for a token; yields its url of each protocol."""
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx")
    _, ports = reserve("127.0.0.1", ANY_PORTS)
    verify = f"ssl_client_certificate {authority.ca}; ssl_verify_client on;" if mutual else ""
    config = folder / "nginx.conf"
    facts = {
        "folder": folder,
        "token": TOKEN,
        "mutual": verify,
        "cert": authority.cert("server"),
        "key": authority.key("server"),
        "client_cert": authority.cert("client"),
        "client_key": authority.key("client"),
        "https": ports.http,
        "grpcs": ports.grpc,
        "http": server.ports.http,
        "grpc": server.ports.grpc,
    }
    config.write_text(NGINX.format(**facts))
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(config)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 10
        while not (folder / "pid").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read())
        yield {"http": f"https://127.0.0.1:{ports.http}", "grpc": f"grpcs://127.0.0.1:{ports.grpc}"}
    finally:
        process.terminate()
        process.wait(10)


def refusal(form: str, url: str, **options: Any) -> millibert.ServiceError:
    """The error of a call that must not succeed."""
    with open_client(form, url, **options) as client, pytest.raises(millibert.ServiceError) as caught:
        client.classify("hello")
    return caught.value


# Behind a proxy


@pytest.mark.e2e
def test_tls_and_a_token_through_nginx(form: str, tmp_path: Path, authority: Authority, server: TritonServer) -> None:
    with nginx(tmp_path, authority, server, mutual=False) as urls:
        url = urls[protocol(form)]
        trusting = TLS(ca=authority.ca)
        with open_client(form, url, tls=trusting, token=TOKEN) as client:
            assert client.ready()
            assert client.classify("hello").label == "greeting"
            assert client.classify(["hello " * 10_000] * 8)[7].label == "greeting"
            assert client.labels()[0] == "greeting"
        refused = refusal(form, url, tls=trusting, token="wrong-secret")
        assert isinstance(refused, millibert.InvalidRequest)
        assert "401" in str(refused)
        assert "wrong-secret" not in f"{refused!r} {refused.__cause__!r}"
        unknown = refusal(form, url, token=TOKEN)
        assert isinstance(unknown, millibert.Unavailable)
        assert "certificate" in str(unknown).lower()
        by_name = url.replace("127.0.0.1", "localhost")  # the certificate is not for that name
        assert isinstance(refusal(form, by_name, tls=trusting, token=TOKEN), millibert.Unavailable)
        named = TLS(ca=authority.ca, server_name=NAME)
        with open_client(form, by_name, tls=named, token=TOKEN) as client:
            assert client.classify("hello").label == "greeting"


@pytest.mark.e2e
def test_mutual_tls_through_nginx(form: str, tmp_path: Path, authority: Authority, server: TritonServer) -> None:
    shown = TLS(authority.ca, authority.cert("client"), authority.key("client"))
    with nginx(tmp_path, authority, server, mutual=True) as urls:
        url = urls[protocol(form)]
        with open_client(form, url, tls=shown, token=TOKEN) as client:
            assert client.classify("hello").label == "greeting"
        assert refusal(form, url, tls=TLS(authority.ca), token=TOKEN)


@pytest.mark.e2e
def test_certificates_of_one_name_at_several_addresses(
    form: str, tmp_path: Path, authority: Authority, server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dns names a connection goes to an address, and the certificate must still be the name's."""
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **named: look_up("127.0.0.1" if host == NAME else host, *rest, **named),
    )
    with nginx(tmp_path, authority, server, mutual=False) as urls:
        scheme, port = urls[protocol(form)].partition("://")[0], urls[protocol(form)].rpartition(":")[2]
        with open_client(form, f"{scheme}+dns://{NAME}:{port}", tls=TLS(authority.ca), token=TOKEN) as client:
            assert client.classify("hello").label == "greeting"
        wrong = refusal(form, f"{scheme}+dns://localhost:{port}", tls=TLS(authority.ca), token=TOKEN)
        assert isinstance(wrong, millibert.Unavailable)


# Triton's own


@pytest.mark.e2e
@pytest.mark.parametrize("grpc_form", ["grpc", "grpc-aio"])
def test_mutual_tls_of_triton(grpc_form: str, authority: Authority, server: TritonServer) -> None:
    url = f"grpcs://127.0.0.1:{server.ports.grpc}"
    shown = TLS(authority.ca, authority.cert("client"), authority.key("client"))
    with open_client(grpc_form, url, tls=shown) as client:
        assert client.classify("hello").label == "greeting"
    for tls in (TLS(authority.ca), None):
        with open_client(grpc_form, url, tls=tls) as client, pytest.raises(millibert.Unavailable):
            client.classify("hello")
    with open_client(grpc_form, server.grpc_url) as client, pytest.raises(millibert.Unavailable, match=r"port|lost"):
        client.classify("hello")


@pytest.mark.e2e
def test_the_key_of_a_restricted_api(form: str, authority: Authority, server: TritonServer) -> None:
    grpc = protocol(form) == "grpc"
    url = f"grpcs://127.0.0.1:{server.ports.grpc}" if grpc else server.http_url
    tls = TLS(authority.ca, authority.cert("client"), authority.key("client")) if grpc else None
    with open_client(form, url, tls=tls, restricted={"admin-key": "hush"}) as client:
        assert "echo" in client.statistics()
        assert client.models()
    for restricted in (None, {"admin-key": "wrong-secret"}):
        with open_client(form, url, tls=tls, restricted=restricted) as client:
            assert client.classify("hello").label == "greeting", "what is not restricted needs no key"
            with pytest.raises(millibert.InvalidRequest, match="restricted") as refused:
                client.statistics()
            assert "wrong-secret" not in str(refused.value)
            assert refused.value.attempts == 1


@pytest.mark.e2e
def test_the_serve_command_passes_options_on_to_triton(triton: Any) -> None:
    with triton(CLIENT_REPOSITORY, "--", "--grpc-restricted-protocol=statistics:admin-key=hush") as running:
        with (
            millibert.connect(running.grpc_url, "echo") as client,
            pytest.raises(millibert.InvalidRequest, match="restricted"),
        ):
            client.statistics()
        with millibert.connect(running.grpc_url, "echo", restricted={"admin-key": "hush"}) as client:
            assert "echo" in client.statistics()


def test_what_is_no_option_of_triton_is_refused() -> None:
    command = [sys.executable, "-m", "millibert.cli", "serve", "--repository", "x", "grpc-use-ssl=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "options of tritonserver are written --NAME=VALUE, not grpc-use-ssl=true" in done.stderr


# Files that cannot be used


@pytest.mark.parametrize("url", ["grpcs://host", "https://host"])
def test_unusable_files_are_named(url: str, tmp_path: Path, authority: Authority) -> None:
    nonsense, missing = tmp_path / "nonsense.pem", tmp_path / "missing.pem"
    nonsense.write_text("nonsense")
    wrong = [
        (TLS(missing), r"missing\.pem: cannot be read: No such file"),
        (TLS(nonsense), r"nonsense\.pem: no certificates in PEM"),
        (TLS(authority.ca, authority.cert("client"), missing), r"missing\.pem: cannot be read"),
        (TLS(authority.ca, authority.cert("client"), authority.key("server")), "are no certificate and its key"),
    ]
    for tls, reason in wrong:
        with pytest.raises(millibert.UsageError, match=reason):
            millibert.connect(url, "m", tls=tls)
    with pytest.raises(millibert.UsageError, match="mutual TLS needs both files"):
        TLS(cert=authority.cert("client"))


# Headers


def test_tokens_and_headers_are_asked_for_at_every_attempt(form: str) -> None:
    tokens = iter(["one", "two", "three"])

    async def later() -> str:
        return next(tokens)

    given = later if form.endswith("aio") else lambda: next(tokens)
    with Recorder(protocol(form), Reply("UNAVAILABLE", "away")).serve() as server:
        options: Any = {"token": given, "headers": lambda: {"X-Tenant": "a"}, "restricted": {"key": "k"}}
        with open_client(form, server.url, "m", **options) as client:
            client.classify("a")
            client.classify("a")
    assert [asked.headers["authorization"] for asked in server.asked] == ["Bearer one", "Bearer two", "Bearer three"]
    assert {asked.headers["x-tenant"] for asked in server.asked} == {"a"}
    restricted = "triton-grpc-protocol-key" if protocol(form) == "grpc" else "key"
    assert {asked.headers[restricted] for asked in server.asked} == {"k"}


def test_what_a_callback_raises_is_its_callers(form: str) -> None:
    def no_token() -> str:
        raise PermissionError("vault is sealed")

    wrong: list[tuple[Any, type[Exception], str]] = [
        (no_token, PermissionError, "vault is sealed"),
        (lambda: "line\nbreak", millibert.UsageError, "'authorization' must be printable"),
    ]
    calls: list[millibert.Call] = []
    with Recorder(protocol(form)).serve() as server:
        for token, kind, reason in wrong:
            with (
                open_client(form, server.url, "m", token=token, on_call=calls.append) as client,
                pytest.raises(kind, match=reason),
            ):
                client.classify("a")
        assert server.asked == []
    assert [(call.outcome, call.error) for call in calls] == [("PermissionError", None), ("UsageError", None)]


def test_a_coroutine_for_a_client_of_threads() -> None:
    async def token() -> str:
        return "x"

    with (
        Recorder("http").serve() as server,
        millibert.connect(server.url, "m", token=token) as client,
        pytest.raises(millibert.UsageError, match="a coroutine function can only be called by the clients for asyncio"),
    ):
        client.classify("a")


def test_the_trace_goes_on_at_the_server(form: str) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider().get_tracer("test")
    with Recorder(protocol(form)).serve() as server, open_client(form, server.url, "m") as client:
        client.classify("a")
        with tracer.start_as_current_span("of the application") as span:
            client.classify("a")
    outside, inside = (asked.headers.get("traceparent") for asked in server.asked)
    assert outside is None
    context = span.get_span_context()
    assert inside is not None
    assert inside[:53] == f"00-{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}-"

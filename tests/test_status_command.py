"""`millibert status` on real Tritons: up, down, half ready, and no Triton at all."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tests.conftest import CLIENT_REPOSITORY
from tests.statuses import SCHEMES, document, served, status, url_of

import millibert
from millibert import cli
from millibert_ensemble.server import TritonServer

BROKEN_MODEL = """
class TritonPythonModel:
    def initialize(self, args):
        raise RuntimeError("no such file: weights")

    def execute(self, requests):
        return []
"""


@pytest.fixture(scope="module")
def half_broken(tmp_path_factory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("half") / "repository"
    shutil.copytree(CLIENT_REPOSITORY, repository)
    shutil.copytree(repository / "worker", repository / "broken")
    (repository / "broken" / "1" / "model.py").write_text(BROKEN_MODEL)
    with served(repository, "--exit-on-error=false") as server:
        wait_for_states(server.http_url, {"broken": "UNAVAILABLE", "echo": "READY", "worker": "READY"})
        yield server


def wait_for_states(url: str, states: dict[str, str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        with millibert.connect(url, "echo") as client:
            try:
                found = {state.name: state.state for state in client.models()}
            except millibert.Unavailable:
                found = {}
        if found == states:
            return
        assert time.monotonic() < end, found
        time.sleep(0.1)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# One server, all ready


@pytest.mark.e2e
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_ready_server_at_a_glance(server, scheme, capsys):
    url = url_of(server, scheme)
    code, out = status(capsys, "--url", url)
    assert code == 0
    first, header, echo, worker = out.splitlines()
    assert first.startswith(f"{url}  triton 2.")
    assert "  live and ready  answered in " in first
    names = "model version state requests failures texts each queue ms compute ms total ms"
    assert " ".join(header.split()) == names
    assert echo.split()[:3] == ["echo", "1", "READY"]
    assert echo.endswith("  4 labels")
    assert worker.split()[:3] == ["worker", "1", "READY"]
    assert worker.startswith("    worker")
    assert echo.startswith("  echo")


@pytest.mark.e2e
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_document_counts_what_was_served(server, scheme, capsys):
    url = url_of(server, scheme)
    _, before = document(capsys, "--url", url)
    with millibert.connect(url, "echo") as client:
        client.classify(["hello", "sleep 0.05"])
        with pytest.raises(millibert.ServerFault):
            client.classify("crash")
    code, after = document(capsys, "--url", url)
    assert code == 0
    assert after["ready"] is True
    (found,) = after["servers"]
    assert (found["url"], found["live"], found["ready"], found["error"], found["notes"]) == (url, True, True, None, [])
    assert found["name"] == "triton"
    assert 0 < found["answer_ms"] < 10_000
    echo, worker = found["models"]
    assert (echo["name"], echo["versions"], echo["state"], echo["reason"]) == ("echo", ["1"], "READY", "")
    assert (echo["steps"], echo["labels"], worker["steps"], worker["labels"]) == (["worker"], 4, [], None)
    earlier = before["servers"][0]["models"][1]["statistics"]
    counted = {key: worker["statistics"][key] - earlier[key] for key in ("requests", "failures", "texts")}
    assert counted == {"requests": 1, "failures": 1, "texts": 2}
    assert worker["statistics"]["total_ms"] >= worker["statistics"]["compute_ms"] > 0
    assert worker["statistics"]["texts_per_execution"] > 0
    assert worker["statistics"]["queue_ms"] >= 0


@pytest.mark.e2e
def test_one_model_and_those_it_runs(server, capsys):
    names = {}
    for model in ("echo", "worker"):
        code, report = document(capsys, "--url", server.grpc_url, "--model", model)
        assert code == 0
        names[model] = [each["name"] for each in report["servers"][0]["models"]]
    assert names == {"echo": ["echo", "worker"], "worker": ["worker"]}
    code, out = status(capsys, "--url", server.grpc_url, "--model", "worker")
    assert out.splitlines()[2].startswith("  worker")


@pytest.mark.e2e
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_unknown_model(server, scheme, capsys):
    code, out = status(capsys, "--url", url_of(server, scheme), "--model", "nobody")
    assert code == 1
    assert "live and ready" in out
    assert "note: no model 'nobody'; there is echo, worker" in out


@pytest.mark.e2e
def test_a_real_release(triton, release, capsys):
    with triton(release.repository) as running:
        with millibert.connect(running.grpc_url, "support") as client:
            client.classify("where is my parcel")
        code, report = document(capsys, "--url", running.grpc_url)
        assert code == 0
        models = {each["name"]: each for each in report["servers"][0]["models"]}
        code, out = status(capsys, "--url", running.http_url)
    assert models["support"]["steps"] == ["tokenizer", "bert", "postprocess"]
    assert models["support"]["labels"] == 10
    assert {name for name, each in models.items() if each["labels"] is None} == {"tokenizer", "bert", "postprocess"}
    rows = [line for line in out.splitlines() if "READY" in line]
    assert [row.split()[0] for row in rows] == ["support", "tokenizer", "bert", "postprocess"]
    assert [len(row) - len(row.lstrip()) for row in rows] == [2, 4, 4, 4]


# Several addresses


@pytest.mark.e2e
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_address_is_asked_and_the_one_that_is_down_shows(server, scheme, capsys):
    url, down = url_of(server, scheme), free_port()
    code, report = document(capsys, "--url", f"{url},127.0.0.1:{down},{url.partition('://')[2]}")
    assert code == 1
    assert report["ready"] is False
    up, gone = report["servers"]
    assert (up["url"], up["live"], up["ready"]) == (url, True, True)
    assert (gone["url"], gone["live"], gone["ready"]) == (f"{scheme}://127.0.0.1:{down}", False, False)
    assert "Connection refused" in gone["error"]
    assert gone["models"] == []
    code, out = status(capsys, "--url", f"{url},127.0.0.1:{down}")
    assert code == 1
    first, second = out.split("\n\n")
    assert "live and ready" in first
    assert second == f"{scheme}://127.0.0.1:{down}  DOWN  cannot reach the server: Connection refused\n"


@pytest.mark.e2e
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_address_of_a_name(server, scheme, capsys):
    port = url_of(server, scheme).rpartition(":")[2]
    code, report = document(capsys, "--url", f"{scheme}+dns://localhost:{port}")
    # A machine may know localhost by its IPv6 address too, at which the server does not listen.
    live = {each["url"]: each["live"] for each in report["servers"]}
    assert live[f"{scheme}://127.0.0.1:{port}"] is True
    assert code == (0 if all(live.values()) else 1)


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_an_address_of_a_name_shows_the_names_certificate(tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("key.pem", "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", files[0], "-out", files[1]]
    subprocess.run(command, check=True, capture_output=True)
    secure = ["--grpc-use-ssl=true", f"--grpc-server-cert={files[1]}", f"--grpc-server-key={files[0]}"]
    with served(CLIENT_REPOSITORY, *secure) as server:
        server.wait_ready()
        port = server.ports.grpc
        code, report = document(capsys, "--url", f"grpcs+dns://localhost:{port}", "--ca", files[1])
        live = {each["url"]: each["live"] for each in report["servers"]}
        assert live[f"grpcs://127.0.0.1:{port}"] is True
        code, report = document(capsys, "--url", f"grpcs://127.0.0.1:{port}", "--ca", files[1], "--timeout", "5")
        assert code == 1  # the certificate says nothing of the address
        assert report["servers"][0]["live"] is False


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:{}", "http://127.0.0.1:{}"])
def test_a_server_that_is_not_there(url, capsys):
    code, out = status(capsys, "--url", url.format(free_port()))
    assert code == 1
    assert out.endswith("  DOWN  cannot reach the server: Connection refused\n")


@pytest.mark.parametrize("url", ["http://nowhere.invalid:1", "grpc://nowhere.invalid:1", "dns:///nowhere.invalid:1"])
def test_a_name_that_nobody_knows(url, capsys):
    code, out = status(capsys, "--url", url)
    assert code == 1
    assert "nowhere.invalid:1  DOWN  cannot reach the server: the host name is not known\n" in out


# Not all ready


@pytest.mark.e2e
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_that_failed_to_load(half_broken, scheme, capsys):
    code, out = status(capsys, "--url", url_of(half_broken, scheme))
    assert code == 1
    first, _, broken, echo, worker = out.splitlines()
    assert "  live, NOT READY  " in first
    assert broken.split()[:3] == ["broken", "1", "UNAVAILABLE"]
    assert broken.endswith("no such file: weights")
    assert "READY" in echo
    assert "READY" in worker
    code, report = document(capsys, "--url", url_of(half_broken, scheme), "--model", "broken")
    assert code == 1
    (broken,) = report["servers"][0]["models"]
    assert (broken["state"], broken["statistics"]) == ("UNAVAILABLE", None)


@pytest.mark.e2e
def test_a_model_that_nobody_loaded_counts_only_when_it_is_asked_for(capsys):
    with served(CLIENT_REPOSITORY, "--model-control-mode=explicit", "--load-model=worker") as server:
        wait_for_states(server.http_url, {"echo": "", "worker": "READY"})
        for scheme in SCHEMES:
            code, out = status(capsys, "--url", url_of(server, scheme))
            assert code == 0
            assert [line.split()[1:4] for line in out.splitlines()[2:]] == [["-", "NOT", "LOADED"], ["1", "READY", "0"]]
            assert status(capsys, "--url", url_of(server, scheme), "--model", "worker")[0] == 0
            assert status(capsys, "--url", url_of(server, scheme), "--model", "echo")[0] == 1


# No Triton


@pytest.mark.parametrize(("code", "body"), [(200, b"<html>"), (200, b"[]"), (404, b"Not Found"), (500, b"")])
def test_another_kind_of_server(code, body, capsys):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            exit_status, out = status(capsys, "--url", f"http://127.0.0.1:{httpd.server_port}")
        finally:
            httpd.shutdown()
            thread.join()
    assert exit_status == 1
    assert f"http://127.0.0.1:{httpd.server_port}  DOWN  no Triton answers here: " in out


@pytest.mark.e2e
def test_the_wrong_port_of_a_triton(server, capsys):
    swapped = [server.grpc_url.replace("grpc://", "http://"), server.http_url.replace("http://", "grpc://")]
    for url in swapped:
        code, out = status(capsys, "--url", url, "--timeout", "5")
        assert code == 1
        assert f"{url}  DOWN  " in out


# Usage


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--url"),
        (["--url", "127.0.0.1:8001"], "the scheme is missing"),
        (["--url", "grpc://127.0.0.1:1", "--timeout", "0"], "number above 0"),
        (["--url", "grpc://127.0.0.1:1", "text"], "unrecognized arguments: text"),
    ],
)
def test_wrong_usage(arguments, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", *arguments])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_certificate_that_is_not_there(capsys):
    assert cli.main(["status", "--url", "https://127.0.0.1:1", "--ca", "no.pem"]) == 1
    assert "no.pem: cannot be read" in capsys.readouterr().err


def test_it_needs_nothing_but_the_clients():
    code = (
        "import sys; from millibert import cli\n"
        f"assert cli.main(['status', '--url', 'http://127.0.0.1:{free_port()}']) == 1\n"
        "print([name for name in ('torch', 'transformers', 'psutil', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"

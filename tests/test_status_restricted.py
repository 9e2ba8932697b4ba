"""`millibert status` on real Tritons that do not tell everyone everything."""

from __future__ import annotations

import time

import pytest
from tests.conftest import CLIENT_REPOSITORY
from tests.statuses import SCHEMES, document, served, status, url_of

import millibert

KEY, VALUE = "staff", "let-me-in"


def restricted(*apis: str) -> list[str]:
    names = ",".join(apis)
    return [f"--http-restricted-api={names}:{KEY}={VALUE}", f"--grpc-restricted-protocol={names}:{KEY}={VALUE}"]


@pytest.mark.e2e
def test_a_hidden_list_of_models(capsys, tmp_path):
    with served(CLIENT_REPOSITORY, *restricted("model-repository")) as server:
        server.wait_ready()
        for scheme in SCHEMES:
            url = url_of(server, scheme)
            code, report = document(capsys, "--url", url)
            assert code == 0
            (found,) = report["servers"]
            assert [(each["name"], each["state"], each["versions"]) for each in found["models"]] == [
                ("echo", "READY", []),
                ("worker", "READY", []),
            ]
            assert found["models"][0]["steps"] == ["worker"]
            (note,) = found["notes"]
            assert note.startswith("no list of models: ")
            assert "restricted" in note
            code, report = document(capsys, "--url", url, "--model", "nobody")
            assert code == 1
            assert report["servers"][0]["models"][0]["state"] == "NOT READY"
            secret = tmp_path / "key"
            secret.write_text(VALUE)
            code, report = document(capsys, "--url", url, "--restricted-key", f"{KEY}={secret}")
            assert code == 0
            assert report["servers"][0]["notes"] == []
            assert report["servers"][0]["models"][0]["versions"] == ["1"]


@pytest.mark.e2e
def test_hidden_statistics_and_list(capsys):
    with served(CLIENT_REPOSITORY, *restricted("model-repository", "statistics")) as server:
        server.wait_ready()
        for scheme in SCHEMES:
            code, out = status(capsys, "--url", url_of(server, scheme), "--model", "echo")
            assert code == 0
            assert out.splitlines()[2].split()[:9] == ["echo", "-", "READY", *"------"]
            code, report = document(capsys, "--url", url_of(server, scheme))
            assert code == 1
            assert report["servers"][0]["ready"] is None
            assert report["servers"][0]["live"] is True


@pytest.mark.e2e
def test_hidden_health(capsys):
    with served(CLIENT_REPOSITORY, *restricted("health", "model-repository", "metadata", "model-config")) as server:
        # Health over HTTP is hidden too, so that only an answer tells that it is up.
        wait_for_answer(server.grpc_url)
        for scheme in SCHEMES:
            code, report = document(capsys, "--url", url_of(server, scheme))
            assert code == 1
            (found,) = report["servers"]
            assert (found["live"], found["ready"], found["name"], found["version"]) == (True, None, None, None)
            assert [each["state"] for each in found["models"]] == ["NOT TOLD", "NOT TOLD"]


@pytest.mark.e2e
def test_a_server_that_tells_nothing(capsys):
    apis = ("health", "metadata", "model-config", "model-repository", "statistics")
    with served(CLIENT_REPOSITORY, *restricted(*apis)) as server:
        wait_for_answer(server.grpc_url)
        for scheme in SCHEMES:
            code, out = status(capsys, "--url", url_of(server, scheme))
            assert code == 1
            assert "  DOWN  it refuses every question: This " in out


def wait_for_answer(url: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    with millibert.connect(url, "echo") as client:
        while True:
            try:
                client.classify("hello")
            except millibert.ServiceError:
                assert time.monotonic() < end
                time.sleep(0.1)
            else:
                return

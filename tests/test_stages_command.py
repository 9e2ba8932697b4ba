"""`millibert stages` on a real Triton under real requests."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import millibert
from millibert import Counters, cli, stages_command
from millibert_ensemble.cpu_time import SERVER, cpu_seconds, server_at

TEXTS = ["where is my parcel", "I was charged twice", "change my address please", "cancel it"]


@pytest.fixture(scope="module")
def server(triton, release):
    with triton(release.repository) as running:
        yield running


def classify(server, requests, texts=1):
    with millibert.connect(server.grpc_url, "support") as client:
        for _ in range(requests):
            client.classify(TEXTS[:texts])


def statistics(url):
    with millibert.connect(url, "support") as client:
        return client.statistics()


@pytest.mark.e2e
@pytest.mark.parametrize("transport", ["grpc_url", "http_url"])
def test_counts_of_a_window_are_those_of_the_requests_in_it(server, transport):
    url = getattr(server, transport)
    before = statistics(url)
    classify(server, 6, texts=3)
    # Triton counts a request when it lets go of it, which may be after it was answered.
    deadline, after = time.monotonic() + 10, before
    while any(after[model].requests < before[model].requests + 6 for model in before) and time.monotonic() < deadline:
        after = statistics(url)
    for model in ("support", "tokenizer", "bert", "postprocess"):
        counted = after[model] - before[model]
        assert (counted.requests, counted.texts, counted.failures) == (6, 18, 0)
        assert counted.total_ns > 0
    bert = after["bert"] - before["bert"]
    assert bert.executions == 6
    assert bert.texts_per_execution == 3
    parts = sum(bert.milliseconds(part) for part in ("queue", "input", "compute", "output"))
    assert parts <= bert.milliseconds("total") * 1.01


@pytest.mark.e2e
def test_the_report_of_a_window_under_load(server, capsys):
    stop = threading.Event()

    def load():
        while not stop.is_set():
            classify(server, 5, texts=2)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        command = ["stages", "--url", server.grpc_url, "--model", "support", "--seconds", "1.5"]
        assert cli.main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert cli.main(command) == 0
        table = capsys.readouterr().out
    finally:
        stop.set()
        thread.join()
    assert [stage["model"] for stage in report["stages"]] == ["tokenizer", "bert", "postprocess"]
    assert report["requests"] > 0
    assert report["texts_per_second"] == pytest.approx(2 * report["requests_per_second"], rel=0.2)
    assert report["total_ms"] == pytest.approx(
        report["between_stages_ms"] + sum(stage["total_ms"] for stage in report["stages"])
    )
    cpu = report["cpu_seconds_per_1000_requests"]
    assert set(cpu) == {"tritonserver", "tokenizer", "bert", "postprocess"}
    assert cpu["bert"] > 0
    for word in ("support:", "requests/s", "tokenizer", "between stages", "CPU seconds for 1,000 requests: bert"):
        assert word in table


@pytest.mark.e2e
def test_padding_is_counted_by_the_engine(server, capsys):
    command = ["stages", "--url", server.grpc_url, "--model", "support", "--seconds", "0", "--json"]
    classify(server, 3, texts=4)
    assert cli.main([*command, "--metrics-url", server.metrics_url]) == 0
    # Rows are of a few widths, and a text may be alone in one.
    assert 0 < json.loads(capsys.readouterr().out)["padding"] < 0.7
    assert cli.main([*command, "--metrics-url", f"{server.http_url}/nowhere"]) == 1
    assert "is this the metrics port?" in capsys.readouterr().err


def test_padding_is_a_share_of_the_work_or_unknown():
    tokens = {"text": 60.0, "computed": 80.0}
    assert stages_command.padding(tokens) == 0.25
    assert stages_command.padding({**tokens, "another": 120.0}) == 0.25  # what other versions count too
    assert stages_command.padding({"text": 80.0, "computed": 80.0}) == 0
    assert stages_command.padding({}) is None
    assert stages_command.padding({"text": 60.0}) is None
    assert stages_command.padding({**tokens, "computed": 0.0}) is None


@pytest.mark.e2e
def test_since_the_models_were_loaded(server, capsys):
    classify(server, 1)
    assert cli.main(["stages", "--url", server.http_url, "--model", "support", "--seconds", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seconds"] is None
    assert report["requests"] >= 1


@pytest.mark.e2e
def test_a_quiet_window_and_an_unknown_model_are_told(server, capsys):
    command = ["stages", "--url", server.grpc_url, "--seconds", "0.2", "--model"]
    assert cli.main([*command, "support"]) == 1
    assert "no request was answered" in capsys.readouterr().err
    assert cli.main([*command, "nobody"]) == 1
    assert "nobody" in capsys.readouterr().err


@pytest.mark.e2e
def test_the_servers_processes_are_found_by_its_port(server):
    port = int(server.http_url.rpartition(":")[2])
    pid = server_at("127.0.0.1", port)
    assert pid is not None
    assert pid == server.tritonserver().pid
    assert set(cpu_seconds(pid)) == {SERVER, "tokenizer", "bert", "postprocess"}
    assert server_at("127.0.0.1", 1) is None
    assert server_at("192.0.2.1", port) is None


def test_counters_add_up():
    first, second = Counters(requests=3, texts=6, executions=2, queue_ns=3_000_000), Counters(requests=1, texts=2)
    assert (first + second) - second == first
    assert first.texts_per_execution == 3
    assert first.milliseconds("queue") == 1
    assert (Counters().texts_per_execution, Counters().milliseconds("total")) == (0, 0)


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:1", "http://127.0.0.1:1"])
def test_a_server_that_is_not_there(url, capsys):
    assert cli.main(["stages", "--url", url, "--model", "support", "--timeout", "5"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"model_stats": [{"no": 1}]}'])
def test_another_kind_of_server_is_told_apart(answer):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            with pytest.raises(millibert.ServerFault):
                statistics(f"http://127.0.0.1:{httpd.server_port}")
        finally:
            httpd.shutdown()
            thread.join()

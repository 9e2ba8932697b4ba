"""More than the engine can do, on a real Triton: who would wait too long is told at once, and it is over at once."""

from __future__ import annotations

import csv
import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import CUSTOMER_SERVICE, rewrite
from tests.plan_on_cpu import NAMED, put_in_the_plans_place

from millibert_ensemble.server import TritonServer

pytestmark = pytest.mark.e2e

MODEL = "support"
MAX_TEXTS = 16
with (CUSTOMER_SERVICE / "test.csv").open() as _file:
    TEXTS = [row["text"] for row in csv.DictReader(_file)][:MAX_TEXTS]


@pytest.fixture(params=["as built", "several tokenizers", "a plan", "a plan, several of each"])
def server(request, repository):
    """With the CPU engine in the plan's place."""
    options = []
    if request.param == "several tokenizers":
        three_instances(repository / "tokenizer" / "config.pbtxt")
    if request.param.startswith("a plan"):
        put_in_the_plans_place(repository)
        options = [NAMED]
    if request.param == "a plan, several of each":
        for model in ("tokenizer", "postprocess"):
            three_instances(repository / model / "configs" / "tensorrt.pbtxt")
    with TritonServer(repository, options=options) as running:
        yield running


def three_instances(config: Path) -> None:
    text, changed = re.subn(r"(instance_group \{\s*count: )1", r"\g<1>3", config.read_text())
    assert changed == 1
    rewrite(config, text)


def ask(server, texts: Sequence[str] = ("where is my parcel",), **parameters: Any) -> tuple[int, dict[str, Any]]:
    """Texts over HTTP in JSON, as curl would send them; status and answer."""
    tensor = {"name": "TEXT", "shape": [len(texts), 1], "datatype": "BYTES", "data": [*texts]}
    body = json.dumps({"parameters": parameters, "inputs": [tensor]}).encode()
    try:
        with urllib.request.urlopen(f"{server.http_url}/v2/models/{MODEL}/infer", body, timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def labels(answer: dict[str, Any]) -> list[str]:
    (found,) = [output["data"] for output in answer["outputs"] if output["name"] == "LABEL"]
    return list(found)


def refused_by(server, model: str) -> float:
    page = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    lines = [it for it in page.splitlines() if "millibert_refused" in it and model in it and '"busy"' in it]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.mark.parametrize("tensorrt_release", ["packed"], indirect=True)
def test_what_would_wait_for_too_long_is_not_even_tokenized(server):
    expected = labels(ask(server, TEXTS)[1])
    with ThreadPoolExecutor(16) as pool:
        # Of 256 texts under way no CPU does as many as this within 10 ms.
        found = list(pool.map(lambda _: ask(server, TEXTS, queue_timeout_ms=10), range(400)))
    assert {status for status, _ in found} == {200, 503}
    assert all(labels(answer) == expected for status, answer in found if status == 200)
    assert all(" busy: " in answer["error"] for status, answer in found if status == 503)
    assert refused_by(server, "tokenizer") > 0
    # It is over at once.
    assert labels(ask(server, TEXTS, queue_timeout_ms=1000)[1]) == expected


@pytest.mark.parametrize("tensorrt_release", ["packed"], indirect=True)
@pytest.mark.parametrize("server", ["as built"], indirect=True)
def test_a_request_that_is_too_late_for_the_engine_is_told_so(server):
    # No text is tokenized within a thousandth of a millisecond.
    status, answer = ask(server, queue_timeout_ms=0.001)
    assert status == 503
    assert "busy" in answer["error"]
    assert ask(server, queue_timeout_ms=5000)[0] == 200
    for wrong in (0, -5, True, "soon"):
        status, answer = ask(server, queue_timeout_ms=wrong)
        assert status == 400
        assert "queue_timeout_ms must be a positive number" in answer["error"]

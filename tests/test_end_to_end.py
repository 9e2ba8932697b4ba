"""A real Triton serving a small real model, from `millibert build`: answers, limits, refusals, failures."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from tests.conftest import CUSTOMER_SERVICE
from tritonclient.utils import InferenceServerException

import millibert

pytestmark = pytest.mark.e2e

MODEL = "support"
MAX_TEXTS = 16
MAX_TOKENS = 64
SCHEMES = ("grpc", "http")
# What fp32 in two engines may differ in a probability.
TOLERANCE = 1e-4

UNICODE = [
    "我的包裹在哪里？已经三个星期了",
    "📦❓ where 😡😡",
    "أين طردي؟ لم يصل بعد",
    "ou\u0301 est mon colis",  # a combining accent
    "mixed עברית and English",
    "\u200b\u200d",  # nothing visible
    "tab\tnew\nline\x00null",
]


@pytest.fixture(scope="module")
def server(release, triton):
    with triton(release.repository) as running:
        yield running


@pytest.fixture(scope="module", params=SCHEMES)
def client(server, request):
    with connect(server, request.param) as made:
        yield made


def connect(server, scheme: str) -> millibert.Client:
    url = {"grpc": server.grpc_url, "http": server.http_url}[scheme]
    return millibert.connect(url, MODEL, timeout=30)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with (CUSTOMER_SERVICE / "test.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def in_process(release):
    """Calibrated probabilities [texts, labels] of the checkpoint in PyTorch, each text by itself."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(release.work / "checkpoint")
    model = BertForSequenceClassification.from_pretrained(release.work / "checkpoint").eval()
    manifest = json.loads((release.repository / "release.json").read_text())
    temperature = manifest["metrics"]["test"]["temperature"]

    def probabilities(texts: list[str]) -> np.ndarray:
        rows = []
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            with torch.inference_mode():
                rows.append(torch.softmax(model(**inputs).logits[0] / temperature, 0).numpy())
        return np.stack(rows)

    return probabilities


def assert_matches(answers, expected: np.ndarray) -> None:
    """Each answer holds the highest probabilities of its row, best first."""
    for answer, row in zip(answers, expected, strict=True):
        scores = [prediction.score for prediction in answer.predictions]
        assert scores == pytest.approx(sorted(row, reverse=True)[: len(scores)], abs=TOLERANCE)
        for prediction in answer.predictions:
            assert row[prediction.id] == pytest.approx(prediction.score, abs=TOLERANCE)


# What is answered.


def test_answers_are_those_of_the_checkpoint(client, texts, in_process):
    some = texts[:48]
    expected = in_process(some)
    assert_matches([client.classify(text) for text in some[:8]], expected[:8])
    for start in range(0, len(some), MAX_TEXTS):
        answers = client.classify(some[start : start + MAX_TEXTS])
        assert_matches(answers, expected[start : start + MAX_TEXTS])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_evaluate_measures_accuracy_and_agreement_with_the_checkpoint(server, release, scheme, texts):
    url = {"grpc": server.grpc_url, "http": server.http_url}[scheme]
    command = [sys.executable, "-m", "millibert.cli", "evaluate", "--url", url, "--model", MODEL, "--json"]
    data = ["--data", str(CUSTOMER_SERVICE / "test.csv"), "--checkpoint", str(release.work / "checkpoint")]
    figures = json.loads(subprocess.run([*command, *data], capture_output=True, check=True).stdout)
    manifest = json.loads((release.repository / "release.json").read_text())
    assert figures["n"] == len(texts) == 250
    assert figures["errors"] == 0
    assert figures["agreement"] >= 0.999
    assert figures["accuracy"] == pytest.approx(manifest["metrics"]["test"]["engine_score"], abs=1e-9)


def test_labels_and_ids_belong_together(client, texts):
    names: dict[int, str] = {}
    for answer in client.classify(texts[:MAX_TEXTS], top_k=10):
        for prediction in answer.predictions:
            assert names.setdefault(prediction.id, prediction.label) == prediction.label
    assert [names[i] for i in range(10)] == sorted(names.values())
    assert names[9] == "track_order"


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_top_k_is_the_requests(client, texts, top_k):
    answers = client.classify(texts[:3], top_k=top_k)
    assert [len(answer.predictions) for answer in answers] == [top_k] * 3
    if top_k == 10:
        assert [sum(p.score for p in answer.predictions) for answer in answers] == pytest.approx([1, 1, 1])


def test_three_labels_by_default(client):
    assert len(client.classify("hello there").predictions) == 3


@pytest.mark.parametrize("top_k", [11, 1000])
def test_more_labels_than_there_are_is_refused(client, top_k):
    with pytest.raises(millibert.InvalidRequest, match="top_k must be an integer from 1 to 10"):
        client.classify("hello", top_k=top_k)


def test_unicode(client, in_process):
    assert_matches(client.classify(UNICODE), in_process(UNICODE))


def test_an_empty_text_is_answered(client, in_process):
    assert_matches(client.classify(["", "   "]), in_process(["", "   "]))


def test_a_long_text_is_truncated_and_says_so(client, in_process):
    long = "my parcel is late " * 556
    answers = client.classify([long, "my parcel is late", "x" * 10_000])
    assert len(long) > 10_000
    # A word of 10,000 letters is one unknown token.
    assert [answer.truncated for answer in answers] == [True, False, False]
    assert_matches(answers, in_process([long, "my parcel is late", "x" * 10_000]))


def test_concurrent_requests_of_mixed_lengths_get_their_own_answers(server, texts, in_process):
    pool_texts = [*texts[:60], *UNICODE, "", "long " * 300]
    expected = in_process(pool_texts)
    generator = np.random.default_rng(0)
    requests = [list(generator.integers(0, len(pool_texts), generator.integers(1, 9))) for _ in range(160)]

    def ask(number: int) -> None:
        chosen = requests[number]
        answers = clients[number % 2].classify([pool_texts[i] for i in chosen], top_k=1 + number % 10)
        assert {len(answer.predictions) for answer in answers} == {1 + number % 10}
        assert_matches(answers, expected[chosen])

    before = executions(server)
    with connect(server, "grpc") as grpc, connect(server, "http") as http:
        clients = (grpc, http)
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(ask, range(len(requests))))
    # Ragged batching merged them: fewer executions than requests.
    assert executions(server) - before < 0.8 * len(requests)


def executions(server) -> int:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as raw:
        return int(raw.get_inference_statistics("bert").model_stats[0].execution_count)


# What is refused, and that only that is.


def raw_request(server, scheme: str, data: np.ndarray, datatype: str = "BYTES", name: str = "TEXT") -> Any:
    library: Any = {"grpc": tritonclient.grpc, "http": tritonclient.http}[scheme]
    url = {"grpc": server.grpc_url, "http": server.http_url}[scheme].split("://")[1]
    with library.InferenceServerClient(url) as raw:
        tensor = library.InferInput(name, list(data.shape), datatype)
        tensor.set_data_from_numpy(data)
        return raw.infer(MODEL, [tensor])


def as_bytes(*values: bytes) -> np.ndarray:
    return np.array([[value] for value in values], dtype=object)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("data", "datatype", "name", "message"),
    [
        (as_bytes(b"fine", b"caf\xe9"), "BYTES", "TEXT", r"TEXT\[1\] is not UTF-8"),
        (as_bytes(*[b"x"] * (MAX_TEXTS + 1)), "BYTES", "TEXT", "batch-size must be <= 16"),
        (np.array([[1]], np.int32), "INT32", "TEXT", "data-type|datatype|data type"),
        (np.array([b"flat"], dtype=object), "BYTES", "TEXT", "shape"),
        (np.array([[b"a", b"b"]], dtype=object), "BYTES", "TEXT", "shape"),
        (np.zeros((0, 1), dtype=object), "BYTES", "TEXT", "expected 1 string elements .* got 0"),
        (as_bytes(b"x"), "BYTES", "WORDS", "unexpected inference input 'WORDS'|TEXT"),
    ],
    ids=["not UTF-8", "over the limit", "wrong dtype", "no batch", "wrong shape", "empty batch", "wrong name"],
)
def test_a_wrong_request_gets_its_own_error(server, scheme, data, datatype, name, message):
    with pytest.raises(InferenceServerException, match=message) as caught:
        raw_request(server, scheme, data, datatype, name)
    assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")
    # and the service goes on
    assert raw_request(server, scheme, as_bytes(b"my parcel")).as_numpy("LABEL").shape == (1, 3)


def test_bad_requests_do_not_spoil_the_good_ones_beside_them(server, texts, in_process):
    some = texts[:40]
    expected = in_process(some)

    def good(index: int) -> None:
        assert_matches([grpc.classify(some[index])], expected[index : index + 1])

    def bad(index: int) -> None:
        with pytest.raises(InferenceServerException, match="not UTF-8"):
            raw_request(server, "grpc", as_bytes(b"\xff\xfe"))
        with pytest.raises(millibert.InvalidRequest, match="top_k"):
            grpc.classify("fine", top_k=99)

    with connect(server, "grpc") as grpc, ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(job, i % 40) for i in range(120) for job in ((good, bad) if i % 3 == 0 else (good,))]
        for job in jobs:
            job.result()


def test_the_engine_itself_refuses_what_would_spoil_a_batch(server):
    with tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as raw:
        tensors = [
            tritonclient.grpc.InferInput("input_ids", [1, 200], "INT32"),
            tritonclient.grpc.InferInput("admission", [1, 2], "INT64"),
        ]
        tensors[0].set_data_from_numpy(np.ones((1, 200), np.int32))
        tensors[1].set_data_from_numpy(np.array([[2**62, 0]], np.int64))
        with pytest.raises(InferenceServerException, match="200 tokens a text; this model reads at most 64"):
            raw.infer("bert", tensors)


def test_a_lone_request_never_waits_for_another_one(server):
    """Two clients that take turns, with pauses: where Triton's batcher missed a wake-up, it slept for 500 ms."""
    waits = []

    def one(client: millibert.Client, pause: float) -> None:
        for _ in range(40):
            start = time.monotonic()
            client.classify("where is it?")
            waits.append(time.monotonic() - start)
            time.sleep(pause)

    with connect(server, "grpc") as client, ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(one, client, pause) for pause in (0.003, 0.007)]:
            job.result()
    # A batcher that sleeps shows as a second peak at half a second; a busy machine does not.
    assert sum(0.45 < wait < 0.6 for wait in waits) <= 1


# Failures.


def is_ready(server) -> bool:
    try:
        with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.parametrize("model", ["tokenizer", "bert", "postprocess"])
def test_a_killed_stub_never_hides_behind_a_healthy_probe(release, triton, model):
    with triton(release.repository) as server:
        stubs = {p.cmdline()[1].split("/")[-3]: p for p in psutil.Process(server.tritonserver().pid).children()}
        stubs[model].kill()
        killed = time.monotonic()
        time.sleep(1)
        recovered = False
        while not recovered and time.monotonic() < killed + 60:
            ready = is_ready(server)
            answered = answers(server)
            # Later than 10 s after the kill, ready has to mean that a text is answered.
            assert answered or not ready or time.monotonic() < killed + 10 or not is_ready(server)
            recovered = ready and answered
            time.sleep(0.1)
        assert recovered


def answers(server) -> bool:
    try:
        with connect(server, "http") as client:
            return client.classify("where is it?").label != ""
    except millibert.MillibertError:
        return False


def test_a_server_that_stops_answers_or_refuses_and_leaves_nothing(release, triton, texts, in_process):
    some = texts[:MAX_TEXTS]
    expected = in_process(some)
    outcomes: list[str] = []

    def ask(client: millibert.Client) -> None:
        while True:
            try:
                assert_matches(client.classify(some), expected)
                outcomes.append("answered")
            except millibert.Unavailable:
                outcomes.append("refused")
                return

    with triton(release.repository) as server, connect(server, "grpc") as client, ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(ask, client) for _ in range(8)]
        time.sleep(2)
        assert server.stop() == 0
        for job in jobs:
            job.result(30)
        assert server.leftovers() == []
    assert outcomes.count("refused") == 8
    assert outcomes.count("answered") > 8

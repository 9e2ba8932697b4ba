"""Raw answers of a real Triton are read as our client reads them, and compared with what is right."""

from __future__ import annotations

from pathlib import Path

import pytest

import millibert
from load.best_labels import are_right, best_labels_http
from load.generator import Load, send
from load.transports import ANSWERED, WRONG, triton_requests

TEXTS = ["hello", "x", "sleep 0.001", "hello"]


@pytest.fixture(scope="module")
def service(triton, request):
    with triton(Path(__file__).parent / "client_repository") as server:
        yield server


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_right_and_wrong_answers_are_told_apart(service, kind):
    url = service.grpc_url if kind == "grpc" else service.http_url
    with millibert.connect(url, service.models[0]) as client:
        right = [frozenset([answer.label.encode()]) for answer in client.classify(TEXTS)]
    wrong = [*right[:1], frozenset([b"another"]), *right[2:]]
    for per_request, wanted, expected in [
        (1, right, {ANSWERED}),
        (4, right, {ANSWERED}),
        (4, wrong, {WRONG}),
        (1, wrong, {ANSWERED, WRONG}),
    ]:
        requests = triton_requests(url, service.models[0], TEXTS, per_request, wanted=wanted)
        found = send(Load(requests, seconds=0.5, concurrency=2))
        assert set(found.status) == expected


def test_an_answer_without_labels_is_not_right():
    assert best_labels_http(b"{}", {}) == []
    assert not are_right([], [frozenset([b"a"])])

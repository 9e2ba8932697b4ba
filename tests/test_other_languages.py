"""What docs/clients.md and the README tell to do without our clients, done as they tell it, on a real Triton.

Every curl command is run as it stands, the request for gRPC is sent by gRPC's own library, and what comes back is what
our client answers. The Python of the pages runs too. Only hosts, ports and models are others.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from tritonclient.grpc import service_pb2

import millibert
from millibert._asking import ClientOptions
from millibert._codec import error_class

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/clients.md")}
CLIENTS = PAGES["docs/clients.md"]
MODELS = ("banking77", "customer_service")


def curl_commands() -> list[str]:
    """All of them, each with the lines on which its quotes go on."""
    found = []
    for page in PAGES.values():
        lines = iter(page.splitlines())
        for line in lines:
            if line.startswith("    curl "):
                while line.count("'") % 2:
                    line += "\n" + next(lines)
                found.append(line.strip())
    return found


def fenced(language: str, page: str = CLIENTS) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def python_blocks() -> list[str]:
    return [block for page in PAGES.values() for block in fenced("python", page)]


def here(text: str, server: Any) -> str:
    """The same for the server of this test."""
    for model in MODELS:
        text = text.replace(model, "echo")
    text = text.replace("127.0.0.1:8000", server.http_url.removeprefix("http://"))
    return text.replace("127.0.0.1:8001", server.grpc_url.removeprefix("grpc://"))


@pytest.fixture(scope="module")
def client(server) -> Iterator[millibert.Client]:
    with millibert.connect(server.grpc_url, "echo") as opened:
        yield opened


@pytest.fixture(scope="module")
def channel(server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_url.removeprefix("grpc://")) as opened:
        yield opened


# curl


def test_there_is_something_to_run():
    assert len(curl_commands()) >= 6
    assert len(python_blocks()) >= 6
    assert sum("/infer " in command for command in curl_commands()) >= 3


def curl(command: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    return subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True).stdout


def asked(command: str) -> dict[str, Any]:
    """The document that a command sends."""
    words = shlex.split(command)
    document: dict[str, Any] = json.loads(words[words.index("-d") + 1])
    return document


@pytest.mark.e2e
@pytest.mark.parametrize("command", [each for each in curl_commands() if " -d " not in each])
def test_health_by_curl(server, command):
    assert curl(here(command, server)) == "200\n"
    assert curl(here(command, server).replace("/echo/", "/nobody/")) == ("400\n" if "/models/" in command else "200\n")


@pytest.mark.e2e
@pytest.mark.parametrize("command", [each for each in curl_commands() if " -d " in each and '"top_k": 99' not in each])
def test_an_answer_by_curl_is_the_clients(server, client, command):
    (tensor,) = asked(command)["inputs"]
    answers = client.classify(tensor["data"], top_k=asked(command)["parameters"]["top_k"])
    document = json.loads(curl(here(command, server)))
    assert document.get("id") == asked(command).get("id")
    found = {each["name"]: each["data"] for each in document["outputs"]}
    assert as_answers(tensor["data"], found) == answers


@pytest.mark.e2e
def test_the_answer_on_the_page_has_the_form_of_a_real_one(server):
    command = next(each for each in curl_commands() if "order-7" in each)
    real = json.loads(curl(here(command, server)))
    shown = json.loads(next(block for block in fenced("json") if '"outputs"' in block))
    assert shown.keys() == real.keys()
    assert form(shown) == form(real)
    assert set(form(shown)) == {"LABEL", "SCORE", "LABEL_ID", "ACCEPTED", "TRUNCATED"}


def form(document: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: (each["datatype"], each["shape"], kinds(each["data"])) for each in document["outputs"]}


def kinds(data: list[Any]) -> list[type]:
    return [type(each) for each in data]


@pytest.mark.e2e
def test_a_refusal_by_curl(server):
    command = next(each for each in curl_commands() if '"top_k": 99' in each)
    body, _, status = curl(here(command, server)).rstrip().rpartition(" ")
    assert status == "400"
    shown, _, status_shown = next(block for block in fenced("text") if "error" in block).rstrip().rpartition(" ")
    assert status_shown == status
    assert json.loads(body).keys() == json.loads(shown).keys() == {"error"}
    assert json.loads(body)["error"].startswith("in ensemble 'echo', top_k must be ")


# gRPC, without tritonclient's client


def page_request(server: Any) -> Any:
    block = next(block for block in fenced("json") if "bytes_contents" in block)
    return json_format.Parse(here(block, server), service_pb2.ModelInferRequest())


def infer(channel: grpc.Channel, request: Any, seconds: float = 5) -> Any:
    """`ModelInfer`, named as on the page."""
    service, method = "inference.GRPCInferenceService", "ModelInfer"
    assert f"{service}/{method} < request.json" in CLIENTS
    call = channel.unary_unary(
        f"/{service}/{method}",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )
    return call(request, timeout=seconds)


def elements(datatype: str, content: bytes) -> list[Any]:
    """One entry of `raw_output_contents`, read as the page's table says."""
    if datatype == "BOOL":
        return [byte == 1 for byte in content]
    if datatype in ("FP32", "INT32"):
        return [each for (each,) in struct.iter_unpack("<f" if datatype == "FP32" else "<i", content)]
    assert datatype == "BYTES"
    found = []
    while content:
        (length,) = struct.unpack_from("<I", content)
        found.append(content[4 : 4 + length].decode())
        content = content[4 + length :]
    return found


def as_answers(texts: list[str], found: dict[str, list[Any]]) -> tuple[millibert.Classification, ...]:
    """Flat tensors as our client would answer them."""
    labels = len(found["LABEL"]) // len(texts)
    flat = zip(found["LABEL"], found["LABEL_ID"], found["SCORE"], found["ACCEPTED"], strict=True)
    predictions = [millibert.Prediction(*each) for each in flat]
    return tuple(
        millibert.Classification(text, tuple(predictions[row * labels : (row + 1) * labels]), found["TRUNCATED"][row])
        for row, text in enumerate(texts)
    )


@pytest.mark.e2e
def test_the_request_for_grpc_gets_the_clients_answer(server, client, channel):
    request = page_request(server)
    texts = [content.decode() for content in request.inputs[0].contents.bytes_contents]
    said = re.search(r'`request.json`, with the texts\s"(.*?)"\sand\s"(.*?)":', CLIENTS)
    assert said is not None
    assert texts == list(said.groups())
    answer = infer(channel, request)
    assert answer.id == request.id == "order-7"
    contents = zip(answer.outputs, answer.raw_output_contents, strict=True)
    found = {output.name: elements(output.datatype, content) for output, content in contents}
    assert as_answers(texts, found) == client.classify(texts, top_k=request.parameters["top_k"].int64_param)
    for output in answer.outputs:
        assert f"`{output.name}`" in CLIENTS.partition("an element of `raw_output_contents`")[2]


@pytest.mark.e2e
def test_the_request_is_what_grpcurl_would_print(server):
    """The field names of the page are those of the .proto files, and its base64 is canonical."""
    block = next(block for block in fenced("json") if "bytes_contents" in block)
    parsed = json_format.MessageToDict(page_request(server), preserving_proto_field_name=True)
    assert parsed["inputs"][0]["contents"] == json.loads(block)["inputs"][0]["contents"]
    for field in re.findall(r"^\| `([a-z_]+)", CLIENTS.partition("field of `ModelInferRequest`")[2], re.MULTILINE):
        if field in ("model_name", "id", "parameters", "inputs"):
            assert field in service_pb2.ModelInferRequest.DESCRIPTOR.fields_by_name


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model_name": "nobody"}, "NOT_FOUND"),
        ({"parameters": {"top_k": {"int64_param": 99}}}, "INVALID_ARGUMENT"),
        ({"text": "crash"}, "INTERNAL"),
        ({"text": "busy"}, "UNAVAILABLE"),
    ],
)
def test_statuses(server, channel, change, status):
    document = {
        **json_format.MessageToDict(page_request(server), preserving_proto_field_name=True),
        **{key: value for key, value in change.items() if key != "text"},
    }
    if text := change.get("text"):
        document["inputs"][0]["contents"]["bytes_contents"][0] = base64.b64encode(text.encode()).decode()
    with pytest.raises(grpc.RpcError) as failed:
        infer(channel, json_format.ParseDict(document, service_pb2.ModelInferRequest()))
    assert failed.value.code().name == status
    assert f"\n| {status}" in CLIENTS


@pytest.mark.e2e
def test_health_by_grpc(server, channel):
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    serving = b"\x08\x01"  # field 1, status: SERVING
    assert check(b"", timeout=5) == serving
    assert check(b"\x0a\x06nobody", timeout=5) == serving
    ready = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelReady",
        request_serializer=service_pb2.ModelReadyRequest.SerializeToString,
        response_deserializer=service_pb2.ModelReadyResponse.FromString,
    )
    assert ready(service_pb2.ModelReadyRequest(name="echo"), timeout=5).ready is True
    assert ready(service_pb2.ModelReadyRequest(name="nobody"), timeout=5).ready is False


@pytest.mark.e2e
def test_busy_is_told_by_the_text_of_unavailable(triton, release):
    texts = ["where is my parcel, I was promised it for Tuesday " * 5] * 16
    request = service_pb2.ModelInferRequest(model_name="support", id="order-7")
    request.parameters["queue_timeout_ms"].int64_param = 1
    tensor = request.inputs.add(name="TEXT", datatype="BYTES", shape=[len(texts), 1])
    tensor.contents.bytes_contents.extend(text.encode() for text in texts)
    with triton(release.repository) as running:
        url = running.grpc_url.removeprefix("grpc://")
        with grpc.insecure_channel(url) as channel:
            call = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=service_pb2.ModelInferRequest.SerializeToString,
                response_deserializer=service_pb2.ModelInferResponse.FromString,
            )
            failures = [future.exception() for future in [call.future(request, timeout=60) for _ in range(30)]]
    refused = [failure for failure in failures if failure is not None]
    assert refused
    for failure in refused:
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        assert "busy: " in failure.details()
        assert error_class("UNAVAILABLE", failure.details()) is millibert.Busy


# Python


@pytest.mark.parametrize("block", python_blocks())
def test_python_compiles(block):
    compile(block, "page", "exec")


@pytest.mark.e2e
@pytest.mark.parametrize("block", [block for block in python_blocks() if "127.0.0.1" in block])
def test_python_runs(server, block):
    done = subprocess.run([sys.executable, "-W", "error", "-c", here(block, server)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    if "on_call" in block:
        assert 'millibert_calls_total{method="classify",outcome="answered"} 1\n' in done.stdout


# The page itself


def test_links_of_the_page_lead_somewhere():
    anchors = {
        name: {slug(title) for title in re.findall(r"^#+ (.*)$", page, re.MULTILINE)} for name, page in PAGES.items()
    }
    anchors["docs/performance.md"] = {
        slug(title)
        for title in re.findall(r"^#+ (.*)$", (ROOT / "docs/performance.md").read_text(encoding="utf-8"), re.MULTILINE)
    }
    for target in re.findall(r"\]\((?!http)([^)]+)\)", CLIENTS):
        file, _, anchor = target.partition("#")
        path = (ROOT / "docs" / file).resolve() if file else ROOT / "docs" / "clients.md"
        assert path.exists(), target
        assert not anchor or anchor in anchors[path.relative_to(ROOT).as_posix()], target


def slug(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_every_error_and_every_option_is_on_the_page():
    errors = [name for name in millibert.__all__ if issubclass_of_service_error(getattr(millibert, name))]
    assert all(f"`{name}`" in CLIENTS for name in errors)
    options = [*ClientOptions.__annotations__, "timeout"]
    assert [name for name in options if f"`{name}" not in CLIENTS] == []


def issubclass_of_service_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, millibert.ServiceError)

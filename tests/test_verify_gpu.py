"""`millibert verify-gpu`, with doubles for what needs a GPU; the graph, Triton and the comparison are real."""

from __future__ import annotations

import inspect
import json
from typing import ClassVar

import numpy as np
import onnxruntime
import pytest
from polygraphy.backend import trt as polygraphy
from tests.conftest import CUSTOMER_SERVICE
from tests.tensorrt_double import install, read_plan

from millibert import _perf_analyzer as perf_analyzer
from millibert import cli
from millibert_build import verify_command
from millibert_build.tensorrt import release_plan, serving_checks
from millibert_ensemble.machine import Gpu, Machine
from millibert_ensemble.preflight import Verdict

H100 = Gpu("NVIDIA H100", "9.0", 80 << 30, "580.1")
TEST = CUSTOMER_SERVICE / "test.csv"
REAL_RUNNER, REAL_LOADER = polygraphy.TrtRunner, polygraphy.engine_from_bytes


class Runner:
    """Polygraphy's TrtRunner on a double's plan: every call must fit the real class, and ONNX Runtime computes."""

    error = 0.0
    profiles: ClassVar[list[int]] = []

    def __init__(self, *args, **kwargs):
        inspect.signature(REAL_RUNNER.__init__).bind(self, *args, **kwargs)
        header, graph = read_plan(args[0])
        self._profiles = header["profiles"]
        self._profile = 0
        self._session = onnxruntime.InferenceSession(graph)
        self._active = False

    def activate(self):
        inspect.signature(REAL_RUNNER.activate).bind(self)
        self._active = True

    def deactivate(self):
        inspect.signature(REAL_RUNNER.deactivate).bind(self)
        self._active = False

    def set_profile(self, *args):
        inspect.signature(REAL_RUNNER.set_profile).bind(self, *args)
        assert self._active
        (self._profile,) = args
        Runner.profiles.append(self._profile)

    def infer(self, *args):
        inspect.signature(REAL_RUNNER.infer).bind(self, *args)
        assert self._active
        (inputs,) = args
        for name, (low, _, high) in self._profiles[self._profile].items():
            assert all(a <= b <= c for a, b, c in zip(low, inputs[name].shape, high, strict=True)), name
        return {"logits": self._session.run(None, inputs)[0] + np.float32(Runner.error)}

    def last_inference_time(self):
        inspect.signature(REAL_RUNNER.last_inference_time).bind(self)
        return 0.002


def load_engine(*args, **kwargs):
    inspect.signature(REAL_LOADER).bind(*args, **kwargs)
    return args[0]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU node, as far as it can be played."""
    here = Machine("11.4.1", (H100,))
    monkeypatch.setattr(release_plan, "gpus", lambda: here.gpus)
    monkeypatch.setattr(verify_command, "this_machine", lambda: here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(polygraphy, "TrtRunner", Runner)
    monkeypatch.setattr(polygraphy, "engine_from_bytes", load_engine)
    monkeypatch.setattr(Runner, "error", 0.0)
    monkeypatch.setattr(Runner, "profiles", [])
    return install(monkeypatch)


@pytest.fixture
def only(monkeypatch):
    """Leave out the checks that start a server."""

    def choose(*names):
        chosen = tuple(check for check in verify_command.CHECKS if check[0] in names)
        monkeypatch.setattr(verify_command, "CHECKS", chosen)

    return choose


IN_PROCESS = ("graph", "machine", "plan", "parity", "accuracy", "speed")


def verify(repository, *options):
    return cli.main(["verify-gpu", "--repository", str(repository), "--data", str(TEST), *options])


def test_without_a_gpu_it_checks_what_it_can(repository, capsys, only):
    only(*IN_PROCESS, "service")
    assert verify(repository) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PASS  graph")
    assert all(line.startswith("SKIP") for line in lines[1:])
    assert "no NVIDIA GPU here" in lines[1]


def test_every_check_passes_on_a_plan_that_computes_its_graph(repository, gpu, only, capsys):
    only(*IN_PROCESS)
    assert verify(repository, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    outcomes = {check["check"]: check["outcome"] for check in report["checks"]}
    assert outcomes == {**dict.fromkeys(IN_PROCESS, "PASS"), "speed": "INFO"}
    figures = {check["check"]: check["figures"] for check in report["checks"]}
    assert figures["parity"]["single"] <= figures["parity"]["allowed"]
    assert figures["accuracy"]["agreement"] >= 0.99
    assert figures["speed"]["milliseconds"] == {"1": 2.0, "16": 2.0}
    assert figures["speed"]["published"]["A100"] == {"1": 0.62, "32": 3.85}
    assert set(Runner.profiles) == {0, 1, 2}  # single texts, some and full batches, or each bucket


def test_a_plan_that_fits_is_not_built_again_unless_asked(repository, gpu, only, capsys):
    only("plan")
    assert verify(repository) == 0
    assert "built in" in capsys.readouterr().out
    assert verify(repository) == 0
    assert "built before" in capsys.readouterr().out
    assert verify(repository, "--rebuild") == 0
    assert "built in" in capsys.readouterr().out


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_a_plan_that_computes_something_else_fails(repository, gpu, only, capsys, monkeypatch, error):
    only("plan", "parity", "accuracy")
    monkeypatch.setattr(Runner, "error", error)
    assert verify(repository) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("FAIL  parity")
    if np.isnan(error):
        assert lines[2].startswith("FAIL  accuracy")


def test_one_failure_does_not_keep_the_other_checks_from_being_made(repository, gpu, only, capsys):
    only(*IN_PROCESS)
    gpu.parser_errors = [("Gelu", "node_gelu", 3, "no kernel")]
    assert verify(repository) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAIL  plan" in "\n".join(lines)
    assert "Gelu 'node_gelu' (node 3): no kernel" in "\n".join(lines)
    assert lines[-1].startswith("SKIP  speed")


@pytest.mark.e2e
def test_service_and_load_through_triton(repository, gpu, only, capsys, monkeypatch):
    """Triton has no TensorRT backend here: the CPU engine, from the same checkpoint, answers in the plan's place."""
    only("plan", "service", "load")
    monkeypatch.setattr(Verdict, "options", [])
    monkeypatch.setattr(serving_checks, "MIN_SERVED_AGREEMENT", 0.99)  # fp32 against fp16
    assert verify(repository) in (0, 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("PASS  service")
    if not perf_analyzer.is_here():
        assert lines[2].startswith("SKIP  load      perf_analyzer is not on PATH")

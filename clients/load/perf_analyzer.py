"""NVIDIA's perf_analyzer as a tool that is run for a load and hands over its requests one by one.

Input data is made for the whole service and for each of its stages alone: a stage gets what the stages before it said
of the same texts. Each load is a process of its own; a closed loop is measured for three windows, or more where they
differ much, an open one for as many requests as are due in its time.

What perf_analyzer (2.51) cannot do, and what is made of it:
- It stops at the first request that is not answered, so that a load which the server refuses has no figures at all.
- With a rate, a latency counts from when a request was sent, not from when it was due ("coordinated omission"). It
  sends on time as long as it is asynchronous, which it is here, and has the CPU; `behind` says where it did not.
- Texts of different lengths can share a request, rows of `input_ids` cannot: with several a request they are padded to
  the longest with zeros, which the engine takes away again.
- Its export has the answers, which are checked; but not where they went through shared memory.
"""

from __future__ import annotations

import datetime
import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from load.machine import describe_machine
from load.results import Answers, Arrival, Outcome, Run, summarise
from load.texts import Right
from millibert._address import Address, parse_address
from millibert._errors import MillibertError, UsageError
from millibert._perf_analyzer import PROGRAM, Refused, find
from millibert_ensemble.contract import ADMISSION, BERT, INPUT_IDS, LABEL_ID, LOGITS, POSTPROCESS, TEXT, TOKENIZER

STAGES = (TOKENIZER, BERT, POSTPROCESS)
# Of a stage; each is asked for on its own.
_MOST_TENSORS = 500
# Tensors are sent long after they were made: until a time that the server's clock does not reach, and without a number.
_ANY_TIME = np.array([[2**62, 0]])
# What is steady is judged from the requests later; so by how much these may differ is the most that can be given.
_WINDOWS, _STABILITY_PERCENT = 3, 100
_THREADS = 16
_BUSY = " busy: "
_FEWEST = 3
_PATIENCE_SECONDS = 120.0
# Of the requests that were due, fewer than this were sent: more than chance, and more than the last window's edge.
_BEHIND = 0.97

Sent = Mapping[str, int]


class Expected(NamedTuple):
    """What answers are compared with: all labels by their ids, and for each text which best labels are right."""

    labels: Sequence[str]
    texts: Sequence[str]
    right: Right


@dataclass(frozen=True)
class PerfLoad:
    """A load for perf_analyzer: so many requests under way (closed loop), or a rate (open loop)."""

    url: str
    model: str
    data: Path  # see `write_data`
    seconds: float
    texts_per_request: int = 1
    concurrency: int | None = None
    rate: float | None = None
    poisson: bool = False
    shared_memory: bool = False

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise UsageError(f"a load for {PROGRAM} has a concurrency (closed loop) or a rate (open loop)")
        if parse_address(self.url).secure:
            raise UsageError(f"{self.url}: {PROGRAM} is used without TLS; give it a port inside of the proxy")

    @property
    def arrival(self) -> Arrival:
        """The same in words."""
        if self.rate is None:
            return Arrival(kind="closed", under_way=self.concurrency)
        return Arrival(kind="open", rate=self.rate, spacing="poisson" if self.poisson else "even")


def run(load: PerfLoad, expected: Expected | None = None) -> Run:
    """Let perf_analyzer send it.

    Raises `Refused` where the server was too busy, and `MillibertError` with perf_analyzer's own words where it fails.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="millibert-perf-") as folder:
        export = Path(folder, "profile.json")
        _run_program([*arguments(load), "--profile-export-file", str(export)], export, load)
        answers, reasons = read_export(export, None if load.shared_memory else expected)
    summary = summarise(answers, float(answers.due.max()))
    return Run(
        tool="perf_analyzer",
        url=load.url,
        model=load.model,
        texts_per_request=load.texts_per_request,
        arrival=load.arrival,
        started=started,
        texts_per_second=summary.requests_per_second * load.texts_per_request,
        machine=describe_machine(),
        reasons=reasons,
        **summary._asdict(),
    )


def arguments(load: PerfLoad) -> list[str]:
    """The command line, without the program and where the export goes."""
    address = parse_address(load.url)
    given = ["-m", load.model, "-i", address.protocol, "-u", address.netloc, "-b", str(load.texts_per_request)]
    given += ["--input-data", str(load.data)]
    if load.shared_memory:
        given += ["--shared-memory", "system"]
    if load.rate is None:
        window_ms = round(1000 * load.seconds / _WINDOWS)
        given += ["--measurement-interval", str(window_ms), "--stability-percentage", str(_STABILITY_PERCENT)]
        return [*given, "--concurrency-range", str(load.concurrency)]
    # By their number, so that what is under way at the end counts too; it takes none below what is due in a second.
    given += ["--request-count", str(max(_FEWEST, math.ceil(load.rate * max(1.0, load.seconds))))]
    # Threads that wait could not send on time.
    given += ["--async", "--max-threads", str(_THREADS), "--request-rate-range", repr(load.rate)]
    return [*given, "--request-distribution", "poisson" if load.poisson else "constant"]


def behind(run: Run) -> str | None:
    """What to say where perf_analyzer did not send as much as it should have, so that its latencies hide something."""
    if run.arrival.rate is None:
        return None
    seconds = run.seconds - run.warm_up_seconds
    due, sent = run.arrival.rate * seconds, run.counts.sent
    # Poisson arrivals differ from their mean by their root.
    chance = 3 * due**0.5 if run.arrival.spacing == "poisson" else 0.0
    if sent >= _BEHIND * due - chance:
        return None
    return f"{PROGRAM} sent {sent / seconds:,.0f} of {run.arrival.rate:g} requests/s: its latencies hide what was late"


def read_export(path: Path, expected: Expected | None = None) -> tuple[Answers, dict[str, int]]:
    """The requests of the one load in an export, and why some got no right answer; too few raise `MillibertError`."""
    # Labels are there as their bytes, with lengths between them that need not be UTF-8.
    document = json.loads(path.read_bytes().decode("utf-8", "replace"), strict=False)
    experiments = [each for each in document["experiments"] if each["requests"]]
    if not experiments or len(experiments[-1]["requests"]) < _FEWEST:
        raise MillibertError(f"{PROGRAM} has measured fewer than {_FEWEST} requests; measure for longer")
    # The last is the one that was asked for; its search may come from others.
    requests, windows = experiments[-1]["requests"], experiments[-1]["window_boundaries"]
    sent = np.array([request["timestamp"] for request in requests], np.int64)
    ended = [max(request["response_timestamps"], default=windows[-1]) for request in requests]
    places = {text: place for place, text in enumerate(expected.texts)} if expected else {}
    outcomes = [_outcome(request, expected, places) for request in requests]
    answers = Answers(
        due=(sent - windows[0]) / 1e9,
        latency=(np.array(ended, np.int64) - sent) / 1e9,
        outcome=np.array([outcome for outcome, _ in outcomes], dtype=np.str_),
    )
    reasons: dict[str, int] = {}
    for _, reason in outcomes:
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
    return answers, reasons


def _outcome(request: Mapping[str, Any], expected: Expected | None, places: Sent) -> tuple[Outcome, str]:
    if not request["response_timestamps"]:
        return Outcome.FAILED, f"{Outcome.FAILED}: no answer"
    if expected is None:
        return Outcome.ANSWERED, ""
    ids = request["response_outputs"][-1][LABEL_ID.name]
    first = places.get(request["request_inputs"][TEXT.name])
    if first is None:
        raise MillibertError(f"the export of {PROGRAM} names a text that was not sent")
    ids = ids if isinstance(ids, list) else [ids]
    # The texts of a request follow one another in the data; of each the export names so many labels, best first.
    rows = request["response_outputs"][-1]["TRUNCATED"]
    count = len(rows) if isinstance(rows, list) else 1
    for row, best in enumerate(ids[:: len(ids) // count]):
        right = expected.right[(first + row) % len(expected.right)]
        if expected.labels[best] not in right:
            return Outcome.WRONG, f"{Outcome.WRONG}: not {' or '.join(sorted(right))}"
    return Outcome.ANSWERED, ""


def write_data(path: Path, url: str, stage: str | None, texts: Sequence[str], texts_per_request: int = 1) -> int:
    """Write what requests to the service, or to one of its stages, are made of; returns how many there are."""
    if stage in (None, TOKENIZER):
        rows: list[dict[str, Any]] = [{TEXT.name: [text]} for text in texts]
    else:
        tensors = _Stages(url).tensors(stage or "", texts[:_MOST_TENSORS])
        rows = _alike(tensors) if texts_per_request > 1 else [_as_json(each) for each in tensors]
    path.write_text(json.dumps({"data": rows}), encoding="utf-8")
    return len(rows)


def _alike(tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one length, for perf_analyzer puts no others into a request."""
    longest: dict[str, int] = {}
    for each in tensors:
        for name, array in each.items():
            longest[name] = max(longest.get(name, 0), array.shape[1])
    known = (INPUT_IDS.name, ADMISSION.name, LOGITS.name)
    if unknown := [name for name, size in longest.items() if size > 1 and name not in known]:
        raise UsageError(f"{', '.join(unknown)}: cannot be sent for several texts a request; give one")
    return [
        _as_json({name: np.pad(array, ((0, 0), (0, longest[name] - array.shape[1]))) for name, array in each.items()})
        for each in tensors
    ]


def _as_json(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"content": array[0].tolist(), "shape": list(array.shape[1:])} for name, array in tensors.items()}


class _Stages:
    """The stages of a service, asked one text at a time by tritonclient, since our clients call whole services."""

    def __init__(self, url: str) -> None:
        address = parse_address(url)
        self._module = _tritonclient(address)
        self._client = self._module.InferenceServerClient(address.netloc)

    def tensors(self, stage: str, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The inputs of a stage for each text; raises `MillibertError` where there is no such stage."""
        from tritonclient.utils import InferenceServerException

        try:
            return [self._tensors(stage, text) for text in texts]
        except InferenceServerException as error:
            raise MillibertError(f"cannot make the inputs of {stage}: {error.message()}") from error
        finally:
            self._client.close()

    def _tensors(self, stage: str, text: str) -> dict[str, Any]:
        given = self._ask(TOKENIZER, {TEXT.name: (np.array([[text.encode()]], np.object_), TEXT.datatype)}, BERT)
        if stage == BERT:
            return given
        datatypes = {INPUT_IDS.name: INPUT_IDS.datatype, ADMISSION.name: ADMISSION.datatype}
        asked = {name: (array, datatypes.get(name, INPUT_IDS.datatype)) for name, array in given.items()}
        return self._ask(BERT, asked, POSTPROCESS)

    def _ask(self, model: str, tensors: Mapping[str, tuple[Any, str]], following: str) -> dict[str, Any]:
        """What a model says, as far as the one that follows takes it."""
        inputs = []
        for name, (array, datatype) in tensors.items():
            tensor = self._module.InferInput(name, list(array.shape), datatype)
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        answer = self._client.infer(model, inputs)
        return {
            name: _ANY_TIME if name == ADMISSION.name else answer.as_numpy(name) for name in self._inputs(following)
        }

    def _inputs(self, model: str) -> list[str]:
        metadata = self._client.get_model_metadata(model)
        inputs = metadata["inputs"] if isinstance(metadata, dict) else metadata.inputs
        return [each["name"] if isinstance(each, dict) else each.name for each in inputs]


def _tritonclient(address: Address) -> Any:
    if address.protocol == "grpc":
        from tritonclient import grpc

        return grpc
    from tritonclient import http

    return http


def _run_program(given: Sequence[str], export: Path, load: PerfLoad) -> None:
    program = find()
    if program is None:
        raise UsageError(f"{PROGRAM} is not here: `python -m load.install_perf_analyzer` installs it")
    seconds = 4 * load.seconds + _PATIENCE_SECONDS
    try:
        done = subprocess.run([program, *given], capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise MillibertError(f"{PROGRAM} did not end within {seconds:g} s") from error
    said = done.stderr + done.stdout
    if _BUSY in said:
        raise Refused(f"{_asked(load)}: the server was busy, and {PROGRAM} stops there")
    if not export.is_file():
        raise MillibertError(f"{_asked(load)}: {PROGRAM} failed: {_complaint(said)}")


def _complaint(said: str) -> str:
    """What went wrong, which it says before much else."""
    lines = [line for line in said.splitlines() if "had error:" in line or line.startswith("error:")]
    return (lines or said.strip().splitlines() or ["it says nothing"])[0].strip()


def _asked(load: PerfLoad) -> str:
    return f"{load.rate:g} requests/s" if load.rate is not None else f"{load.concurrency} requests under way"

"""Models and artefacts to a Triton model repository, checked against the contract."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tokenizers import Tokenizer
from tritonclient.grpc import model_config_pb2

import millibert_ensemble
from millibert._errors import UsageError
from millibert_build.calibrate import Calibration
from millibert_build.scenario import Scenario
from millibert_build.tensorrt.graph import TensorrtGraph
from millibert_build.tensorrt.native_config import (
    fill_native_config,
    fill_postprocess_config,
    fill_tokenizer_config,
)
from millibert_ensemble import contract
from millibert_ensemble.hashing import file_sha256
from millibert_ensemble.plan_manifest import TENSORRT_ONNX
from millibert_ensemble.repository_check import CONFIG, CONFIG_NAME, fits, parse_config

MODELS = Path(millibert_ensemble.__file__).parent / "models"
ENSEMBLE_TEMPLATE = "classify"
FUSED = "fused"
# The CPU engine merges more texts than a request may hold: the more there are, the more alike are those of a part.
_MERGED_REQUESTS = 2
# Triton's configs say STRING where its protocol says BYTES.
_CONFIG_DATATYPES = {"BYTES": "TYPE_STRING"}

_INSIDE = {
    ENSEMBLE_TEMPLATE: (contract.REQUEST_TENSORS, contract.RESPONSE_TENSORS),
    contract.TOKENIZER: (
        contract.REQUEST_TENSORS,
        (contract.INPUT_IDS, contract.SPAN, contract.ADMISSION, contract.TRUNCATED),
    ),
    contract.BERT: ((contract.INPUT_IDS, contract.ADMISSION), (contract.LOGITS,)),
    contract.POSTPROCESS: ((contract.LOGITS,), (contract.LABEL, contract.SCORE, contract.LABEL_ID, contract.ACCEPTED)),
}
# Written only where they are asked for.
_PLAN, _BEHIND_PLAN = "plan", "postprocess behind a plan"
_OTHERS = {
    FUSED: (contract.REQUEST_TENSORS, contract.RESPONSE_TENSORS),
    _PLAN: ((contract.INPUT_IDS, contract.SPAN), (contract.LOGITS,)),
    _BEHIND_PLAN: ((contract.LOGITS, contract.ADMISSION), _INSIDE[contract.POSTPROCESS][1]),
}


@dataclass(frozen=True)
class Artefacts:
    """What a build made and a server needs."""

    tokenizer: Tokenizer
    onnx: Path
    labels: Sequence[str]
    engine: str
    precision: str
    calibration: Calibration
    tensorrt: TensorrtGraph | None = None


def write_models(folder: Path, scenario: Scenario, artefacts: Artefacts) -> None:
    """Fill an empty folder with the ensemble and its three models."""
    parameters = {
        ENSEMBLE_TEMPLATE: {contract.LABELS_PARAMETER: json.dumps(list(artefacts.labels), ensure_ascii=False)},
        contract.TOKENIZER: {"queue_timeout_us": str(scenario.serving.queue_timeout_microseconds)},
        contract.BERT: {
            "engine": artefacts.engine,
            "precision": artefacts.precision,
            "layout": "rows",
            "cache_texts": str(scenario.serving.cache_texts),
            "max_tokens": str(scenario.max_tokens),
        },
        contract.POSTPROCESS: {
            "problem": scenario.problem,
            "temperature": repr(artefacts.calibration.temperature),
            "top_k": str(scenario.top_k),
        },
    }
    for template in _INSIDE:
        config = load_config(template)
        config.name = scenario.name if template == ENSEMBLE_TEMPLATE else template
        for key, value in parameters.get(template, {}).items():
            config.parameters[key].string_value = value
        if template == contract.BERT:
            config.output[0].dims[:] = [len(artefacts.labels)]
        _finish(config, template, scenario)
        if template == contract.BERT:
            config.max_batch_size = _MERGED_REQUESTS * scenario.max_texts
        _write_model(folder / config.name, config, MODELS / template)
    if artefacts.tensorrt is not None:
        _write_native(folder, scenario, artefacts.tensorrt)
    artefacts.tokenizer.save(str(folder / contract.TOKENIZER / contract.VERSION / "tokenizer.json"))
    shutil.copyfile(artefacts.onnx, folder / contract.BERT / contract.VERSION / "model.onnx")
    for name, values in (("labels", artefacts.labels), ("thresholds", artefacts.calibration.thresholds)):
        path = folder / contract.POSTPROCESS / contract.VERSION / f"{name}.json"
        path.write_text(json.dumps(list(values), ensure_ascii=False, indent=0), encoding="utf-8")


def load_config(template: str, file: str = CONFIG) -> model_config_pb2.ModelConfig:
    """Parse a config of a model with Triton's own protobuf; an unknown field is an error."""
    path = MODELS / template / file
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise UsageError(f"{path}: {error}") from error


def check_config(config: model_config_pb2.ModelConfig, template: str) -> None:
    """Raise `UsageError` where a config's tensors are not those of the contract."""
    inputs, outputs = {**_INSIDE, **_OTHERS}[template]
    for kind, configured, agreed in (("input", config.input, inputs), ("output", config.output, outputs)):
        found = [(t.name, model_config_pb2.DataType.Name(t.data_type), tuple(t.dims)) for t in configured]
        wanted = [(t.name, _config_datatype(t.datatype), t.shape) for t in agreed]
        same = [each[:2] for each in found] == [each[:2] for each in wanted]
        if not same or not all(fits(a[2], b[2]) for a, b in zip(found, wanted, strict=True)):
            raise UsageError(f"{config.name}: its {kind}s are {found}; the contract says {wanted}")


def hash_files(folder: Path) -> Mapping[str, str]:
    """SHA-256 of every file below a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def _write_native(folder: Path, scenario: Scenario, graph: TensorrtGraph) -> None:
    """What Triton reads under `--model-config-name tensorrt`, and the graph that the plan is built from."""
    target, bert = graph.target, folder / contract.BERT
    native = fill_native_config(load_config(contract.BERT, f"configs/{target.layout}.pbtxt"), target)
    _finish(native.config, _PLAN, scenario)
    _write_config(bert / "configs" / f"{CONFIG_NAME}.pbtxt", native.config)
    (bert / "warmup").mkdir()
    for name, content in native.warmup.items():
        (bert / "warmup" / name).write_bytes(content)
    shutil.copyfile(graph.onnx, bert / contract.VERSION / TENSORRT_ONNX)
    service = load_config(ENSEMBLE_TEMPLATE, f"configs/{CONFIG_NAME}.pbtxt")
    service.name = scenario.name
    service.parameters.MergeFrom(parse_config(folder / scenario.name / CONFIG).parameters)
    _finish(service, ENSEMBLE_TEMPLATE, scenario)
    _write_config(folder / scenario.name / "configs" / f"{CONFIG_NAME}.pbtxt", service)
    tokenizers = scenario.serving.tokenizers
    tokenizer = fill_tokenizer_config(parse_config(folder / contract.TOKENIZER / CONFIG), target, tokenizers)
    _finish(tokenizer, contract.TOKENIZER, scenario)
    _write_config(folder / contract.TOKENIZER / "configs" / f"{CONFIG_NAME}.pbtxt", tokenizer)
    # It has half of the work (docs/performance.md).
    postprocess = fill_postprocess_config(parse_config(folder / contract.POSTPROCESS / CONFIG), -(-tokenizers // 2))
    _finish(postprocess, _BEHIND_PLAN, scenario)
    _write_config(folder / contract.POSTPROCESS / "configs" / f"{CONFIG_NAME}.pbtxt", postprocess)


def _finish(config: model_config_pb2.ModelConfig, template: str, scenario: Scenario) -> None:
    """Fill in the scenario's limits, and check the result against the contract."""
    config.max_batch_size = scenario.max_texts
    if config.HasField("dynamic_batching"):
        config.dynamic_batching.max_queue_delay_microseconds = scenario.serving.max_queue_delay_microseconds
    check_config(config, template)


def _write_config(path: Path, config: model_config_pb2.ModelConfig) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text_format.MessageToString(config, as_utf8=True), encoding="utf-8")


def _write_model(folder: Path, config: model_config_pb2.ModelConfig, source: Path) -> None:
    version = folder / contract.VERSION
    version.mkdir(parents=True)  # an ensemble needs its (empty) version too
    _write_config(folder / CONFIG, config)
    for module in sorted(source.glob("*.py")):
        shutil.copyfile(module, version / module.name)


def _config_datatype(datatype: str) -> str:
    return _CONFIG_DATATYPES.get(datatype, f"TYPE_{datatype}")

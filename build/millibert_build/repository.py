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
from millibert_build.hub import file_sha256
from millibert_build.scenario import Scenario
from millibert_ensemble import contract

MODELS = Path(millibert_ensemble.__file__).parent / "models"
ENSEMBLE_TEMPLATE = "classify"
VERSION = "1"
# Triton's configs say STRING where its protocol says BYTES.
_CONFIG_DATATYPES = {"BYTES": "TYPE_STRING"}

_INSIDE = {
    ENSEMBLE_TEMPLATE: (contract.REQUEST_TENSORS, contract.RESPONSE_TENSORS),
    contract.TOKENIZER: (
        contract.REQUEST_TENSORS,
        (contract.INPUT_IDS, contract.SPAN, contract.TRUNCATED),
    ),
    contract.BERT: ((contract.INPUT_IDS, contract.SPAN), (contract.LOGITS,)),
    contract.POSTPROCESS: ((contract.LOGITS,), (contract.LABEL, contract.SCORE, contract.LABEL_ID, contract.ACCEPTED)),
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


def write_models(folder: Path, scenario: Scenario, artefacts: Artefacts) -> None:
    """Fill an empty folder with the ensemble and its three models."""
    parameters = {
        ENSEMBLE_TEMPLATE: {contract.LABELS_PARAMETER: json.dumps(list(artefacts.labels), ensure_ascii=False)},
        contract.BERT: {
            "engine": artefacts.engine,
            "precision": artefacts.precision,
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
        config.max_batch_size = scenario.max_texts
        for key, value in parameters.get(template, {}).items():
            config.parameters[key].string_value = value
        check_config(config, template)
        _write_model(folder / config.name, config, MODELS / template)
    artefacts.tokenizer.save(str(folder / contract.TOKENIZER / VERSION / "tokenizer.json"))
    shutil.copyfile(artefacts.onnx, folder / contract.BERT / VERSION / "model.onnx")
    for name, values in (("labels", artefacts.labels), ("thresholds", artefacts.calibration.thresholds)):
        path = folder / contract.POSTPROCESS / VERSION / f"{name}.json"
        path.write_text(json.dumps(list(values), ensure_ascii=False, indent=0), encoding="utf-8")


def load_config(template: str) -> model_config_pb2.ModelConfig:
    """Parse a model's `config.pbtxt` with Triton's own protobuf; an unknown field is an error."""
    path = MODELS / template / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise UsageError(f"{path}: {error}") from error


def check_config(config: model_config_pb2.ModelConfig, template: str) -> None:
    """Raise `UsageError` where a config's tensors are not those of the contract."""
    inputs, outputs = _INSIDE[template]
    for kind, configured, agreed in (("input", config.input, inputs), ("output", config.output, outputs)):
        found = [(t.name, model_config_pb2.DataType.Name(t.data_type), tuple(t.dims)) for t in configured]
        wanted = [(t.name, _config_datatype(t.datatype), t.shape) for t in agreed]
        if found != wanted:
            raise UsageError(f"{config.name}: its {kind}s are {found}; the contract says {wanted}")


def hash_files(folder: Path) -> Mapping[str, str]:
    """SHA-256 of every file below a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def _write_model(folder: Path, config: model_config_pb2.ModelConfig, source: Path) -> None:
    version = folder / VERSION
    version.mkdir(parents=True)  # an ensemble needs its (empty) version too
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config, as_utf8=True), encoding="utf-8")
    for module in sorted(source.glob("*.py")):
        shutil.copyfile(module, version / module.name)


def _config_datatype(datatype: str) -> str:
    return _CONFIG_DATATYPES.get(datatype, f"TYPE_{datatype}")

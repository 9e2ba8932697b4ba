"""Whether a model repository is whole: every file there and as it was built, every tensor what the next model takes.

Needs neither an engine nor a GPU, so that it can run before a server starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from millibert_ensemble import contract
from millibert_ensemble.hashing import file_sha256

RELEASE = "release.json"
CONFIG = "config.pbtxt"
# Configs that replace `config.pbtxt` under `--model-config-name`.
CONFIG_NAME = "tensorrt"
# In the manifest of a release whose models were fused into one: `wiring` is `fused`.
WIRING, FUSED_WIRING = "wiring", "fused"

Config = Any  # model_config_pb2.ModelConfig, whose fields have no types


class Check(NamedTuple):
    """What was found: `problems` make the repository unusable, `remarks` do not."""

    manifest: Mapping[str, Any]
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def check_repository(repository: Path) -> Check:
    """Look at everything in it; the first line of each problem says where."""
    try:
        manifest = json.loads((repository / RELEASE).read_text(encoding="utf-8"))
        files, labels = dict(manifest["files"]), list(manifest["labels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or repr(error)
        return Check({}, (f"{repository / RELEASE}: not a release's manifest: {reason}",), ())
    problems: list[str] = []
    remarks: list[str] = []
    for name, sha256 in files.items():
        path = repository / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif file_sha256(path) != sha256:
            # Instance counts and queues are the operator's to change; what they must not break is checked below.
            found = remarks if path.suffix == ".pbtxt" else problems
            found.append(f"{name}: changed since it was built")
    name = str(manifest.get("name", ""))
    fused = manifest.get(WIRING) == FUSED_WIRING
    problems += _check_labels(repository, name, name if fused else contract.POSTPROCESS, labels)
    if fused:
        problems += _check_fused(repository, name)
        return Check(manifest, tuple(dict.fromkeys(problems)), tuple(remarks))
    problems += _check_configs(repository, name, None, len(labels))
    if config_path(repository, contract.BERT, CONFIG_NAME) != config_path(repository, contract.BERT, None):
        problems += _check_configs(repository, name, CONFIG_NAME, len(labels))
    return Check(manifest, tuple(dict.fromkeys(problems)), tuple(remarks))


def config_path(repository: Path, model: str, config_name: str | None) -> Path:
    """The config that Triton reads for a model: the named one, where there is one."""
    named = repository / model / "configs" / f"{config_name}.pbtxt"
    return named if config_name is not None and named.is_file() else repository / model / CONFIG


def parse_config(path: Path) -> Config:
    """Parse with Triton's own protobuf; raises ValueError that says what is wrong."""
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"not a Triton model configuration: {error}") from error


def _check_configs(repository: Path, service: str, config_name: str | None, labels: int) -> Iterator[str]:
    """The four configs of one way to serve, and the tensors between them."""
    configs: dict[str, Config] = {}
    for model in (service, *contract.COMPOSING_MODELS):
        path = config_path(repository, model, config_name)
        where = path.relative_to(repository)
        try:
            configs[model] = parse_config(path)
        except ValueError as error:
            yield f"{where}: {error}"
            continue
        if configs[model].name not in ("", model):
            yield f"{where}: names the model {configs[model].name!r}; its folder is {model!r}"
        if not any(child.is_dir() and child.name.isdecimal() for child in (repository / model).iterdir()):
            yield f"{model}: has no version folder"
    if len(configs) == 1 + len(contract.COMPOSING_MODELS):
        yield from _check_flow(configs, service)
        yield from _check_head(configs[contract.BERT], labels)


def _check_flow(configs: Mapping[str, Config], service: str) -> Iterator[str]:
    """Follow each tensor of the ensemble from where it is made to where it is read."""
    ensemble = configs[service]
    made: dict[str, tuple[str, Config]] = {tensor.name: (service, tensor) for tensor in ensemble.input}
    largest = ensemble.max_batch_size
    smaller = {model: config.max_batch_size for model, config in configs.items() if config.max_batch_size < largest}
    if smaller:
        yield f"{service} takes {largest} texts (max_batch_size), and passes them to what takes fewer: {smaller}"
    for step in ensemble.ensemble_scheduling.step:
        if step.model_name not in configs:
            yield f"{service}: its step {step.model_name!r} is no model of this repository"
            continue
        inner = configs[step.model_name]
        inputs, outputs = ({tensor.name: tensor for tensor in side} for side in (inner.input, inner.output))
        for name, tensor in step.input_map.items():
            yield from _check_link(made.get(tensor), (step.model_name, inputs.get(name)), tensor, name)
        for name in sorted(set(inputs) - set(step.input_map)):
            yield f"{step.model_name}: nothing feeds its input {name!r}"
        for name, tensor in step.output_map.items():
            if name in outputs:
                made[tensor] = (step.model_name, outputs[name])
            else:
                yield f"{step.model_name}: has no output {name!r}, which {service} takes from it"
    for tensor in ensemble.output:
        yield from _check_link(made.get(tensor.name), (service, tensor), tensor.name, tensor.name)


def _check_link(
    source: tuple[str, Config] | None, target: tuple[str, Config | None], tensor: str, name: str
) -> Iterator[str]:
    reader, wanted = target
    if source is None:
        yield f"{reader}: its {name!r} is the tensor {tensor!r}, which no step before it makes"
        return
    maker, given = source
    if wanted is None:
        yield f"{reader}: has no input {name!r}, which {maker} feeds"
    elif given.data_type != wanted.data_type:
        kinds = [model_config_pb2.DataType.Name(side.data_type) for side in (given, wanted)]
        yield f"{tensor}: {maker} makes {kinds[0]}, {reader} takes {kinds[1]}"
    elif not fits(tuple(given.dims), tuple(wanted.dims)):
        yield f"{tensor}: {maker} makes the shape {list(given.dims)}, {reader} takes {list(wanted.dims)}"


def fits(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two shapes can be the same; -1 is any size."""
    return len(given) == len(wanted) and all(a == b or -1 in (a, b) for a, b in zip(given, wanted, strict=True))


def _check_head(bert: Config, labels: int) -> Iterator[str]:
    for tensor in bert.output:
        if tensor.name == contract.LOGITS.name and tuple(tensor.dims) != (labels,):
            yield f"{contract.BERT}: makes logits of shape {list(tensor.dims)}; the release has {labels} labels"


def _check_fused(repository: Path, service: str) -> Iterator[str]:
    """The one config, and its tensors against the contract."""
    try:
        config = parse_config(repository / service / CONFIG)
    except ValueError as error:
        yield f"{service}/{CONFIG}: {error}"
        return
    sides = ((config.input, contract.REQUEST_TENSORS), (config.output, contract.RESPONSE_TENSORS))
    for found, agreed in sides:
        if [tensor.name for tensor in found] != [tensor.name for tensor in agreed]:
            yield f"{service}: its tensors are {[t.name for t in found]}; the contract says {[t.name for t in agreed]}"


def _check_labels(repository: Path, service: str, ranking: str, labels: list[str]) -> Iterator[str]:
    """The label list stands in three places: clients, the model that ranks, and people read one each."""
    path = repository / ranking / contract.VERSION / "labels.json"
    try:
        if json.loads(path.read_text(encoding="utf-8")) != labels:
            yield f"{path.relative_to(repository)}: not the labels of {RELEASE}"
    except (OSError, ValueError) as error:
        yield f"{path.relative_to(repository)}: {error}"
    try:
        parameters = parse_config(repository / service / CONFIG).parameters
        if json.loads(parameters[contract.LABELS_PARAMETER].string_value) != labels:
            yield f"{service}/{CONFIG}: not the labels of {RELEASE}"
    except ValueError:
        return  # `_check_configs` says what is wrong with the file

"""Releases that differ from a given one in a single respect, to measure what that respect brings."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from google.protobuf import text_format

from millibert._errors import UsageError
from millibert_build.tensorrt.target import buckets_of
from millibert_ensemble import contract
from millibert_ensemble.models.tokenizer.tokenization import load
from millibert_ensemble.repository_check import CONFIG, parse_config

# Texts that scales are taken from, and how many of them share a batch.
_CALIBRATION_TEXTS, _BATCH = 512, 64


def write_padded_twin(repository: Path, checkpoint: Path, texts: Sequence[str], out: Path) -> None:
    """The same model in the classical layout: rectangular and padded; `checkpoint` is what the release was made from.

    Texts are padded to buckets (16, 32, 64, … tokens), and Triton merges the requests of one bucket. Weights, engine
    and precision are the release's. Where that is int8, the twin is quantised with the scales that these texts call
    for: fit for timing, not for serving. Raises `UsageError` where the checkpoint is not there, or is not the one.
    """
    _check_checkpoint(checkpoint)
    shutil.copytree(repository, out, copy_function=os.link)
    bert = parse_config(repository / contract.BERT / CONFIG)
    tokenizer = parse_config(repository / contract.TOKENIZER / CONFIG)
    max_tokens = int(bert.parameters["max_tokens"].string_value)
    for tensor in bert.input:
        tensor.ClearField("allow_ragged_batch")
    bert.parameters["layout"].string_value = "padded"
    tokenizer.parameters["buckets"].string_value = json.dumps(buckets_of(max_tokens))
    for name, config in ((contract.BERT, bert), (contract.TOKENIZER, tokenizer)):
        _replace(out / name / CONFIG, text_format.MessageToString(config, as_utf8=True).encode())
    path = repository / contract.TOKENIZER / contract.VERSION / "tokenizer.json"
    encodings = load(path).encode_batch_fast(list(texts[:_CALIBRATION_TEXTS]))
    ids = [encoding.ids for encoding in encodings]
    graph = _padded_graph(checkpoint, max_tokens, bert.parameters["precision"].string_value, ids)
    _replace(out / contract.BERT / contract.VERSION / "model.onnx", graph)


def write_cached_twin(repository: Path, cached: int, out: Path) -> None:
    """The same release with room for the answers to so many texts."""
    shutil.copytree(repository, out, copy_function=os.link)
    write_parameters(out / contract.BERT / CONFIG, cache_texts=str(cached))


def write_fp32_twin(repository: Path, checkpoint: Path, out: Path) -> None:
    """The same model in fp32, for peers that compute in nothing less."""
    from millibert_build.checkpoint import load_model
    from millibert_build.export import export_rows

    _check_checkpoint(checkpoint)
    shutil.copytree(repository, out, copy_function=os.link)
    limit = parse_config(repository / contract.BERT / CONFIG).parameters["max_tokens"].string_value
    path = out / contract.BERT / contract.VERSION / "model.onnx"
    path.unlink()
    export_rows(load_model(checkpoint), int(limit), path)
    write_parameters(out / contract.BERT / CONFIG, precision="fp32")


def write_parameters(path: Path, **parameters: str) -> None:
    """Change parameters in a config of a copy of a release; not in place, since the release's own file is linked."""
    config = parse_config(path)
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    _replace(path, text_format.MessageToString(config, as_utf8=True).encode())


def _check_checkpoint(checkpoint: Path) -> None:
    if not (checkpoint / "config.json").is_file():
        raise UsageError(f"{checkpoint}: not a checkpoint; `millibert build` keeps it in its --work folder")


def _replace(path: Path, content: bytes) -> None:
    """Not in place: the release's own file is linked here."""
    path.unlink()
    path.write_bytes(content)


def _padded_graph(checkpoint: Path, max_tokens: int, precision: str, ids: Sequence[Sequence[int]]) -> bytes:
    from millibert_build.checkpoint import load_model
    from millibert_build.export import export_padded, export_rows
    from millibert_build.layouts import without_padding
    from millibert_build.quantize import calibrate, quantize_dynamic, write_quantized

    with tempfile.TemporaryDirectory() as folder:
        rows, padded, out = (Path(folder, f"{name}.onnx") for name in ("rows", "padded", "out"))
        export_padded(load_model(checkpoint), max_tokens, padded)
        if precision == "int8":
            export_rows(load_model(checkpoint), max_tokens, rows)
            write_quantized(padded, out, calibrate(rows, without_padding(ids, _BATCH)))
        elif precision == "int8_dynamic":
            quantize_dynamic(padded, out)
        else:
            out = padded
        return out.read_bytes()

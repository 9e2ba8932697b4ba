"""Triton's own configs for a plan: the templates beside the models, with sizes, profiles, CUDA graphs and warm-up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import model_config_pb2

from millibert_build.tensorrt.profiles import profiles_of
from millibert_build.tensorrt.target import Target
from millibert_ensemble.contract import ADMISSION

Config = Any  # model_config_pb2.ModelConfig, whose fields have no types
# Any id of the vocabulary will do, but 0, which is padding.
_ID = 1


@dataclass(frozen=True)
class Native:
    """The config of the plan, and the files that its warm-up reads, by name."""

    config: Config
    warmup: Mapping[str, bytes]


def fill_native_config(template: Config, target: Target) -> Native:
    """Fill in what depends on the build; `template` is changed."""
    template.max_batch_size = target.max_texts
    (logits,) = template.output
    logits.dims[:] = [target.labels]
    for group in template.instance_group:
        group.profile[:] = [str(number) for number in range(len(profiles_of(target)))]
    if target.layout == "padded":
        _add_graphs(template, target)
    return Native(template, _add_warmup(template, target))


def fill_tokenizer_config(config: Config, target: Target, instances: int) -> Config:
    """How many tokenize; and the buckets of the padded layout. `config` is changed."""
    config.instance_group[0].count = instances
    if target.layout == "padded":
        config.parameters["buckets"].string_value = json.dumps(list(target.buckets))
    return config


def fill_postprocess_config(config: Config, instances: int) -> Config:
    """How many postprocess; and let them tell how far the plan is, which cannot say so itself. `config` is changed."""
    config.instance_group[0].count = instances
    datatype = model_config_pb2.DataType.Value(f"TYPE_{ADMISSION.datatype}")
    config.input.add(name=ADMISSION.name, data_type=datatype, dims=ADMISSION.shape)
    return config


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, … and `most`."""
    return [*(1 << shift for shift in range(most.bit_length()) if 1 << shift < most), most]


def _add_graphs(config: Config, target: Target) -> None:
    """One CUDA graph for each bucket and each power of two of texts; a smaller batch uses the next larger graph."""
    for bucket in target.buckets:
        smaller = 0
        for texts in batch_sizes(target.max_texts):
            spec = config.optimization.cuda.graph_spec.add()
            spec.batch_size, spec.graph_lower_bound.batch_size = texts, smaller + 1
            for shapes in (spec.input, spec.graph_lower_bound.input):
                shapes["input_ids"].dim[:] = [bucket]
                shapes["span"].dim[:] = [1]
            smaller = texts


def _add_warmup(config: Config, target: Target) -> dict[str, bytes]:
    """Requests that touch every profile before the first client does; returns the files they read.

    Triton's random data would be ids out of any vocabulary, and its zeros nothing but padding, so the ids are files.
    """
    files = {}
    for texts, tokens in _warmup_shapes(target):
        name = f"input_ids_{texts}x{tokens}"
        request = config.model_warmup.add()
        request.name, request.batch_size = f"{texts} texts of {tokens} tokens", texts
        ids = request.inputs["input_ids"]
        ids.data_type, ids.dims[:], ids.input_data_file = _data_type(config, "input_ids"), [tokens], name
        span = request.inputs["span"]
        width = 1 if target.layout == "padded" else -(-tokens // texts)
        span.data_type, span.dims[:], span.zero_data = _data_type(config, "span"), [width], True
        files[name] = np.full((texts, tokens), _ID, np.int32).tobytes()
    return files


def _warmup_shapes(target: Target) -> Iterator[tuple[int, int]]:
    if target.layout == "padded":
        yield from ((texts, bucket) for bucket in target.buckets for texts in (1, target.max_texts))
        return
    for texts in batch_sizes(target.max_texts):
        yield texts, target.typical_tokens
    yield 1, target.max_tokens
    yield target.max_texts, target.max_tokens


def _data_type(config: Config, name: str) -> int:
    return next(int(tensor.data_type) for tensor in config.input if tensor.name == name)

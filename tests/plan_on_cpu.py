"""A release served as with a TensorRT plan, with the CPU engine in the plan's place: all but the plan's own backend."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tests.conftest import rewrite
from tritonclient.grpc import model_config_pb2

from millibert_ensemble.repository_check import parse_config

# The option of tritonserver that serves it.
NAMED = "--model-config-name=tensorrt"


def put_in_the_plans_place(repository: Path) -> None:
    """Change a copy of a release: what stays of the native config are inputs, output, batching and warm-up."""
    path = repository / "bert" / "configs" / "tensorrt.pbtxt"
    config = parse_config(path)
    config.backend, config.default_model_filename = "python", ""
    config.instance_group[0].kind = model_config_pb2.ModelInstanceGroup.KIND_CPU
    del config.instance_group[0].profile[:]
    config.ClearField("optimization")
    config.ClearField("batch_input")
    for key, value in parse_config(repository / "bert" / "config.pbtxt").parameters.items():
        config.parameters[key].string_value = value.string_value
    rewrite(path, text_format.MessageToString(config))

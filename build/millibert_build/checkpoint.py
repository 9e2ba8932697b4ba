"""A fine-tuned checkpoint on disk: Hugging Face's files, and beside them what millibert must remember.

`millibert.json` is written last, so a folder that has it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from millibert_build.prune import shape_as_noted, structure_of

RECORD = "millibert.json"
_HEAD = ("classifier.weight", "classifier.bias")


def load_model(folder: Path) -> PreTrainedModel:
    """The classifier in fp32, ready to infer; a pruned one in the shape that its config notes."""
    transformers_logging.disable_progress_bar()
    config = BertConfig.from_pretrained(folder)
    model: PreTrainedModel
    if structure_of(config) is None:
        model = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    else:
        model = load_pruned(folder, config)
    model.eval()
    return model


def load_pruned(folder: Path, config: BertConfig) -> PreTrainedModel:
    """A pruned classifier in fp32; its head is new where `config` has another number of labels.

    `from_pretrained` would build every layer in the full size and refuse the smaller weights.
    """
    model: PreTrainedModel = BertForSequenceClassification(config).float()
    shape_as_noted(model)
    weights, fresh = load_file(folder / SAFE_WEIGHTS_NAME), model.state_dict()
    for name in _HEAD:
        if weights[name].shape != fresh[name].shape:
            weights[name] = fresh[name]
    model.load_state_dict(weights)
    return model


def load_record(folder: Path) -> dict[str, Any]:
    """What was remembered with the checkpoint; empty where there is none."""
    path = folder / RECORD
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def save_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Remember something with a checkpoint; this makes it whole."""
    (folder / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")

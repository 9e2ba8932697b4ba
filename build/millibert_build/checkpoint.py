"""A fine-tuned checkpoint on disk: Hugging Face's files, and beside them what millibert must remember.

`millibert.json` is written last, so a folder that has it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from millibert._errors import UsageError
from millibert_build.batches import predict_logits
from millibert_build.prune import shape_as_noted, structure_of
from millibert_build.tokens import limited, load_tokenizer, token_ids

RECORD = "millibert.json"


def load_model(folder: Path) -> PreTrainedModel:
    """The classifier in fp32, ready to infer; a pruned one in the shape that its config notes."""
    transformers_logging.disable_progress_bar()
    config = BertConfig.from_pretrained(folder)
    model: PreTrainedModel
    if structure_of(config) is None:
        model = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    else:
        # `from_pretrained` builds every layer in the full size and refuses smaller weights.
        model = BertForSequenceClassification(config).float()
        shape_as_noted(model)
        model.load_state_dict(load_file(folder / SAFE_WEIGHTS_NAME))
    model.eval()
    return model


def load_record(folder: Path) -> dict[str, Any]:
    """What was remembered with the checkpoint; empty where there is none."""
    path = folder / RECORD
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def save_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Remember something with a checkpoint; this makes it whole."""
    (folder / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")


def best_labels(folder: Path, texts: Sequence[str]) -> list[str]:
    """The label that the checkpoint itself, in PyTorch and fp32, gives each text."""
    record = load_record(folder)
    if not record:
        raise UsageError(f"{folder}: not a checkpoint of `millibert build` (no {RECORD}); look in its --work folder")
    model = load_model(folder)
    tokenizer = limited(load_tokenizer(str(folder)), record["max_tokens"])
    best = predict_logits(model, token_ids(tokenizer, texts), show="checkpoint").argmax(1)
    names = dict(model.config.id2label or {})
    return [str(names[index]) for index in best.tolist()]

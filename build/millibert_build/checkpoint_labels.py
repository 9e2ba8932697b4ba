"""The labels that a checkpoint itself gives a text, with its own calibration: what a served answer is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from millibert._errors import UsageError
from millibert_build.batches import predict_logits
from millibert_build.calibrate import load_calibration
from millibert_build.checkpoint import RECORD, load_model, load_record
from millibert_build.evaluate import predicted
from millibert_build.tokens import limited, load_tokenizer, token_ids
from millibert_ensemble.models.postprocess.ranking import ACTIVATIONS


def label_sets(folder: Path, texts: Sequence[str]) -> list[frozenset[str]]:
    """The labels of each text in PyTorch and fp32: the best one, or all that reach their threshold."""
    record = load_record(folder)
    if not record:
        raise UsageError(f"{folder}: not a checkpoint of `millibert build` (no {RECORD}); look in its --work folder")
    calibration = load_calibration(folder) if record.get("problem") == "multi_label" else None
    model = load_model(folder)
    tokenizer = limited(load_tokenizer(str(folder)), record["max_tokens"])
    logits = predict_logits(model, token_ids(tokenizer, texts), show="checkpoint").numpy()
    if calibration is not None:
        probabilities = ACTIVATIONS["multi_label"](logits / np.float32(calibration.temperature))
        given = predicted("multi_label", probabilities, calibration.thresholds)
    else:
        given = predicted("single_label", logits, ())
    names = {int(index): str(label) for index, label in dict(model.config.id2label or {}).items()}
    return [frozenset(names[index] for index in np.flatnonzero(row).tolist()) for row in given]

"""The service's contract: model and tensor names, dtypes and shapes, written once.

Configs, models, clients, manifests and tests are checked against this file. Shapes leave out the batch
dimension B (texts of a request); -1 is a dimension that depends on the request.

    TEXT ─► tokenizer ─► input_ids, admission ─► bert ─► logits ─► postprocess ─► LABEL, SCORE,
                │  (a plan: span; admission goes past it to postprocess)           LABEL_ID, ACCEPTED
                └─────────────────────────────────────────────────────────────► TRUNCATED
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tensor:
    """One tensor: its name, Triton datatype (`BYTES`, `FP32`, …) and shape without the batch dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


# The three composing models. The ensemble in front of them carries the scenario's own name.
TOKENIZER = "tokenizer"
BERT = "bert"
POSTPROCESS = "postprocess"
COMPOSING_MODELS = (TOKENIZER, BERT, POSTPROCESS)

# The version folder of every model.
VERSION = "1"

# What a client sends and receives.
TEXT = Tensor("TEXT", "BYTES", (1,))  # UTF-8
LABEL = Tensor("LABEL", "BYTES", (-1,))  # [B, K], best first
SCORE = Tensor("SCORE", "FP32", (-1,))  # [B, K], probabilities
LABEL_ID = Tensor("LABEL_ID", "INT32", (-1,))  # [B, K], indices into the label list
# [B, K], the score reaches its threshold. One label a text: a best label that is not accepted means "don't know".
# Several: exactly the accepted labels hold.
ACCEPTED = Tensor("ACCEPTED", "BOOL", (-1,))
TRUNCATED = Tensor("TRUNCATED", "BOOL", (1,))  # the text was longer than the model reads
REQUEST_TENSORS = (TEXT,)
RESPONSE_TENSORS = (LABEL, SCORE, LABEL_ID, ACCEPTED, TRUNCATED)

# What flows between the models.
INPUT_IDS = Tensor("input_ids", "INT32", (-1,))  # [B, L], rows padded with id 0 to the longest of the request
SPAN = Tensor("span", "INT32", (-1,))  # [B, ceil(longest / B)] zeros: carries the longest length as a size
# When the CPU engine need not begin any more, in microseconds of the machine's monotonic clock; and how many texts the
# tokenizer has let in, with these. The same for all rows.
ADMISSION = Tensor("admission", "INT64", (2,))
LOGITS = Tensor("logits", "FP32", (-1,))  # [B, labels]

# The request parameter that sets K, from 1 to the number of labels.
TOP_K_PARAMETER = "top_k"

# The request parameter that shortens how long a request may wait for the CPU engine, in milliseconds.
QUEUE_TIMEOUT_PARAMETER = "queue_timeout_ms"

# The parameter of the ensemble's config that holds all labels, a JSON list in the order of their ids.
LABELS_PARAMETER = "labels"

# The parameter of a config that says how many texts a request may hold, where `max_batch_size` is larger than that.
MAX_TEXTS_PARAMETER = "max_texts"

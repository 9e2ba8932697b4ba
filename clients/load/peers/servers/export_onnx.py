"""A checkpoint as the usual padded ONNX graph: input_ids and attention_mask [texts, tokens] to logits [texts, labels].

    python export_onnx.py --checkpoint DIR --out FILE

torch.onnx.export with its TorchScript exporter: of the ways that were tried (that one and the one that is built on
torch.export, each with and without ONNX Runtime's offline fusions for BERT) its graph takes the least CPU time, with
the fusions that ONNX Runtime makes when it loads it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

INPUTS = ("input_ids", "attention_mask")


def export(checkpoint: Path, path: Path) -> None:
    """Write the graph, in fp32, free in both axes."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    # Two texts and not one, of which one is padded: what is traced must not depend on either.
    ids = torch.full((2, 8), 100)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    axes = {name: {0: "texts", 1: "tokens"} for name in INPUTS} | {"logits": {0: "texts"}}
    torch.onnx.export(
        model,
        (ids, mask),
        str(path),
        input_names=list(INPUTS),
        output_names=["logits"],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.checkpoint, args.out)

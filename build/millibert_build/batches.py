"""Examples as a model sees them: token ids, targets, batches of similar length, and logits in order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from millibert_build.dataset import Example, target_matrix
from millibert_build.tokens import token_ids

# Batches are cut from chunks of this many batches, sorted by length: little padding, still shuffled.
CHUNK_BATCHES = 50
EVALUATION_BATCH = 128


@dataclass(frozen=True)
class Encoded:
    """Examples of one split: token ids of each text, and which labels fit it, multi-hot [texts, labels] float32."""

    ids: list[list[int]]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def encode(examples: Sequence[Example], tokenizer: Tokenizer, labels: Sequence[str]) -> Encoded:
    """Tokenize a split."""
    ids = token_ids(tokenizer, [example.text for example in examples])
    return Encoded(ids, torch.from_numpy(target_matrix(examples, labels)))


def shuffled_batches(ids: Sequence[Sequence[int]], batch_size: int, generator: random.Random) -> list[list[int]]:
    """Indices of all texts in batches of similar length, in a random order."""
    shuffled = generator.sample(range(len(ids)), len(ids))
    chunk = batch_size * CHUNK_BATCHES
    batches = []
    for start in range(0, len(shuffled), chunk):
        ordered = sorted(shuffled[start : start + chunk], key=lambda index: len(ids[index]))
        batches += [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    generator.shuffle(batches)
    return batches


def padded(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [texts, longest] int64."""
    longest = max(map(len, ids))
    input_ids = torch.zeros(len(ids), longest, dtype=torch.long)
    attention_mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for row, text, mask in zip(ids, input_ids, attention_mask, strict=True):
        text[: len(row)] = torch.tensor(row)
        mask[: len(row)] = 1
    return input_ids, attention_mask


def predict_logits(model: PreTrainedModel, ids: Sequence[Sequence[int]], show: str | None = None) -> Tensor:
    """Logits [texts, labels] in fp32 on the CPU of the Hugging Face model, padded batches sorted by length."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    result = torch.empty(len(ids), cast(int, model.config.num_labels))
    model.eval()
    starts = range(0, len(order), EVALUATION_BATCH)
    with torch.inference_mode():
        for start in tqdm(starts, desc=show, disable=None if show else True, leave=False):
            chunk = order[start : start + EVALUATION_BATCH]
            input_ids, attention_mask = (each.to(model.device) for each in padded([ids[index] for index in chunk]))
            result[chunk] = model(input_ids=input_ids, attention_mask=attention_mask).logits.float().cpu()
    return result

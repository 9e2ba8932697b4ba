"""What a checkpoint answers with its own thresholds, against its logits computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from millibert import UsageError
from millibert_build.calibrate import Calibration, save_calibration
from millibert_build.checkpoint import save_record
from millibert_build.checkpoint_labels import label_sets

LABELS = ("x", "y", "z")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]
TEXTS = ["a", "b c", "d d a", "c b a d"]
TEMPERATURE = 0.5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with an untrained classifier, and its sigmoid probabilities [texts, labels] for `TEXTS`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label=dict(enumerate(LABELS)),
        initializer_range=0.2,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    with torch.inference_mode():
        logits = torch.cat([model(torch.tensor([tokenizer.encode(text).ids])).logits for text in TEXTS])
    return folder, torch.sigmoid(logits / TEMPERATURE).numpy()


def test_each_label_that_reaches_its_threshold_is_in_the_set(checkpoint):
    folder, probabilities = checkpoint
    # Between the second and the third highest of each label: two texts reach it.
    thresholds = np.sort(probabilities, axis=0)[1:3].mean(axis=0)
    save_record(folder, {"max_tokens": 16, "problem": "multi_label"})
    save_calibration(folder, Calibration(TEMPERATURE, tuple(thresholds.tolist())))
    sets = label_sets(folder, TEXTS)
    assert sets == [
        frozenset(label for label, reached in zip(LABELS, row, strict=True) if reached)
        for row in probabilities >= thresholds
    ]
    assert [sum(label in each for each in sets) for label in LABELS] == [2, 2, 2]


def test_one_label_a_text_is_the_best_one_whatever_the_threshold(checkpoint):
    folder, probabilities = checkpoint
    save_record(folder, {"max_tokens": 16, "problem": "single_label"})
    save_calibration(folder, Calibration(TEMPERATURE, (1.0,) * 3))
    assert label_sets(folder, TEXTS) == [frozenset([LABELS[best]]) for best in probabilities.argmax(axis=1)]


def test_a_folder_without_record_or_thresholds_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="not a checkpoint of `millibert build`"):
        label_sets(tmp_path, TEXTS)
    save_record(tmp_path, {"max_tokens": 16, "problem": "multi_label"})
    with pytest.raises(UsageError, match=r"calibration\.json: cannot read the checkpoint's thresholds"):
        label_sets(tmp_path, TEXTS)

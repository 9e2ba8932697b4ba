"""Fine-tuning, on a BERT of two narrow layers and words that give their label away."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig

from millibert import UsageError
from millibert_build.checkpoint import best_labels, load_model, save_record
from millibert_build.dataset import Example, Splits
from millibert_build.hub import resolve_base
from millibert_build.scenario import Training
from millibert_build.train import Encoded, _batches, _optimizer, best_epoch, learning_rate, train

WORDS = {"greet": ["hello", "hi", "morning"], "part": ["bye", "later", "farewell"], "ask": ["what", "why", "who"]}
FILLER = [f"word{i}" for i in range(20)]
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *(word for words in WORDS.values() for word in words)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), **SHAPE)).save_pretrained(folder)
    return resolve_base(str(folder))


@pytest.fixture(scope="module")
def splits():
    def some(count: int, seed: int) -> tuple[Example, ...]:
        generator = random.Random(seed)
        examples = []
        for number in range(count):
            label = sorted(WORDS)[number % 3]
            words = [generator.choice(WORDS[label]), *generator.choices(FILLER, k=generator.randint(1, 9))]
            generator.shuffle(words)
            examples.append(Example(" ".join(words), label, "made", number))
        return tuple(examples)

    return Splits(some(240, 1), some(60, 2), some(60, 3), tuple(sorted(WORDS)))


def run(base, splits, folder: Path, **training):
    settings: dict[str, Any] = {"epochs": 6, "learning_rate": 5e-3, **training}
    return train(base, splits, Training(**settings), 16, folder)


def test_it_learns_and_keeps_the_best_epoch(base, splits, tmp_path):
    curve = run(base, splits, tmp_path, epochs=15)
    assert curve[-1].loss < curve[0].loss
    assert best_epoch(curve).validation_accuracy > 0.9
    save_record(tmp_path, {"max_tokens": 16})
    predicted = best_labels(tmp_path, [example.text for example in splits.validation])
    right = [label == example.label for label, example in zip(predicted, splits.validation, strict=True)]
    assert sum(right) / len(right) == pytest.approx(best_epoch(curve).validation_accuracy)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(base, splits, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(base, splits, tmp_path / name, epochs=1, seed=seed)
        weights.append(load_model(tmp_path / name).state_dict()["classifier.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("knob", [{"label_smoothing": 0.0}, {"weight_decay": 0.5}, {"warmup": 0.9}, {"batch_size": 8}])
def test_every_knob_changes_the_result(base, splits, tmp_path, knob):
    run(base, splits, tmp_path / "default", epochs=1)
    run(base, splits, tmp_path / "changed", epochs=1, **knob)
    default, changed = (load_model(tmp_path / name).state_dict() for name in ("default", "changed"))
    assert not torch.equal(default["classifier.weight"], changed["classifier.weight"])


def test_batches_hold_every_example_once_and_little_padding():
    generator = random.Random(0)
    examples = [Encoded([1] * generator.randint(2, 60), 0) for _ in range(1000)]
    batches = _batches(examples, 16, random.Random(0))
    assert sorted(id(e) for batch in batches for e in batch) == sorted(id(e) for e in examples)
    padded = sum(max(len(e.ids) for e in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(len(e.ids) for e in examples)
    # The order of lengths is not the order of training.
    longest = [max(len(e.ids) for e in batch) for batch in batches]
    assert longest != sorted(longest)


def test_biases_and_norms_do_not_decay_and_the_rate_rises_and_falls(base, splits, tmp_path):
    run(base, splits, tmp_path, epochs=1)
    model = load_model(tmp_path)
    optimizer, schedule = _optimizer(model, Training(weight_decay=0.1, warmup=0.2, learning_rate=1.0), steps=100)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 1 for p in free["params"])
    assert all(p.ndim == 2 for p in decayed["params"])
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates.index(max(rates)) == 19
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(1 / 80)


def test_narrow_models_get_larger_steps():
    assert learning_rate(Training(), 768) == pytest.approx(2e-5)
    assert learning_rate(Training(), 384) == pytest.approx(2e-4, rel=0.01)
    assert learning_rate(Training(learning_rate=3e-5), 384) == 3e-5


def test_another_architecture_is_refused_by_name(base, splits, tmp_path):
    RobertaConfig(**SHAPE).save_pretrained(tmp_path)
    other = base._replace(location=str(tmp_path), name="mine")
    load = Path(base.location)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((load / name).read_bytes())
    with pytest.raises(UsageError, match="mine: model type 'roberta' is not implemented"):
        run(other, splits, tmp_path / "out")


def test_more_tokens_than_positions_are_refused(base, splits, tmp_path):
    with pytest.raises(UsageError, match="max_tokens 64 is more than the 32 positions"):
        train(base, splits, Training(epochs=1), 64, tmp_path)

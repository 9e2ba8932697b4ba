"""The stages that train: what they keep, take up again, and learn from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from millibert import UsageError
from millibert_build import stages
from millibert_build.batches import encode, predict_logits
from millibert_build.checkpoint import load_model
from millibert_build.dataset import Example, Splits
from millibert_build.hub import Base, resolve_base
from millibert_build.prune import structure_of
from millibert_build.scenario import Scenario, Training, make_scenario
from millibert_build.stages import Trained, fine_tuned, pruned
from millibert_build.train import load_base

WORDS = {"ask": ["what", "why"], "greet": ["hello", "hi"], "part": ["bye", "later"]}
FILLER = [f"word{i}" for i in range(10)]


def examples(count: int, seed: int) -> tuple[Example, ...]:
    generator = random.Random(seed)
    found = []
    for number in range(count):
        label = sorted(WORDS)[number % 3]
        found.append(Example(f"{generator.choice(WORDS[label])} {generator.choice(FILLER)}", (label,), "made", number))
    return tuple(found)


SPLITS = Splits(examples(96, 1), examples(30, 2), examples(30, 3), tuple(sorted(WORDS)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    vocabulary = ["[PAD]", "[UNK]", *FILLER, *(word for words in WORDS.values() for word in words)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    shape: Any = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **shape)).save_pretrained(folder)
    return resolve_base(str(folder))


def scenario(**sections: Any) -> Scenario:
    training = {"epochs": 3, "learning_rate": 3e-3, **sections.pop("training", {})}
    document = {"name": "x", "max_tokens": 8, "data": {"train": "a", "test": "b"}, "training": training, **sections}
    return make_scenario(document, "the test")


PRUNING = {"heads": 0.25, "neurons": 0.5, "layers": 1, "recovery_epochs": 3}


@pytest.fixture(scope="module")
def trained(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return fine_tuned(scenario(), base, SPLITS, tmp_path_factory.mktemp("work"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def test_what_the_same_inputs_gave_is_taken_again_and_nothing_else(base, tmp_path):
    first = fine_tuned(scenario(), base, SPLITS, tmp_path)
    assert not first.reused
    assert fine_tuned(scenario(), base, SPLITS, tmp_path).reused
    assert {path.name for path in first.folder.iterdir()} == {
        *("config.json", "fingerprint", "millibert.json", "model.safetensors", "tokenizer.json"),
        "tokenizer_config.json",
    }
    assert not fine_tuned(scenario(training={"epochs": 2}), base, SPLITS, tmp_path).reused
    assert fine_tuned(scenario(training={"epochs": 2}), base, SPLITS, tmp_path).reused


class KilledError(Exception):
    pass


def test_a_killed_recovery_goes_on_and_does_not_prune_again(trained, tmp_path, monkeypatch):
    settings = scenario(pruning=PRUNING)
    whole = pruned(settings, trained, SPLITS, tmp_path / "whole")

    class Log:
        def add_scalar(self, name: str, _: float, number: int) -> None:
            if name == "validation/score" and number == 2:
                raise KilledError

        def flush(self) -> None:
            pass

    with pytest.raises(KilledError):
        pruned(settings, trained, SPLITS, tmp_path / "killed", Log())
    assert not (tmp_path / "killed" / "pruned").exists()

    def refuse(*_: Any) -> None:
        raise AssertionError("importance was measured again")

    monkeypatch.setattr(stages, "prune", refuse)
    resumed = pruned(settings, trained, SPLITS, tmp_path / "killed")
    assert resumed.curve == whole.curve
    assert resumed.record["removed"] == whole.record["removed"]
    expected, found = weights(whole.folder), weights(resumed.folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not (resumed.folder / "start").exists()


def test_a_pruned_checkpoint_can_be_a_base(trained, tmp_path):
    smaller = pruned(scenario(pruning=PRUNING), trained, SPLITS, tmp_path)
    base = resolve_base(str(smaller.folder))
    model = load_base(base, SPLITS.labels, 8, "single_label", Training())
    assert structure_of(model.config) == structure_of(smaller.model.config)
    ids = encode(SPLITS.test, smaller.tokenizer, SPLITS.labels).ids
    assert torch.equal(predict_logits(model.eval(), ids), predict_logits(smaller.model, ids))
    other = load_base(base, ["one", "two", "three", "four"], 8, "single_label", Training())
    assert other.classifier.out_features == 4
    assert torch.equal(
        other.bert.encoder.layer[0].intermediate.dense.weight, model.bert.encoder.layer[0].intermediate.dense.weight
    )
    again = fine_tuned(scenario(training={"epochs": 1}), base, SPLITS, tmp_path / "again")
    assert structure_of(again.model.config) == structure_of(smaller.model.config)


def test_several_teachers_teach_their_mean(base, trained, tmp_path, monkeypatch):
    second = fine_tuned(scenario(training={"seed": 7}), base, SPLITS, tmp_path / "second")
    heard = []

    def listen(_: Any, course: Any, __: Path) -> None:
        heard.append(course.teacher.logits)
        raise KilledError

    monkeypatch.setattr(stages, "fine_tune", listen)
    folders = [str(trained.folder), str(second.folder)]
    with pytest.raises(KilledError):
        fine_tuned(scenario(distillation={"teacher": folders}), base, SPLITS, tmp_path / "student")
    ids = encode(SPLITS.train, trained.tokenizer, SPLITS.labels).ids
    mean = (predict_logits(trained.model, ids) + predict_logits(second.model, ids)) / 2
    torch.testing.assert_close(heard[0], mean)
    with pytest.raises(UsageError, match=r"distillation\.teacher: no model\.safetensors in nowhere"):
        fine_tuned(scenario(distillation={"teacher": [folders[0], "nowhere"]}), base, SPLITS, tmp_path / "student")

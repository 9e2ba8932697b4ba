"""Fine-tuning, on a BERT of two narrow layers and words that give their label away."""

from __future__ import annotations

import dataclasses
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
from millibert_build.batches import encode, shuffled_batches
from millibert_build.checkpoint import load_model, save_record
from millibert_build.checkpoint_labels import label_sets
from millibert_build.dataset import Example, Splits
from millibert_build.hub import resolve_base
from millibert_build.learning_curve import best_epoch
from millibert_build.objective import Teacher
from millibert_build.optimisation import learning_rate, make_optimizer, make_schedule
from millibert_build.scenario import Training
from millibert_build.tokens import limited, load_tokenizer
from millibert_build.train import STATE, Course, fine_tune, load_base

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
            examples.append(Example(" ".join(words), (label,), "made", number))
        return tuple(examples)

    return Splits(some(240, 1), some(60, 2), some(60, 3), tuple(sorted(WORDS)))


@pytest.fixture(scope="module")
def uneven(splits):
    """The same with fewer texts of one label."""
    first = splits.labels[0]
    kept = [e for index, e in enumerate(splits.train) if e.labels != (first,) or index % 4 == 0]
    return dataclasses.replace(splits, train=tuple(kept))


def course(base, splits, after_step=None, teacher=None, problem="single_label", **training) -> Course:
    settings: dict[str, Any] = {"epochs": 6, "learning_rate": 5e-3, **training}
    tokenizer = limited(load_tokenizer(base.location), 16)
    train, validation = (encode(split, tokenizer, splits.labels) for split in (splits.train, splits.validation))
    return Course(problem, train, validation, Training(**settings), teacher, after_step)


def run(base, splits, folder: Path, **settings):
    made = course(base, splits, **settings)
    model = load_base(base, splits.labels, 16, made.problem, made.training)
    curve = fine_tune(model, made, folder)
    load_tokenizer(base.location).save_pretrained(folder)
    return curve


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_keeps_the_best_epoch(base, splits, tmp_path):
    curve = run(base, splits, tmp_path, epochs=15)
    assert curve[-1].loss < curve[0].loss
    assert best_epoch(curve).validation_score > 0.9
    save_record(tmp_path, {"max_tokens": 16})
    predicted = label_sets(tmp_path, [example.text for example in splits.validation])
    right = [given == set(example.labels) for given, example in zip(predicted, splits.validation, strict=True)]
    assert sum(right) / len(right) == pytest.approx(best_epoch(curve).validation_score)


def test_several_labels_of_a_text_are_learnt_together(base, tmp_path):
    def some(count: int, seed: int) -> tuple[Example, ...]:
        generator = random.Random(seed)
        examples = []
        for number in range(count):
            labels = tuple(sorted(generator.sample(sorted(WORDS), number % 3)))
            words = [generator.choice(WORDS[label]) for label in labels] + generator.choices(FILLER, k=5)
            generator.shuffle(words)
            examples.append(Example(" ".join(words), labels, "made", number))
        return tuple(examples)

    data = Splits(some(300, 1), some(60, 2), some(60, 3), tuple(sorted(WORDS)))
    curve = run(base, data, tmp_path, epochs=40, problem="multi_label")
    assert best_epoch(curve).validation_score > 0.8


def test_the_same_seed_gives_the_same_model_and_another_seed_another(base, splits, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(base, splits, tmp_path / name, epochs=1, seed=seed)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize(
    "knob",
    [
        {"label_smoothing": 0.0},
        {"weight_decay": 0.5},
        {"warmup": 0.9},
        {"batch_size": 8},
        {"accumulate": 2},
        {"optimizer": "sgd"},
        {"schedule": "cosine"},
        {"max_gradient_norm": 0.01},
        {"dropout": 0.5},
        {"layer_decay": 0.5},
        {"class_weights": "balanced"},
    ],
    ids=lambda knob: next(iter(knob)),
)
def test_every_knob_changes_the_result(base, uneven, tmp_path, knob):
    run(base, uneven, tmp_path / "default", epochs=1)
    run(base, uneven, tmp_path / "changed", epochs=1, **knob)
    assert not same(weights(tmp_path / "default"), weights(tmp_path / "changed"))


def test_early_stopping_ends_a_run_that_no_longer_improves(base, splits, tmp_path):
    # So small a rate leaves every validation score as it was.
    idle = {"learning_rate": 1e-12, "epochs": 6}
    assert len(run(base, splits, tmp_path / "all", **idle)) == 6
    stopped = run(base, splits, tmp_path / "stopped", patience=2, **idle)
    assert len(stopped) == best_epoch(stopped).number + 2 < 6


def test_early_stopping_waits_while_it_improves(base, splits, tmp_path):
    curve = run(base, splits, tmp_path, patience=15, epochs=8)
    assert len(curve) == 8


@pytest.mark.parametrize(
    ("policy", "frozen"),
    [
        ("none", set()),
        ("embeddings", {"embeddings"}),
        (1, {"embeddings", "layer.0"}),
        ("head_only", {"embeddings", "layer.0", "layer.1"}),
    ],
)
def test_frozen_parts_stay_as_in_the_base_and_all_else_moves(base, splits, tmp_path, policy, frozen):
    before = load_base(base, splits.labels, 16, "single_label", Training()).state_dict()
    run(base, splits, tmp_path, epochs=1, freeze=policy)
    after = weights(tmp_path)
    for part in ("embeddings", "layer.0", "layer.1", "pooler", "classifier"):
        # Unused rows of the tables get no gradient, and a key's bias has none; some weight of each part must move.
        names = [name for name in before if f"{part}." in name and "position_ids" not in name]
        moved = any(not torch.equal(before[name], after[name]) for name in names)
        assert moved == (part not in frozen), part


def test_freezing_more_layers_than_there_are_is_an_error(base, splits, tmp_path):
    with pytest.raises(UsageError, match="3 layers, but the base has 2"):
        run(base, splits, tmp_path, freeze=3)


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(base, splits, tmp_path):
    whole = run(base, splits, tmp_path / "whole", epochs=4)
    steps = 0

    def kill_in_the_third_epoch(model) -> None:
        nonlocal steps
        steps += 1
        if steps > 20:
            raise KilledError

    with pytest.raises(KilledError):
        run(base, splits, tmp_path / "killed", epochs=4, after_step=kill_in_the_third_epoch)
    assert (tmp_path / "killed" / STATE).is_file()
    calls = 0

    def count(model) -> None:
        nonlocal calls
        calls += 1

    resumed = run(base, splits, tmp_path / "killed", epochs=4, after_step=count)
    assert calls == 2 * 8  # two epochs of eight steps were left
    assert resumed == whole
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_accumulated_batches_step_as_one_large_batch(base, splits, tmp_path):
    # All 240 texts in one step: without dropout the order of the batches does not matter.
    settings = {"epochs": 2, "dropout": 0.0, "learning_rate": 1e-3, "optimizer": "sgd"}
    run(base, splits, tmp_path / "large", batch_size=240, **settings)
    run(base, splits, tmp_path / "small", batch_size=60, accumulate=4, **settings)
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    for name in large:
        torch.testing.assert_close(large[name], small[name], atol=2e-4, rtol=0)


def test_a_teacher_is_followed(base, splits, tmp_path):
    # It says the opposite of the labels; with all weight on it, so does the student.
    made = course(base, splits)
    wrong = torch.roll(made.train.targets, 1, dims=1)
    teacher = Teacher(10 * wrong, weight=1.0, temperature=1.0)
    curve = run(base, splits, tmp_path, epochs=15, teacher=teacher)
    assert curve[-1].validation_score < 0.1
    assert curve[-1].loss < curve[0].loss / 2


def test_weights_are_held_after_every_step(base, splits, tmp_path):
    def zero(model) -> None:
        model.classifier.bias.data[1] = 0

    run(base, splits, tmp_path, epochs=1, after_step=zero)
    bias = weights(tmp_path)["classifier.bias"]
    assert bias[1] == 0
    assert bias[0] != 0


def test_batches_hold_every_example_once_and_little_padding():
    generator = random.Random(0)
    ids = [[1] * generator.randint(2, 60) for _ in range(1000)]
    batches = shuffled_batches(ids, 16, random.Random(0))
    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    longest = [max(len(ids[index]) for index in batch) for batch in batches]
    assert sum(most * len(batch) for most, batch in zip(longest, batches, strict=True)) < 1.1 * sum(map(len, ids))
    # The order of lengths is not the order of training.
    assert longest != sorted(longest)


def test_biases_and_norms_do_not_decay_and_the_rate_rises_and_falls(base, splits):
    training = Training(weight_decay=0.1, warmup=0.2, learning_rate=1.0)
    model = load_base(base, splits.labels, 16, "single_label", training)
    optimizer = make_optimizer(model, training)
    assert {p.ndim for group in optimizer.param_groups if group["weight_decay"] == 0.0 for p in group["params"]} == {1}
    assert {p.ndim for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]} == {2}
    rates = schedule_rates(optimizer, training)
    assert rates.index(max(rates)) == 19
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(1 / 80)


def test_the_cosine_falls_slowly_first_and_last(base, splits):
    training = Training(warmup=0.0, learning_rate=1.0, schedule="cosine")
    model = load_base(base, splits.labels, 16, "single_label", training)
    rates = schedule_rates(make_optimizer(model, training), training)
    assert [rates[10], rates[50], rates[90]] == pytest.approx([0.975, 0.5, 0.025], abs=0.01)


def schedule_rates(optimizer, training) -> list[float]:
    schedule = make_schedule(optimizer, training, steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_lower_layers_get_smaller_steps(base, splits):
    training = Training(layer_decay=0.5, learning_rate=1.0)
    model = load_base(base, splits.labels, 16, "single_label", training)
    rate = {id(p): group["lr"] for group in make_optimizer(model, training).param_groups for p in group["params"]}
    parts = [
        model.classifier.weight,
        model.bert.pooler.dense.weight,
        model.bert.encoder.layer[1].output.dense.weight,
        model.bert.encoder.layer[0].output.dense.weight,
        model.bert.embeddings.word_embeddings.weight,
    ]
    assert [rate[id(part)] for part in parts] == [1.0, 1.0, 0.5, 0.25, 0.125]


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
        load_base(base, splits.labels, 64, "single_label", Training())

"""A pruned model is the model with gates of zero, only smaller; what matters least goes first."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from millibert import UsageError
from millibert_build.checkpoint import load_model
from millibert_build.export import export_packed
from millibert_build.prune import (
    STRUCTURE,
    block_size,
    gate_gradients,
    least_important_heads,
    least_important_neurons,
    prune,
    remove,
)
from millibert_build.scenario import Pruning

VOCABULARY = 200
HEADS = 4
HEAD_SIZE = 8
NEURONS = 128
LAYERS = 3
LABELS = 5


@pytest.fixture
def model():
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HEADS * HEAD_SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": NEURONS,
        "max_position_embeddings": 32,
        "num_labels": LABELS,
        "initializer_range": 0.3,
    }
    return BertForSequenceClassification(BertConfig(**settings)).eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    found = []
    for texts, length in ((6, 9), (4, 17)):
        ids = torch.randint(1, VOCABULARY, (texts, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        targets = F.one_hot(torch.randint(LABELS, (texts,), generator=generator), LABELS).float()
        found.append((ids, mask, targets))
    return found


def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets.argmax(1))


def logits_of(model, batches):
    with torch.inference_mode():
        return torch.cat([model(input_ids=ids, attention_mask=mask).logits for ids, mask, _ in batches])


def layers_of(model):
    return model.bert.encoder.layer


def silence(model, heads=(), neurons=()):
    """Make heads (layer, number) and neurons (layer, number) do nothing, in the full-sized model."""
    with torch.no_grad():
        for layer, head in heads:
            size = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
            layers_of(model)[layer].attention.output.dense.weight[:, size] = 0
        for layer, neuron in neurons:
            layers_of(model)[layer].output.dense.weight[:, neuron] = 0
    return model


GONE_HEADS = [[0, 2], [], [1, 2, 3]]
GONE_NEURONS = [[], list(range(0, 128, 2)), list(range(5, 109))]


def pairs(lists):
    return [(layer, number) for layer, numbers in enumerate(lists) for number in numbers]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pruned_model_is_the_model_with_those_parts_silent(model, batches, attention):
    model.set_attn_implementation(attention)
    silent = silence(copy.deepcopy(model), pairs(GONE_HEADS), pairs(GONE_NEURONS))
    before = logits_of(model, batches)
    remove(model, GONE_HEADS, GONE_NEURONS)
    found = logits_of(model, batches)
    torch.testing.assert_close(found, logits_of(silent, batches), atol=1e-5, rtol=0)
    assert (found - before).abs().max() > 0.1
    assert getattr(model.config, STRUCTURE) == {"heads": [2, 4, 1], "neurons": [128, 64, 24]}


def test_dropping_layers_is_skipping_them(model, batches):
    kept = copy.deepcopy(model)
    report = prune(model, batches, Pruning(layers=1), cross_entropy)
    (dropped,) = report.layers
    assert (report.heads, report.neurons) == (((), ()), (0, 0))
    expected = {}
    for number in range(LAYERS):
        shorter = copy.deepcopy(kept)
        del shorter.bert.encoder.layer[number]
        logits = logits_of(shorter, batches)
        expected[number] = float(cross_entropy(logits, torch.cat([targets for _, _, targets in batches])))
        if number == dropped:
            torch.testing.assert_close(logits_of(model, batches), logits, atol=1e-6, rtol=0)
    assert dropped == min(expected, key=expected.__getitem__)
    assert model.config.num_hidden_layers == LAYERS - 1


def test_one_layer_must_stay(model, batches):
    assert prune(copy.deepcopy(model), batches, Pruning(layers=2), cross_entropy).parameters_after > 0
    with pytest.raises(UsageError, match="cannot drop 3 of 3"):
        prune(model, batches, Pruning(layers=3), cross_entropy)


def test_dead_heads_and_neurons_go_first(model, batches):
    heads = [(0, 1), (2, 3), (2, 0)]
    neurons = [(0, number) for number in range(3, 11)] + [(1, number) for number in range(100, 108)]
    silence(model, heads, neurons)
    before = logits_of(model, batches)
    share = Pruning(heads=len(heads) / (LAYERS * HEADS), neurons=len(neurons) / (LAYERS * NEURONS))
    report = prune(model, batches, share, cross_entropy)
    assert report.heads == ((1,), (), (0, 3))
    assert report.neurons == (8, 8, 0)
    torch.testing.assert_close(logits_of(model, batches), before, atol=1e-5, rtol=0)


def test_the_report_counts_parameters(model, batches):
    width = HEADS * HEAD_SIZE
    report = prune(model, batches, Pruning(heads=0.25, neurons=0.25), cross_entropy)
    heads, neurons = sum(map(len, report.heads)), sum(report.neurons)
    assert (heads, neurons) == (3, LAYERS * NEURONS // 4)
    lost = heads * HEAD_SIZE * (4 * width + 3) + neurons * (2 * width + 1)
    assert report.parameters_before - report.parameters_after == lost
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())


def test_every_layer_keeps_a_head_and_a_block(model, batches):
    prune(model, batches, Pruning(heads=0.99, neurons=0.99), cross_entropy)
    assert getattr(model.config, STRUCTURE) == {"heads": [1] * LAYERS, "neurons": [8] * LAYERS}
    assert torch.isfinite(logits_of(model, batches)).all()


def test_what_is_left_is_a_multiple_of_the_block():
    importance = [torch.rand(1500), torch.rand(1536) * 9]
    for share in (0.1, 0.33, 0.7, 0.9):
        gone = least_important_neurons(importance, share)
        kept = [len(values) - len(numbers) for values, numbers in zip(importance, gone, strict=True)]
        assert all(count >= 64 for count in kept)
        assert all(count % 64 == 0 or not numbers for count, numbers in zip(kept, gone, strict=True))
        assert abs(sum(map(len, gone)) - share * 3036) <= 64


def test_blocks_suit_the_width_of_the_layer():
    assert [block_size(neurons) for neurons in (3072, 1536, 512, 128, 64, 3)] == [64, 64, 32, 8, 4, 3]


def test_heads_are_compared_within_their_layer():
    # The second layer's gradients are 100 times larger; its least important head still goes before the others.
    gone = least_important_heads([torch.tensor([3.0, 4.0, 5.0]), torch.tensor([100.0, 400.0, 500.0])], 1 / 6)
    assert gone == [[], [0]]


def test_gradients_are_those_of_each_text_by_itself(model, batches):
    together = gate_gradients(model, batches, cross_entropy)
    apart = [
        (ids[row : row + 1], mask[row : row + 1], targets[row : row + 1])
        for ids, mask, targets in batches
        for row in range(len(ids))
    ]
    alone = gate_gradients(model, apart, cross_entropy)
    for first, second in zip([*together.heads, *together.neurons], [*alone.heads, *alone.neurons], strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-3)


def test_measuring_changes_nothing(model, batches):
    before = logits_of(model, batches)
    model.train()
    gate_gradients(model, batches, cross_entropy)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(logits_of(model.eval(), batches), before)


def test_nothing_asked_for_nothing_removed(model, batches):
    before = logits_of(model, batches)
    report = prune(model, batches, Pruning(), cross_entropy)
    assert report.parameters_before == report.parameters_after
    assert not hasattr(model.config, STRUCTURE)
    assert torch.equal(logits_of(model, batches), before)


# ---- on disk and exported ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", [Pruning(), Pruning(layers=1), Pruning(layers=1, heads=0.4, neurons=0.5)])
def test_a_pruned_model_comes_back_from_disk_to_the_bit(model, batches, tmp_path, pruning):
    prune(model, batches, pruning, cross_entropy)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_model(tmp_path), batches), logits_of(model, batches))


def test_a_pruned_model_can_be_pruned_again(model, batches, tmp_path):
    prune(model, batches, Pruning(heads=0.25, neurons=0.25), cross_entropy)
    prune(model, batches, Pruning(layers=1, heads=0.25, neurons=0.25), cross_entropy)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_model(tmp_path), batches), logits_of(model, batches))


def test_a_pruned_model_still_trains(model, batches):
    prune(model, batches, Pruning(heads=0.4, neurons=0.5), cross_entropy)
    ids, mask, targets = batches[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = cross_entropy(model(input_ids=ids, attention_mask=mask).logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_the_packed_export_of_a_pruned_model_agrees(model, batches, tmp_path):
    prune(model, batches, Pruning(layers=1, heads=0.4, neurons=0.5), cross_entropy)
    heads = getattr(model.config, STRUCTURE)["heads"]
    assert max(heads) < HEADS or len(set(heads)) > 1
    export_packed(model, 32, tmp_path / "packed.onnx")
    rows = [np.arange(1, length + 1, dtype=np.int32) for length in (3, 17, 32)]
    inputs = {
        "input_ids": np.concatenate(rows),
        "lengths": np.array([3, 17, 32], np.int32),
        "max_length": np.zeros(32, np.float32),
        "span": np.zeros(1, np.int32),
    }
    found = onnxruntime.InferenceSession(tmp_path / "packed.onnx").run(None, inputs)[0]
    with torch.inference_mode():
        expected = np.concatenate([model(input_ids=torch.tensor(row)[None].long()).logits.numpy() for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)

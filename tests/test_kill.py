"""A build that is killed, at whatever stage, harms nothing and goes on when it is started again."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from millibert_build.publish import replacing

WORDS = {"ask": ["what", "why"], "greet": ["hello", "hi"], "part": ["bye", "later"]}
STAGES = ("data", "train", "prune", "export", "engine", "evaluate", "publish")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A build, with pruning, of a model that is trained in a moment."""
    words = [word for several in WORDS.values() for word in several]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "base")
    shape: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=8, max_position_embeddings=16, **shape)).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    for split, texts in (("train", 120), ("test", 30)):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for number in range(texts):
                label = sorted(WORDS)[number % 3]
                rows.writerow([f"{WORDS[label][number % 2]} {split}{number}", label])
    settings = ["training.learning_rate=5e-3", "pruning.neurons=0.5", "pruning.recovery_epochs=1", "max_tokens=8"]
    settings += ["gates.max_pruning_loss=1", "gates.min_pruning_agreement=0"]
    options = [part for setting in settings for part in ("--set", setting)]
    data = [f"--train={tmp_path}/train.csv", f"--test={tmp_path}/test.csv", f"--base={tmp_path}/base", "--epochs=2"]
    places = [f"--out={tmp_path}/out", f"--work={tmp_path}/work", "--name=small", "--precision=fp32"]
    return [sys.executable, "-m", "millibert.cli", "build", *data, *places, *options]


def killed_at(command: list[str], stage: int) -> list[str]:
    """Kill the build when the stage before that one has been announced as done; returns the stages that were."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        done: list[str] = []
        while stage > len(done):
            line = process.stderr.readline()
            assert line, f"ended with {process.wait()} after {done}"
            done += re.findall(r"^\[\d/7\] (\w+)", line)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    return done


def test_a_build_killed_at_any_stage_finishes_when_it_is_started_again(command, tmp_path):
    out = tmp_path / "out"
    with replacing(out) as staging:
        (staging / "release.json").write_text("the release before")
    for stage, name in enumerate(STAGES[:-1]):
        assert killed_at(command, stage) == list(STAGES[:stage]), name
        assert contents(out) == {"release.json": b"the release before"}, name
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("unchanged: ") == 2  # what was trained before the kills stays
    manifest = json.loads((out / "release.json").read_text())
    files = contents(out)
    del files["release.json"]
    assert manifest["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert not [path.name for path in tmp_path.rglob("*") if path.name.endswith((".new", ".unfinished"))]


def test_what_a_kill_while_publishing_leaves_is_swept_by_the_next_build_and_only_that(tmp_path):
    script = (
        "import os, pathlib, signal, sys\n"
        "from millibert_build.publish import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as staging:\n"
        "    (staging / 'release.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    out = tmp_path / "out"
    dead = subprocess.run([sys.executable, "-c", script, str(out)], check=False)
    assert dead.returncode == -signal.SIGKILL
    assert sorted(left.suffix for left in tmp_path.iterdir()) == [".lock", ".new"]
    with replacing(out) as mine:
        assert sorted(tmp_path.iterdir()) == [mine.with_suffix(".lock"), mine]  # swept
        with replacing(out) as other:
            assert mine.is_dir()  # alive
            (other / "release.json").write_text("other")
        (mine / "release.json").write_text("mine")
    assert contents(tmp_path) == {"out/release.json": b"mine"}

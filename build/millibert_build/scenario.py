"""What to build: one TOML file, checked as a whole, every default in one place.

Paths in a scenario are relative to its file. Unknown keys are errors.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from millibert._errors import UsageError
from millibert_ensemble.contract import COMPOSING_MODELS

Engine = Literal["openvino", "onnxruntime"]
Precision = Literal["auto", "fp32", "bf16", "int8", "int8_dynamic"]
Problem = Literal["single_label", "multi_label"]
Share = Annotated[float, Field(ge=0, le=1)]
PartShare = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Sources = str | tuple[str, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Section = TypeVar("Section", bound=_Strict)


class Data(_Strict):
    """Where the labelled text is: files (.csv, .tsv, .json, .jsonl, .parquet), folders of them, or `hub:owner/name`.

    A source may be a list of these, and a file name may hold the wildcards `*`, `?` and `[0-9]`.
    """

    train: Sources
    test: Sources
    validation: Sources | None = None
    """None: a stratified `validation_share` of the training texts is held out."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    seed: int = 42
    """Of what is held out. Scenarios that differ in `training.seed` only are validated on the same texts."""
    out_of_scope: Sources | None = None
    """Texts that none of the labels fits: measures how well the abstention threshold keeps them out."""
    copies: Literal["refuse", "drop"] = "refuse"
    """A training text that is in the validation or test data too: an error, or left out of training."""
    text_column: str = "text"
    label_column: str = "label"
    label_separator: Annotated[str, Field(min_length=1)] = "|"
    """Multi-label data in which one field holds all labels of a text; lists (JSON, Parquet) need none."""


class Training(_Strict):
    """Fine-tuning; see `millibert_build.train`."""

    epochs: Annotated[int, Field(ge=1)] = 12
    batch_size: Annotated[int, Field(ge=1)] = 32
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients are added up for one step of the optimizer."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive | None = None
    """None: 2e-5 for a width of 768 (BERT-base), larger for narrower models; see `optimisation.learning_rate`."""
    momentum: PartShare = 0.9
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: Share = 0.1
    """Share of all steps in which the learning rate rises to its peak; it then falls to 0 along the schedule."""
    max_gradient_norm: Positive = 1.0
    dropout: PartShare | None = None
    """None: what the base checkpoint says (0.1 for BERT)."""
    label_smoothing: PartShare | None = None
    """None: 0.1 single-label, 0 multi-label."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: each label weighs as much as if all were equally frequent (multi-label: positives, up to 10-fold)."""
    freeze: Literal["none", "embeddings", "head_only"] | Annotated[int, Field(ge=1)] = "none"
    """What stays as in the base checkpoint; a number: the embeddings and the first N encoder layers."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate of each layer below the head, as a factor of the one above it."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many epochs without a better validation score; None: run all epochs."""
    seed: int = 42


class Distillation(_Strict):
    """Learn from a teacher's probabilities too (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015).

    The loss is (1 - weight) of the usual one plus weight * temperature^2 * KL(teacher || student).
    """

    teacher: Sources
    """A checkpoint fine-tuned on the same labels: the `checkpoint` folder in the --work folder of its build.

    Of several the logits are averaged: an ensemble, in one small model.
    """
    weight: Share = 0.5
    temperature: Positive = 2.0

    @property
    def teachers(self) -> list[Path]:
        """Their folders."""
        return [Path(folder) for folder in _each(self.teacher)]


class Pruning(_Strict):
    """Make the fine-tuned model smaller, then let it recover; see `millibert_build.prune` and `sparsify`."""

    heads: PartShare = 0.0
    """Share of all attention heads to remove, the least important first."""
    neurons: PartShare = 0.0
    """Share of all feed-forward neurons to remove, the least important first."""
    layers: Annotated[int, Field(ge=0)] = 0
    """Encoder layers to drop."""
    sparsity: Literal["none", "2:4"] = "none"
    """2:4: two of every four neighbouring weights are zero, for the sparse tensor cores of NVIDIA GPUs."""
    recovery_epochs: Annotated[int, Field(ge=1)] = 4
    recovery_learning_rate: Positive | None = None
    """None: half of the rate of fine-tuning."""

    @property
    def active(self) -> bool:
        """Whether anything is removed at all."""
        return bool(self.heads or self.neurons or self.layers or self.sparsity != "none")

    def __str__(self) -> str:
        parts = [
            f"-{self.heads:.0%} heads" if self.heads else "",
            f"-{self.neurons:.0%} neurons" if self.neurons else "",
            f"-{self.layers} layer{'s' if self.layers > 1 else ''}" if self.layers else "",
            self.sparsity if self.sparsity != "none" else "",
        ]
        return " ".join(filter(None, parts)) or "nothing removed"


class Quantization(_Strict):
    """Static int8; see `millibert_build.quantize`."""

    calibration_texts: Annotated[int, Field(ge=1)] = 512
    """Training texts whose activations set the scales."""
    max_excluded: Annotated[int, Field(ge=0)] = 4
    """Matrix products that may stay in floating point when int8 misses its gates, the most harmful first."""


class Abstention(_Strict):
    """When to answer "don't know"."""

    in_scope_recall: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Share of validation texts that must stay above the threshold on the best label's score."""


class Serving(_Strict):
    """How Triton queues and merges requests; in the configs of the three inner models."""

    max_queue_delay_microseconds: Annotated[int, Field(ge=0)] = 0
    """How long a request may wait for others to share its execution; 0: only while the model is busy anyway."""
    queue_timeout_microseconds: Annotated[int, Field(ge=1)] = 1_000_000
    """A request that would wait, or before the CPU engine has waited, for longer than this is answered "busy". A
    request may ask for less, by its parameter `queue_timeout_ms`."""
    cache_texts: Annotated[int, Field(ge=0)] = 0
    """Keep the engine's answers to so many texts, those used last; for traffic that repeats itself. 0: none."""
    tokenizers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that tokenize for a TensorRT plan; half as many postprocess. One does about 25,000 texts a second in
    large requests (docs/performance.md). The CPU engine has one: it needs the CPUs itself."""
    cpu_fallback: bool = True
    """Whether the CPU engine may serve on a machine that was meant to serve a TensorRT plan, and that none fits."""


class Gates(_Strict):
    """What a build must reach, or the previous repository stays. Accuracy is micro-F1 when multi-label."""

    min_accuracy: Share = 0.0
    """Test accuracy of the engine that would be served."""
    max_accuracy_loss: Share = 0.005
    """Accuracy that an engine may lose against the fp32 checkpoint it was made from."""
    min_agreement: Share = 0.99
    """Share of texts to which an engine and its fp32 checkpoint give the same label (multi-label: set of labels)."""
    min_agreement_int8: Share = 0.985
    """The same for int8."""
    max_pruning_loss: Share = 0.007
    """Accuracy that pruning may lose against the fine-tuned checkpoint, recovery included."""
    min_pruning_agreement: Share = 0.9
    """Share of texts to which the pruned and the fine-tuned checkpoint give the same label."""
    max_forgetting: Share = 0.005
    """Accuracy on the old test set that continuing from a release may lose against it."""


class Scenario(_Strict):
    """One classifier to build. `name` is the model name that clients call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    problem: Problem = "single_label"
    """single_label: exactly one label fits a text (softmax). multi_label: any number of them (sigmoid)."""
    base: str = "minilm"
    """A checkpoint folder, a hub id (`owner/name` or `owner/name@revision`), or the alias `minilm`."""
    labels: tuple[str, ...] | None = None
    """The allowed labels in order; None: those of the training data, sorted."""
    max_tokens: Annotated[int, Field(ge=8, le=8192)] = 128
    """Longer texts are truncated, and their answers say so."""
    max_texts: Annotated[int, Field(ge=1, le=1024)] = 64
    """Texts of one request, and of one merged batch, at most."""
    top_k: Annotated[int, Field(ge=1)] = 3
    data: Data
    training: Training = Training()
    distillation: Distillation | None = None
    pruning: Pruning = Pruning()
    quantization: Quantization = Quantization()
    abstention: Abstention = Abstention()
    serving: Serving = Serving()
    gates: Gates = Gates()

    @field_validator("name")
    @classmethod
    def _not_a_composing_model(cls, name: str) -> str:
        if name in COMPOSING_MODELS:
            raise ValueError(f"{name!r} is the name of one of the service's own models")
        return name

    @field_validator("labels")
    @classmethod
    def _distinct_labels(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels) or "" in labels):
            raise ValueError("at least two labels, distinct and not empty")
        return labels


def load_scenario(path: Path) -> Scenario:
    """Read a scenario from TOML; raises `UsageError` that names the file and each wrong key."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the scenario {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    return _resolve_paths(make_scenario(document, str(path)), path.parent)


def make_scenario(document: Mapping[str, object], origin: str) -> Scenario:
    """Check a scenario given as nested dictionaries; `origin` names it in errors."""
    return checked(Scenario, document, origin)


def checked(kind: type[Section], document: Mapping[str, object], origin: str) -> Section:
    """The same for any section of one."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UsageError(f"{origin}: {problems}") from error


def _resolve_paths(scenario: Scenario, folder: Path) -> Scenario:
    def one(source: str) -> str:
        return source if source.startswith("hub:") else str(folder / source)

    def resolved(sources: Sources | None) -> Sources | None:
        return tuple(map(one, sources)) if isinstance(sources, tuple) else sources and one(sources)

    data, distillation = scenario.data, scenario.distillation
    update = {name: resolved(getattr(data, name)) for name in ("train", "validation", "test", "out_of_scope")}
    if distillation is not None:
        distillation = distillation.model_copy(
            update={"teacher": tuple(str(folder / each) for each in _each(distillation.teacher))}
        )
    base = str(folder / scenario.base) if scenario.base.startswith(("./", "../")) else scenario.base
    return scenario.model_copy(
        update={"data": data.model_copy(update=update), "base": base, "distillation": distillation}
    )


def _each(sources: Sources) -> tuple[str, ...]:
    return sources if isinstance(sources, tuple) else (sources,)

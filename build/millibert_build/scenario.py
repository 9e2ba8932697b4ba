"""What to build: one TOML file, checked as a whole, every default in one place.

Paths in a scenario are relative to its file. Unknown keys are errors.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from millibert._errors import UsageError
from millibert_ensemble.contract import COMPOSING_MODELS

Engine = Literal["openvino", "onnxruntime"]
Precision = Literal["auto", "fp32", "bf16"]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Strict):
    """Where the labelled text is: files (.csv, .tsv, .jsonl, .parquet), folders of them, or `hub:owner/name`."""

    train: str
    test: str
    validation: str | None = None
    """None: a stratified `validation_share` of the training texts is held out."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    text_column: str = "text"
    label_column: str = "label"


class Training(_Strict):
    """Fine-tuning; see `millibert_build.train`."""

    epochs: Annotated[int, Field(ge=1)] = 12
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """None: 2e-5 for a width of 768 (BERT-base), larger for narrower models; see `train.learning_rate`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    label_smoothing: Share = 0.1
    warmup: Share = 0.1
    """Share of all steps in which the learning rate rises to its peak; it then falls linearly to 0."""
    seed: int = 42


class Gates(_Strict):
    """What a build must reach, or the previous repository stays."""

    min_accuracy: Share = 0.0
    """Test accuracy of the engine that would be served."""
    max_accuracy_loss: Share = 0.005
    """Test accuracy the engine may lose against the fp32 checkpoint."""
    min_agreement: Share = 0.99
    """Share of test texts on which engine and fp32 checkpoint name the same best label."""


class Scenario(_Strict):
    """One classifier to build. `name` is the model name that clients call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    problem: Literal["single_label"] = "single_label"
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


def make_scenario(document: dict[str, object], origin: str) -> Scenario:
    """Check a scenario given as nested dictionaries; `origin` names it in errors."""
    try:
        return Scenario.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UsageError(f"{origin}: {problems}") from error


def _resolve_paths(scenario: Scenario, folder: Path) -> Scenario:
    def resolved(source: str | None) -> str | None:
        return source if source is None or source.startswith("hub:") else str(folder / source)

    data = scenario.data
    update = {name: resolved(getattr(data, name)) for name in ("train", "validation", "test")}
    base = str(folder / scenario.base) if scenario.base.startswith(("./", "../")) else scenario.base
    return scenario.model_copy(update={"data": data.model_copy(update=update), "base": base})

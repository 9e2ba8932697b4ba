"""What a peer is: how its server is started, what it is sent, and what its answers mean.

Each peer is set up as well as we honestly can on CPUs, and `configuration` says how in a report. All of them compute in
fp32. What the two services of our own do is in `servers/`, and why.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millibert._errors import MillibertError

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer(ABC):
    """A server of text classifiers over HTTP."""

    name: str
    configuration: str
    path: str = "/classify"
    health: str | None = None  # answers 200 once all of its workers are ready
    environment: Mapping[str, str] = field(default_factory=dict)  # variables of its server

    @property
    def requirements(self) -> Path:
        """Every package of its environment, with its version."""
        return _HERE / "requirements" / f"{self.name}.txt"

    @abstractmethod
    def command(self, python: Path, checkpoint: Path, port: int, threads: int) -> list[str]:
        """The command line that serves a checkpoint folder on a port of 127.0.0.1."""

    @abstractmethod
    def body(self, texts: Sequence[str]) -> bytes:
        """A request for the labels of texts, as JSON."""

    def labels(self, answer: bytes) -> list[str]:
        """The best label of each text, in the order of the request; raises MillibertError where that is not in it."""
        try:
            return self._labels(json.loads(answer))
        except (ValueError, TypeError, KeyError) as error:
            beginning = answer[:200].decode(errors="replace")
            raise MillibertError(
                f"{self.name} gave an answer without labels ({type(error).__name__}: {error}): {beginning}"
            ) from error

    @abstractmethod
    def _labels(self, answer: Any) -> list[str]:
        """From the decoded answer; may raise ValueError, TypeError and KeyError."""


class Infinity(Peer):
    """Infinity, as it is shipped. Its answers hold the scores of all labels."""

    def command(self, python: Path, checkpoint: Path, port: int, threads: int) -> list[str]:
        """Its own command; `threads` reaches PyTorch by OMP_NUM_THREADS."""
        program = [str(python), str(python.with_name("infinity_emb")), "v2"]
        return [
            *program,
            "--model-id",
            str(checkpoint),
            "--engine",
            "torch",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]

    def body(self, texts: Sequence[str]) -> bytes:
        """Without the model's name, since it serves one."""
        return json.dumps({"input": list(texts)}).encode()

    def _labels(self, answer: Any) -> list[str]:
        return [_text(max(scores, key=lambda one: one["score"])["label"]) for scores in answer["data"]]


@dataclass(frozen=True)
class Service(Peer):
    """A service of our own making, as one would write it by hand."""

    script: str = field(kw_only=True)

    def command(self, python: Path, checkpoint: Path, port: int, threads: int) -> list[str]:
        """The script, in the peer's environment."""
        options = {"--checkpoint": checkpoint, "--port": port, "--threads": threads}
        return [
            str(python),
            str(_HERE / "servers" / self.script),
            *(str(it) for pair in options.items() for it in pair),
        ]

    def body(self, texts: Sequence[str]) -> bytes:
        """Texts only: it gives the best label of each."""
        return json.dumps({"texts": list(texts)}).encode()

    def _labels(self, answer: Any) -> list[str]:
        return [_text(label) for label in answer["labels"]]


def _text(label: Any) -> str:
    if not isinstance(label, str):
        raise TypeError(f"a label is {label!r}")
    return label


PEERS: tuple[Peer, ...] = (
    Infinity(
        "infinity",
        "Infinity 0.0.77 as shipped: torch engine with BetterTransformer, dynamic batches of up to 32 texts; answers "
        "with the scores of all labels",
    ),
    Service(
        "litserve",
        "LitServe 0.2.19 and ONNX Runtime 1.32.0: one worker of one thread for each CPU, dynamic batches of up to 64 "
        "requests (window 2 ms), run 8 texts at a time in order of length",
        health="/health",
        script="litserve_onnxruntime.py",
    ),
    Service(
        "fastapi",
        "FastAPI 0.165.0, transformers 5.24.0 and PyTorch 2.13.0: one model on all CPUs, what waits merged up to 64 "
        "texts, run 8 at a time in order of length",
        environment={"OMP_WAIT_POLICY": "PASSIVE"},  # else its threads take the CPU from the event loop
        script="fastapi_transformers.py",
    ),
)

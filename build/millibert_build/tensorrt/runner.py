"""A plan run in process, through Polygraphy, with the profile that Triton would take for each batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from millibert._errors import UsageError
from millibert_build.tensorrt.profiles import nearest, profiles_of
from millibert_build.tensorrt.run_graph import arranged, batches_of
from millibert_build.tensorrt.target import Target


class PlanRunner:
    """Load a plan onto the GPU for a `with` block; raises `UsageError` where Polygraphy is missing."""

    def __init__(self, plan: Path, target: Target) -> None:
        try:
            from polygraphy.backend.trt import TrtRunner, engine_from_bytes
        except ImportError as error:
            raise UsageError(f"Polygraphy is not installed ({error}); pip install 'millibert[engine]'") from error
        self._target = target
        self._profiles = profiles_of(target)
        self._profile: int | None = None
        self._runner: Any = TrtRunner(engine_from_bytes(plan.read_bytes()))

    def __enter__(self) -> PlanRunner:
        self._runner.activate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.deactivate()

    def infer(self, batch: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Logits [texts, labels] of texts as token ids."""
        inputs = dict(arranged(self._padded(batch), self._target.layout))
        if self._target.layout == "packed":
            # As the tokenizer makes it for single texts; Triton's choice of a profile depends on it.
            inputs["span"] = np.zeros(len(inputs["input_ids"]), np.int32)
        number = nearest(self._profiles, {name: values.shape for name, values in inputs.items()})
        if number != self._profile:
            self._runner.set_profile(number)
            self._profile = number
        logits: npt.NDArray[np.float32] = self._runner.infer(inputs)["logits"]
        return logits.copy()  # the runner uses its buffers again

    def run(self, ids: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Logits [texts, labels] of any number of texts, in order."""
        return np.concatenate([self.infer(batch) for batch in batches_of(ids, self._target.max_texts)])

    def seconds(self) -> float:
        """How long the last batch took on the GPU, as Polygraphy measures it: with copies, without Python."""
        return float(self._runner.last_inference_time())

    def _padded(self, batch: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """With buckets, the rows as the tokenizer would make them: the longest fills its bucket."""
        if self._target.layout == "packed":
            return batch
        longest = max(map(len, batch))
        bucket = next(bucket for bucket in self._target.buckets if bucket >= longest)
        return [[*row, *[0] * (bucket - len(row))] for row in batch]

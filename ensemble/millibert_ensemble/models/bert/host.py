"""The engine as a model of Triton holds it: warmed up and keeping count of its work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .engines import ENGINES, Floats
from .inference import LAYOUTS, infer
from .memory import Memory
from .texts import Ids, texts_of
from .threads import cpu_limit, share_of
from .warmup import warm_up_padded, warm_up_rows
from .work import DESCRIPTION, KINDS, METRIC, Ledger


class Host:
    """`model.onnx` in a folder, as Triton's config of the model says."""

    def __init__(self, folder: Path, config: dict[str, Any], pb_utils: Any) -> None:
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        max_tokens = int(parameters["max_tokens"])
        # Instances share what the CPU limit allows, unless the config says how many (`millibert tune-serving` tries).
        cpus = cpu_limit()
        given = int(parameters.get("threads", "0"))
        threads = given or share_of(cpus, config["instance_group"][0]["count"])
        layout = parameters["layout"]
        in_rows = layout == "rows"
        open_engine = ENGINES[parameters["engine"]]
        self._engine = open_engine(folder / "model.onnx", parameters["precision"], threads, in_rows, given or cpus)
        self._arrange = LAYOUTS[layout]
        if in_rows:
            warm_up_rows(self._engine, max_tokens)
        else:
            most = int(parameters.get("max_texts", config["max_batch_size"]))
            warm_up_padded(self._engine, most, max_tokens)
        self._family = pb_utils.MetricFamily(METRIC, DESCRIPTION, pb_utils.MetricFamily.COUNTER)
        counters = {kind: self._family.Metric(labels={"kind": kind}) for kind in KINDS}
        self._ledger = Ledger(lambda kind, tokens: counters[kind].increment(tokens))
        cached = int(parameters.get("cache_texts", "0"))
        self._memory = Memory(cached) if cached else None
        alone = f"{self._engine.threads_alone} for an execution alone"
        pb_utils.Logger.log_info(f"{parameters['engine']} {parameters['precision']}, {threads} threads, {alone}")

    def infer(self, requests: Sequence[Ids]) -> Floats:
        """Logits [texts, labels] of all texts of the requests, in their order."""
        if self._memory is None:
            return self._compute(requests)
        return self._memory.infer(texts_of(requests), lambda texts: self._compute([text[None] for text in texts]))

    def _compute(self, requests: Sequence[Ids]) -> Floats:
        parts = self._arrange(requests, self._engine.streams)
        logits = infer(self._engine, parts)
        self._ledger.add((part.inputs for part in parts), time.monotonic())
        return logits

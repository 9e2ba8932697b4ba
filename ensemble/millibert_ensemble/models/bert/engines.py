"""The CPU engines that can run the packed graph: OpenVINO and ONNX Runtime, imported when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[np.generic]]


class EngineError(RuntimeError):
    """This machine cannot run the engine as configured; says what to do."""


class Engine(Protocol):
    """Something that runs an ONNX graph with one output."""

    def infer(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Run the graph once; returns a copy of its output."""
        ...


class OpenVino:
    """One compiled model, one stream, all threads; bf16 where the CPU has it."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import openvino

        core = openvino.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError(
                "this release was built for bf16 and this CPU has no bf16 instructions (AVX-512 BF16 or AMX); "
                "build it with --precision fp32 or auto for this kind of machine"
            )
        options = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._request: Any = core.compile_model(str(path), "CPU", options).create_infer_request()

    def infer(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Run the graph once; returns a copy of its output."""
        return self._request.infer(inputs, share_inputs=True)[0].copy()  # type: ignore[no-any-return]


class OnnxRuntime:
    """One session on the CPU, fp32."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import onnxruntime

        if precision != "fp32":
            raise EngineError(f"ONNX Runtime computes fp32 on a CPU, not {precision}; use the engine openvino")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def infer(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Run the graph once; returns its output."""
        return self._session.run(None, dict(inputs))[0]  # type: ignore[no-any-return]


ENGINES: dict[str, Callable[[Path, str, int], Engine]] = {"openvino": OpenVino, "onnxruntime": OnnxRuntime}

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


# What each engine computes in. int8 and int8_dynamic say that the graph is one: `model.onnx` is then quantised.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "openvino": ("int8", "bf16", "fp32"),
    "onnxruntime": ("int8", "int8_dynamic", "fp32"),
}


def check_precision(kind: str, precision: str) -> None:
    """Raise `EngineError` for a precision that this engine has on no CPU."""
    if precision not in PRECISIONS[kind]:
        others = [other for other, precisions in PRECISIONS.items() if precision in precisions]
        advice = f"; use the engine {' or '.join(others)}" if others else ""
        raise EngineError(f"{kind} computes {', '.join(PRECISIONS[kind])} on a CPU, not {precision}{advice}")


class Engine(Protocol):
    """Something that runs an ONNX graph with one output."""

    def infer(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Run the graph once; returns a copy of its output."""
        ...


class OpenVino:
    """One compiled model, one stream, all threads: fp32, bf16 where the CPU has it, or a Q/DQ graph in int8."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import openvino

        core = openvino.Core()
        check_precision("openvino", precision)
        # What is not quantised in an int8 graph is bf16 where the CPU has it: as exact, and faster.
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and not has_bf16:
            raise EngineError(
                "this release was built for bf16 and this CPU has no bf16 instructions (AVX-512 BF16 or AMX); "
                "build it with --precision fp32, int8 or auto for this kind of machine"
            )
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if has_bf16 and precision != "fp32" else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._request: Any = core.compile_model(str(path), "CPU", options).create_infer_request()

    def infer(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Run the graph once; returns a copy of its output."""
        return self._request.infer(inputs, share_inputs=True)[0].copy()  # type: ignore[no-any-return]


class OnnxRuntime:
    """One session on the CPU: fp32, a Q/DQ graph in int8, or a dynamically quantised graph."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import onnxruntime

        check_precision("onnxruntime", precision)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Fused with their bias, the products of a Q/DQ graph would not be found by the fusion that makes them int8,
        # and run in fp32, slower than the fp32 graph.
        disabled = ["MatMulAddFusion"] if precision == "int8" else []
        self._session: Any = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )

    def infer(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Run the graph once; returns its output."""
        return self._session.run(None, dict(inputs))[0]  # type: ignore[no-any-return]


ENGINES: dict[str, Callable[[Path, str, int], Engine]] = {"openvino": OpenVino, "onnxruntime": OnnxRuntime}

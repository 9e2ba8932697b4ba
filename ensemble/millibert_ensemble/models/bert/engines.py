"""The CPU engines that can run the graphs: OpenVINO and ONNX Runtime, imported when asked for.

Each thread runs executions of its own: threads that share one meet after every operator, and where other processes
need the CPU too they wait for each other most of the time. Where inputs have one of a few shapes, OpenVINO runs forms
of the graph that are compiled for just these. Figures are in docs/log.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .threads import fastest

Arrays = Mapping[str, npt.NDArray[np.generic]]
Floats = npt.NDArray[np.float32]
Shapes = tuple[tuple[int, ...], ...]

# Compiled for its shape an execution takes a millisecond less, and in int8 a fifth of the rest; but each such form
# holds the weights again. So there are forms only for graphs of up to so many bytes, and in other precisions than int8
# only for executions of up to so many tokens, which take a few milliseconds.
_SMALL_GRAPH = 128 * 2**20
_SHORT_EXECUTION = 64


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

    streams: int
    """Executions that run at the same time."""
    threads_alone: int
    """Of an execution that runs alone, once `prepare` has found out."""

    def infer(self, inputs: Arrays) -> Floats:
        """Run the graph once, alone; returns a copy of its output."""
        ...

    def infer_all(self, parts: Sequence[Arrays]) -> list[Floats]:
        """Run the graph on each of the parts, in this order, on all streams; returns the outputs."""
        ...

    def prepare(self, examples: Sequence[Arrays], alone: Sequence[Arrays]) -> None:
        """Do now what the first inputs of these shapes would wait for, on every stream.

        `alone` are those whose latency counts: `infer` runs them with as many threads as are best.
        """
        ...


class OpenVino:
    """One thread a stream: fp32, bf16 where the CPU has it, or a Q/DQ graph in int8."""

    def __init__(
        self, path: Path, precision: str, threads: int, few_shapes: bool = False, alone: int | None = None
    ) -> None:
        import openvino

        self._core = openvino.Core()
        check_precision("openvino", precision)
        # What is not quantised in an int8 graph is bf16 where the CPU has it: as exact, and faster.
        has_bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and not has_bf16:
            raise EngineError(
                "this release was built for bf16 and this CPU has no bf16 instructions (AVX-512 BF16 or AMX); "
                "build it with --precision fp32, int8 or auto for this kind of machine"
            )
        self._model = self._core.read_model(str(path))
        self._type = "bf16" if has_bf16 and precision != "fp32" else "f32"
        small = few_shapes and path.stat().st_size <= _SMALL_GRAPH
        self._fixed: Callable[[Arrays], bool] = lambda inputs: small and (precision == "int8" or _is_short(inputs))
        self.streams, self.threads_alone, self._most_alone = threads, 1, alone or threads
        self._forms = self._make_forms(threads, streams=threads)
        self._alone: dict[Shapes, _Forms] = {}
        self._pool = ThreadPoolExecutor(threads)
        self._requests = _Requests()
        self._making = threading.Lock()

    def infer(self, inputs: Arrays) -> Floats:
        """Run the graph once, alone; returns a copy of its output."""
        return self._run(inputs, self._alone.get(shapes_of(inputs), self._forms))

    def infer_all(self, parts: Sequence[Arrays]) -> list[Floats]:
        """Run the graph on each of the parts, in this order, on all streams; returns the outputs."""
        if len(parts) == 1:
            return [self.infer(parts[0])]
        return list(self._pool.map(lambda inputs: self._run(inputs, self._forms), parts))

    def prepare(self, examples: Sequence[Arrays], alone: Sequence[Arrays]) -> None:
        """Compile and run these shapes on every stream; for `alone` with several threads, where clearly faster."""
        all_streams = threading.Barrier(self.streams)

        def run(_: int) -> None:
            all_streams.wait()
            for inputs in examples:
                self._run(inputs, self._forms)

        list(self._pool.map(run, range(self.streams)))
        threads = self.threads_alone = fastest(self._most_alone, lambda count: self._runner(count, alone[0]))
        forms = self._make_forms(threads, streams=1) if threads > 1 else self._forms
        self._alone = {shapes_of(inputs): forms for inputs in alone}
        for inputs in [*examples, *alone]:
            self.infer(inputs)

    def _run(self, inputs: Arrays, forms: _Forms) -> Floats:
        form, mine = forms.of(inputs), self._requests
        if form not in mine.of_form:
            mine.of_form[form] = form.create_infer_request()
        request, size = mine.of_form[form], (form, shapes_of(inputs))
        if size in mine.seen:
            return request.infer(inputs, share_inputs=True)[0].copy()  # type: ignore[no-any-return]
        # Now OpenVINO makes kernels. Where two streams did so at the same time, it has happened that from then on one
        # of them gave wrong logits for inputs of such a size (docs/log.md).
        with self._making:
            logits: Floats = request.infer(inputs, share_inputs=True)[0].copy()
        mine.seen.add(size)
        return logits

    def _runner(self, threads: int, inputs: Arrays) -> Callable[[], object]:
        request = self._make_forms(threads, streams=1).of(inputs).create_infer_request()
        return lambda: request.infer(inputs, share_inputs=True)

    def _make_forms(self, threads: int, streams: int) -> _Forms:
        options = {
            "INFERENCE_PRECISION_HINT": self._type,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
            # By default each process ties its threads to the machine's first cores, whoever is busy there: two engines
            # of one thread each on two cores are then half as fast, as are two Pods with a CPU limit on one node.
            "ENABLE_CPU_PINNING": False,
        }
        return _Forms(self._model, self._fixed, lambda model: self._core.compile_model(model, "CPU", options))


class _Forms:
    """The graph compiled by OpenVINO: for each shape that comes up, where that pays, and once for all others."""

    def __init__(self, model: Any, fixed: Callable[[Arrays], bool], compile_model: Callable[[Any], Any]) -> None:
        self._model, self._fixed, self._compile = model, fixed, compile_model
        self._made: dict[Shapes, Any] = {}
        self._making = threading.Lock()

    def of(self, inputs: Arrays) -> Any:
        """The one that runs these inputs."""
        shapes = shapes_of(inputs) if self._fixed(inputs) else ()
        form = self._made.get(shapes)
        return form if form is not None else self._make(shapes, inputs)

    def _make(self, shapes: Shapes, inputs: Arrays) -> Any:
        with self._making:
            if shapes not in self._made:
                model = self._model
                if shapes:
                    model = model.clone()
                    model.reshape({name: list(values.shape) for name, values in inputs.items()})
                self._made[shapes] = self._compile(model)
            return self._made[shapes]


class _Requests(threading.local):
    """OpenVINO's requests by compiled form. One runs one execution at a time, so each thread has its own."""

    def __init__(self) -> None:
        self.of_form: dict[Any, Any] = {}
        self.seen: set[tuple[Any, Shapes]] = set()
        """The sizes that this thread has run."""


class OnnxRuntime:
    """One thread a session run: fp32, a Q/DQ graph in int8, or a dynamically quantised graph."""

    def __init__(
        self, path: Path, precision: str, threads: int, few_shapes: bool = False, alone: int | None = None
    ) -> None:
        del few_shapes  # shapes make no difference here
        check_precision("onnxruntime", precision)
        # Fused with their bias, the products of a Q/DQ graph would not be found by the fusion that makes them int8,
        # and run in fp32, slower than the fp32 graph.
        self._path, self._disabled = path, ["MatMulAddFusion"] if precision == "int8" else []
        self.streams, self.threads_alone, self._most_alone = threads, 1, alone or threads
        self._alone = self._session = self._open(1)
        self._pool = ThreadPoolExecutor(threads)

    def infer(self, inputs: Arrays) -> Floats:
        """Run the graph once, alone; returns its output."""
        return self._alone.run(None, dict(inputs))[0]  # type: ignore[no-any-return]

    def infer_all(self, parts: Sequence[Arrays]) -> list[Floats]:
        """Run the graph on each of the parts, in this order, on all streams; returns the outputs."""
        if len(parts) == 1:
            return [self.infer(parts[0])]
        # A session may be run by several threads at once.
        return list(self._pool.map(lambda inputs: self._session.run(None, dict(inputs))[0], parts))

    def prepare(self, examples: Sequence[Arrays], alone: Sequence[Arrays]) -> None:
        """Run these shapes; find out how many threads are best on the first of `alone`."""

        def runner(threads: int) -> Callable[[], object]:
            session = self._open(threads)
            return lambda: session.run(None, dict(alone[0]))

        threads = self.threads_alone = fastest(self._most_alone, runner)
        self._alone = self._session if threads == 1 else self._open(threads)
        self.infer_all([*examples, *alone])
        for inputs in alone:
            self.infer(inputs)

    def _open(self, threads: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return onnxruntime.InferenceSession(
            str(self._path), options, providers=["CPUExecutionProvider"], disabled_optimizers=self._disabled
        )


def shapes_of(inputs: Arrays) -> Shapes:
    """What a form of the graph is known by."""
    return tuple(values.shape for values in inputs.values())


def _is_short(inputs: Arrays) -> bool:
    return max(values.size for values in inputs.values()) <= _SHORT_EXECUTION


class _Opens(Protocol):
    def __call__(
        self, path: Path, precision: str, threads: int, few_shapes: bool = False, alone: int | None = None
    ) -> Engine:
        """The graph at `path` with so many threads; `few_shapes` promises that inputs have one of a few shapes.

        `alone` is how many threads a text alone may have at most, by default as many.
        """
        ...


ENGINES: dict[str, _Opens] = {"openvino": OpenVino, "onnxruntime": OnnxRuntime}

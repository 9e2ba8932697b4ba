"""ONNX to a serialised TensorRT engine (a plan), strongly typed, for TensorRT 10.9 and newer and for 11.

TensorRT is handed in as a module, so that nothing here imports it, and only what both major versions have is used:
types come from the graph, and there are no precision flags and no calibrators.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millibert._errors import UsageError
from millibert_build.tensorrt.profiles import Profile
from millibert_build.tensorrt.readable import INPUTS, OUTPUTS
from millibert_build.tensorrt.target import Target
from millibert_ensemble.plan_manifest import HardwareCompatibility

OLDEST = (10, 9)
# From here on every network is strongly typed, and the flag that asked for it is gone.
_ALWAYS_TYPED = (11, 0)
_DATATYPES = {1: "FLOAT", 6: "INT32"}  # TensorProto's numbers, TensorRT's names


class PlanError(RuntimeError):
    """TensorRT did not build a plan, or not the one that was meant; says what it said."""


@dataclass(frozen=True)
class Recipe:
    """How to build, apart from what the graph says."""

    optimization_level: int = 3
    workspace_bytes: int = 4 << 30
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    tf32: bool = False
    sparse: bool = False


@dataclass(frozen=True)
class BuiltPlan:
    """A plan that TensorRT could load again, the timing cache as it is now, and how long it took."""

    plan: bytes
    timing_cache: bytes
    seconds: float


def import_tensorrt() -> Any:
    """TensorRT's Python package; raises `UsageError` where it is missing or too old."""
    try:
        import tensorrt
    except ImportError as error:
        raise UsageError(
            f"the Python package 'tensorrt' cannot be imported here ({error}); run this in NVIDIA's TensorRT image, or "
            "pip install tensorrt in the very version that the serving image has"
        ) from error
    if _version(tensorrt) < OLDEST:
        raise UsageError(
            f"TensorRT {tensorrt.__version__} is too old: {'.'.join(map(str, OLDEST))} is the first that builds these "
            "strongly typed graphs"
        )
    return tensorrt


def build_plan(
    trt: Any,
    onnx_path: Path,
    target: Target,
    profiles: Sequence[Profile],
    recipe: Recipe,
    timing_cache: bytes = b"",
    monitor: Any = None,
) -> BuiltPlan:
    """Parse, build, and load the result once more; raises `PlanError`.

    `monitor` is a `trt.IProgressMonitor`. A timing cache of another TensorRT or GPU is set aside, not used.
    """
    start = time.monotonic()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, logger, onnx_path)
    _check_bindings(trt, network, target)
    config = builder.create_builder_config()
    _configure(trt, config, recipe)
    cache = _load_timing_cache(config, timing_cache)
    for profile in profiles:
        _add_profile(builder, config, profile)
    if monitor is not None:
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PlanError(_told("TensorRT built no plan", logger))
    plan = bytes(plan)
    _check_plan(trt, plan, logger, target, len(profiles), recipe)
    return BuiltPlan(plan, bytes(cache.serialize()), time.monotonic() - start)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc] # TensorRT has no types
        """Keeps what explains a failure; TensorRT reports through its logger only."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

    return Logger()


def _told(what: str, logger: Any) -> str:
    return "\n".join([f"{what}; it says:", *(f"  {line}" for line in logger.errors or ["nothing"])])


def _network_flags(trt: Any) -> int:
    if _version(trt) >= _ALWAYS_TYPED:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(trt: Any, network: Any, logger: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    lines = [f"  {e.node_operator()} {e.node_name()!r} (node {e.node()}): {e.desc()}" for e in errors]
    raise PlanError("\n".join([f"{path}: TensorRT's parser refuses it:", *(lines or ["  without giving a reason"])]))


def _check_bindings(trt: Any, network: Any, target: Target) -> None:
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    outputs = [network.get_output(number) for number in range(network.num_outputs)]
    for side, tensors, wanted in (("input", inputs, INPUTS[target.layout]), ("output", outputs, OUTPUTS)):
        found = {tensor.name: tensor.dtype for tensor in tensors}
        expected = {name: getattr(trt.DataType, _DATATYPES[kind]) for name, kind in wanted.items()}
        if found != expected:
            raise PlanError(f"the network's {side}s are {found}; those of the {target.layout} layout are {expected}")


def _configure(trt: Any, config: Any, recipe: Recipe) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_bytes)
    config.builder_optimization_level = recipe.optimization_level
    levels = {"same_compute_capability": "SAME_COMPUTE_CAPABILITY", "ampere_plus": "AMPERE_PLUS"}
    if recipe.hardware_compatibility in levels:
        level = levels[recipe.hardware_compatibility]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    flags = {"TF32": recipe.tf32, "VERSION_COMPATIBLE": recipe.version_compatible, "SPARSE_WEIGHTS": recipe.sparse}
    for name, wanted in flags.items():  # TF32 is on by default
        (config.set_flag if wanted else config.clear_flag)(getattr(trt.BuilderFlag, name))


def _load_timing_cache(config: Any, blob: bytes) -> Any:
    cache = config.create_timing_cache(blob)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise PlanError("TensorRT refuses its own empty timing cache")
    return cache


def _add_profile(builder: Any, config: Any, shapes: Profile) -> None:
    profile = builder.create_optimization_profile()
    for name, (smallest, likely, largest) in shapes.items():
        profile.set_shape(name, smallest, likely, largest)
    if config.add_optimization_profile(profile) < 0:
        raise PlanError(f"TensorRT refuses the optimisation profile {dict(shapes)}")


def _check_plan(trt: Any, plan: bytes, logger: Any, target: Target, profiles: int, recipe: Recipe) -> None:
    """Load it as the server will, and look at what it says of itself."""
    runtime = trt.Runtime(logger)
    if recipe.version_compatible:
        runtime.engine_host_code_allowed = True  # such a plan carries the runtime it was built with
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise PlanError(_told("TensorRT cannot load the plan that it built", logger))
    differences = list(_differences(trt, engine, target, profiles))
    if differences:
        raise PlanError("\n".join(["the plan is not the one that was meant:", *(f"  {line}" for line in differences)]))


def _differences(trt: Any, engine: Any, target: Target, profiles: int) -> Iterator[str]:
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    if inputs != set(INPUTS[target.layout]):
        yield f"its inputs are {sorted(inputs)}, not {sorted(INPUTS[target.layout])}"
    if set(names) - inputs != set(OUTPUTS):
        yield f"its outputs are {sorted(set(names) - inputs)}, not {sorted(OUTPUTS)}"
    else:
        shape = tuple(engine.get_tensor_shape("logits"))
        if shape[1:] != (target.labels,):
            yield f"its logits have the shape {list(shape)}; the release has {target.labels} labels"
    if engine.num_optimization_profiles != profiles:
        yield f"it has {engine.num_optimization_profiles} optimisation profiles, not {profiles}"


def _version(trt: Any) -> tuple[int, int]:
    major, minor = str(trt.__version__).split(".")[:2]
    return int(major), int(minor)

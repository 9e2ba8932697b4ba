"""A stand-in for TensorRT's Python package that has what version 11 has, and nothing that it removed.

The surface is that of NVIDIA's "TensorRT Python API" (11.4) and "Removed Python APIs and Replacements": no precision
flags, no calibrators, no EXPLICIT_BATCH. Assigning an attribute that does not exist is an error, as it is with
TensorRT's own classes. A "plan" is the graph with what was configured: tests can read it, and ONNX Runtime can run it.
"""

from __future__ import annotations

import enum
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

_MARK = b"plan of the double\n"


class State:
    """What a test wants to happen, and what happened."""

    def __init__(self) -> None:
        self.parser_errors: list[tuple[str, str, int, str]] = []  # operator, node name, number, description
        self.says: list[str] = []  # logged as errors while building
        self.builds = True
        self.loads = True
        self.labels: int | None = None  # of the built plan, if another than the graph's
        self.stale_cache = b"stale"
        self.caches: list[bytes] = []  # timing caches that were accepted


def read_plan(plan: bytes) -> tuple[dict[str, Any], bytes]:
    """What a plan was built with, and its graph."""
    assert plan.startswith(_MARK), "not a plan of the double"
    header, _, graph = plan.removeprefix(_MARK).partition(b"\n")
    return json.loads(header), graph


def make_tensorrt(version: str = "11.4.1.2") -> tuple[ModuleType, State]:  # noqa: C901 - one closed set of classes
    state = State()
    trt = ModuleType("tensorrt")
    major = int(version.split(".")[0])

    class ILogger:
        class Severity(enum.IntEnum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2
            INFO = 3
            VERBOSE = 4

        INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING
        INFO, VERBOSE = Severity.INFO, Severity.VERBOSE

        def log(self, severity: Any, message: str) -> None:
            raise NotImplementedError

    class IProgressMonitor:
        pass

    class DataType(enum.IntEnum):
        FLOAT = 0
        HALF = 1
        INT8 = 2
        INT32 = 3
        BOOL = 4
        BF16 = 7
        INT64 = 8

    class BuilderFlag(enum.IntEnum):
        DEBUG = 0
        REFIT = 1
        TF32 = 2
        SPARSE_WEIGHTS = 3
        VERSION_COMPATIBLE = 4
        EXCLUDE_LEAN_RUNTIME = 5
        STRIP_PLAN = 6

    class HardwareCompatibilityLevel(enum.IntEnum):
        NONE = 0
        AMPERE_PLUS = 1
        SAME_COMPUTE_CAPABILITY = 2

    class MemoryPoolType(enum.IntEnum):
        WORKSPACE = 0
        TACTIC_DRAM = 1

    class TensorIOMode(enum.IntEnum):
        NONE = 0
        INPUT = 1
        OUTPUT = 2

    flags = {"STRONGLY_TYPED": 1} if major < 11 else {"PREFER_AOT_PYTHON_PLUGINS": 4}
    creation = enum.IntEnum("NetworkDefinitionCreationFlag", flags)  # type: ignore[misc]
    types = {1: DataType.FLOAT, 6: DataType.INT32, 7: DataType.INT64, 10: DataType.HALF}

    class Tensor:
        __slots__ = ("dtype", "name", "shape")

        def __init__(self, value: onnx.ValueInfoProto) -> None:
            self.name = value.name
            self.dtype = types[value.type.tensor_type.elem_type]
            self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)

    class Network:
        __slots__ = ("_graph", "_inputs", "_outputs", "_typed")

        def __init__(self, number: int) -> None:
            self._typed = major >= 11 or bool(number & 1 << 1)
            self._graph = b""
            self._inputs: list[Tensor] = []
            self._outputs: list[Tensor] = []

        @property
        def num_inputs(self) -> int:
            return len(self._inputs)

        @property
        def num_outputs(self) -> int:
            return len(self._outputs)

        def get_input(self, index: int) -> Tensor:
            return self._inputs[index]

        def get_output(self, index: int) -> Tensor:
            return self._outputs[index]

    class ParserError:
        __slots__ = ("_of",)

        def __init__(self, of: tuple[str, str, int, str]) -> None:
            self._of = of

        def node_operator(self) -> str:
            return self._of[0]

        def node_name(self) -> str:
            return self._of[1]

        def node(self) -> int:
            return self._of[2]

        def desc(self) -> str:
            return self._of[3]

    class OnnxParser:
        __slots__ = ("_network",)

        def __init__(self, network: Network, logger: ILogger) -> None:
            assert isinstance(logger, ILogger)
            self._network = network

        def parse_from_file(self, path: str) -> bool:
            if state.parser_errors:
                return False
            graph = onnx.load(path).graph
            self._network._graph = Path(path).read_bytes()
            self._network._inputs = [Tensor(value) for value in graph.input]
            self._network._outputs = [Tensor(value) for value in graph.output]
            return True

        @property
        def num_errors(self) -> int:
            return len(state.parser_errors)

        def get_error(self, index: int) -> ParserError:
            return ParserError(state.parser_errors[index])

    class HostMemory:
        __slots__ = ("_bytes",)

        def __init__(self, content: bytes) -> None:
            self._bytes = content

        def __bytes__(self) -> bytes:
            return self._bytes

    class TimingCache:
        __slots__ = ("_bytes",)

        def __init__(self, content: bytes) -> None:
            self._bytes = content

        def serialize(self) -> HostMemory:
            return HostMemory(self._bytes + b"+tactics")

    class Profile:
        __slots__ = ("_shapes",)

        def __init__(self) -> None:
            self._shapes: dict[str, list[list[int]]] = {}

        def set_shape(self, name: str, min: Any, opt: Any, max: Any) -> None:
            ordered = all(low <= likely <= high for low, likely, high in zip(min, opt, max, strict=True))
            if not ordered:
                raise ValueError(f"{name}: {min} <= {opt} <= {max} does not hold")
            self._shapes[name] = [list(min), list(opt), list(max)]

    class Config:
        __slots__ = ("_flags", "_limits", "_profiles", "builder_optimization_level", "hardware_compatibility_level",
                     "progress_monitor")  # fmt: skip

        def __init__(self) -> None:
            self._flags = {BuilderFlag.TF32}
            self._limits: dict[Any, int] = {}
            self._profiles: list[Profile] = []
            self.builder_optimization_level = 3
            self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
            self.progress_monitor: Any = None

        def set_flag(self, flag: BuilderFlag) -> None:
            self._flags.add(BuilderFlag(flag))

        def clear_flag(self, flag: BuilderFlag) -> None:
            self._flags.discard(BuilderFlag(flag))

        def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
            self._limits[MemoryPoolType(pool)] = pool_size

        def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
            return TimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            accepted = cache._bytes != state.stale_cache or ignore_mismatch
            if accepted:
                state.caches.append(cache._bytes)
            return accepted

        def add_optimization_profile(self, profile: Profile) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

    class Builder:
        __slots__ = ("_logger",)

        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def create_network(self, flags: int = 0) -> Network:
            return Network(flags)

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
            for message in state.says:
                self._logger.log(ILogger.ERROR, message)
            names = {tensor.name for tensor in network._inputs}
            for profile in config._profiles:
                assert set(profile._shapes) == names, "every dynamic input needs a shape in every profile"
            if not state.builds:
                return None
            if config.progress_monitor is not None:
                config.progress_monitor.phase_start("Building", None, 2)
                assert all(config.progress_monitor.step_complete("Building", step) for step in range(2))
                config.progress_monitor.phase_finish("Building")
            header = {
                "version": version,
                "typed": network._typed,
                "flags": sorted(flag.name for flag in config._flags),
                "workspace": config._limits[MemoryPoolType.WORKSPACE],
                "level": config.builder_optimization_level,
                "hardware": HardwareCompatibilityLevel(config.hardware_compatibility_level).name,
                "profiles": [profile._shapes for profile in config._profiles],
            }
            return HostMemory(_MARK + json.dumps(header).encode() + b"\n" + network._graph)

    class Engine:
        __slots__ = ("_graph", "_header", "_tensors")

        def __init__(self, plan: bytes) -> None:
            self._header, self._graph = read_plan(plan)
            graph = onnx.load_from_string(self._graph).graph
            self._tensors = {v.name: (TensorIOMode.INPUT, Tensor(v)) for v in graph.input}
            self._tensors |= {v.name: (TensorIOMode.OUTPUT, Tensor(v)) for v in graph.output}

        @property
        def num_io_tensors(self) -> int:
            return len(self._tensors)

        @property
        def num_optimization_profiles(self) -> int:
            return len(self._header["profiles"])

        def get_tensor_name(self, index: int) -> str:
            return list(self._tensors)[index]

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return self._tensors[name][0]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            shape = self._tensors[name][1].shape
            return shape if state.labels is None or name != "logits" else (shape[0], state.labels)

    class Runtime:
        __slots__ = ("_logger", "engine_host_code_allowed")

        def __init__(self, logger: ILogger) -> None:
            self._logger = logger
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            engine = Engine(serialized_engine)
            if not state.loads or (
                "VERSION_COMPATIBLE" in engine._header["flags"] and not self.engine_host_code_allowed
            ):
                self._logger.log(ILogger.ERROR, "host code or version not allowed")
                return None
            return engine

    trt.__dict__.update(
        __version__=version,
        ILogger=ILogger,
        IProgressMonitor=IProgressMonitor,
        DataType=DataType,
        BuilderFlag=BuilderFlag,
        HardwareCompatibilityLevel=HardwareCompatibilityLevel,
        MemoryPoolType=MemoryPoolType,
        TensorIOMode=TensorIOMode,
        NetworkDefinitionCreationFlag=creation,
        OnnxParser=OnnxParser,
        Builder=Builder,
        Runtime=Runtime,
    )
    return trt, state


def install(monkeypatch: Any, version: str = "11.4.1.2") -> State:
    """Make `import tensorrt` find the double."""
    trt, state = make_tensorrt(version)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return state

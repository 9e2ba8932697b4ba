"""The plan of a release: built from its graph, put beside it with a manifest, in one step or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from millibert._errors import UsageError
from millibert_build.tensorrt.plan import BuiltPlan, Recipe, build_plan, import_tensorrt
from millibert_build.tensorrt.profiles import Profile, profiles_of
from millibert_build.tensorrt.readable import GraphError, check_readable
from millibert_build.tensorrt.target import Target, load_target
from millibert_ensemble import contract
from millibert_ensemble.hashing import file_sha256
from millibert_ensemble.machine import Gpu, gpus, short_version
from millibert_ensemble.plan_manifest import PLAN, PLAN_MANIFEST, TENSORRT_ONNX, PlanManifest


def build_release_plan(
    repository: Path, target: Target, recipe: Recipe, timing_cache: Path | None = None
) -> PlanManifest:
    """Build on this machine's first GPU; an older plan stays until the new one is whole.

    Raises `PlanError`, and `UsageError` where there is no GPU or no TensorRT.
    """
    trt = import_tensorrt()
    found = gpus()
    if not found:
        raise UsageError("no NVIDIA GPU here (nvidia-smi is missing or lists none); build the plan on a GPU node")
    gpu, profiles = found[0], profiles_of(target)
    cache_file = timing_cache or _default_cache(trt, gpu)
    cache = cache_file.read_bytes() if cache_file.is_file() else b""
    folder = repository / contract.BERT / contract.VERSION
    print(f"building on {gpu.name} with TensorRT {trt.__version__}; this takes minutes", file=sys.stderr)
    built = build_plan(trt, folder / TENSORRT_ONNX, target, profiles, recipe, cache, _monitor(trt))
    manifest = _manifest(target, recipe, profiles, built, str(trt.__version__), gpu)
    # The plan first: one without its own manifest is refused by `preflight`, and never served by mistake.
    _write_aside(folder / PLAN, built.plan)
    _write_aside(folder / PLAN_MANIFEST, (json.dumps(manifest.as_json(), indent=2) + "\n").encode())
    _keep(cache_file, built.timing_cache)
    return manifest


def _keep(cache_file: Path, content: bytes) -> None:
    """The timing cache only saves time: a place that cannot be written to, as in a Job, does not undo a plan."""
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        _write_aside(cache_file, content)
    except OSError as error:
        print(f"warning: the timing cache cannot be kept in {cache_file}: {error.strerror}", file=sys.stderr)


def checked_target(repository: Path) -> Target:
    """What the release wants, once its graph has been checked; raises `UsageError` and `GraphError`."""
    target = load_target(repository)
    path = repository / contract.BERT / contract.VERSION / TENSORRT_ONNX
    if not path.is_file():
        raise UsageError(f"{path}: missing, though the release says that it has a TensorRT graph; build it again")
    if file_sha256(path) != target.onnx_sha256:
        raise GraphError(f"{path}: not the graph that the release was made with: damaged, or half copied")
    check_readable(path, target.precision, target.layout)
    return target


def _manifest(
    target: Target, recipe: Recipe, profiles: Sequence[Profile], built: BuiltPlan, version: str, gpu: Gpu
) -> PlanManifest:
    return PlanManifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        onnx_sha256=target.onnx_sha256,
        plan_sha256=hashlib.sha256(built.plan).hexdigest(),
        precision=target.precision,
        layout=target.layout,
        tensorrt=short_version(version),
        gpu=gpu,
        hardware_compatibility=recipe.hardware_compatibility,
        version_compatible=recipe.version_compatible,
        sparse=recipe.sparse,
        tf32=recipe.tf32,
        optimization_level=recipe.optimization_level,
        workspace_bytes=recipe.workspace_bytes,
        labels=target.labels,
        profiles=tuple(plain(profile) for profile in profiles),
        seconds=round(built.seconds, 1),
    )


def _write_aside(path: Path, content: bytes) -> None:
    """In one step or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)  # the server may be another user
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _default_cache(trt: Any, gpu: Gpu) -> Path:
    """A timing cache is of one TensorRT and one kind of GPU."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = "".join(letter if letter.isalnum() else "-" for letter in gpu.name).lower()
    return home / "millibert" / f"tensorrt-{trt.__version__}-{kind}.timing"


def _monitor(trt: Any) -> Any:
    """TensorRT's own phases as progress bars, where someone watches."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # TensorRT has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._bars: dict[str, Any] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._bars[phase_name] = tqdm(total=num_steps, desc=phase_name, disable=None, leave=False)

        def step_complete(self, phase_name: str, step: int) -> bool:
            bar = self._bars[phase_name]
            bar.update(step + 1 - bar.n)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._bars.pop(phase_name).close()

    return Monitor()


def plain(profile: Profile) -> dict[str, dict[str, tuple[int, ...]]]:
    """A profile as plain data."""
    return {name: shapes._asdict() for name, shapes in profile.items()}

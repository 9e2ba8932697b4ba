"""The plan of a release, built from its graph and put beside it or into a store of plans, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from millibert._errors import UsageError
from millibert_build.tensorrt.plan import Recipe, build_plan, import_tensorrt
from millibert_build.tensorrt.profiles import Profile, profiles_of
from millibert_build.tensorrt.readable import GraphError, check_readable
from millibert_build.tensorrt.target import Target, load_target
from millibert_ensemble import contract, plan_store
from millibert_ensemble.hashing import file_sha256
from millibert_ensemble.machine import Gpu, gpus, short_version
from millibert_ensemble.plan_manifest import (
    PLAN,
    PLAN_MANIFEST,
    TENSORRT_ONNX,
    PlanManifest,
    load_plan_manifest,
)


class Stored(NamedTuple):
    """A plan in a store, and whether it was built just now."""

    manifest: PlanManifest
    folder: Path
    built: bool


def build_release_plan(
    repository: Path, target: Target, recipe: Recipe, timing_cache: Path | None = None
) -> PlanManifest:
    """Build on this machine's first GPU; an older plan stays until the new one is whole.

    Raises `PlanError`, and `UsageError` where there is no GPU or no TensorRT.
    """
    order = _order(repository, target, recipe)
    cache = timing_cache or _home() / order.cache_name
    manifest, plan = _build(order, cache)
    folder = repository / contract.BERT / contract.VERSION
    # The plan first: one without its own manifest is refused by `preflight`, and never served by mistake.
    _write_aside(folder / PLAN, plan)
    _write_aside(folder / PLAN_MANIFEST, plan_store.manifest_text(manifest).encode())
    return manifest


def build_stored_plan(
    repository: Path, target: Target, recipe: Recipe, plans: Path, timing_cache: Path | None = None
) -> Stored:
    """Build it into a store, unless it is there; raises what `build_release_plan` does."""
    order = _order(repository, target, recipe)
    plans.mkdir(parents=True, exist_ok=True)
    if not os.access(plans, os.W_OK):
        raise UsageError(f"{plans}: the store of plans cannot be written to here")
    plan_store.sweep(plans)
    key = plan_store.key_of(order.manifest)
    if built := not plan_store.holds(plans, key):
        # A builder's home is gone with its Job; the store stays.
        plan_store.publish(plans, *_build(order, timing_cache or plans / plan_store.TIMING / order.cache_name))
    # Another builder of the same may have been faster: what counts is what is there.
    return Stored(load_plan_manifest(plans / key / PLAN_MANIFEST), plans / key, built)


@dataclass(frozen=True)
class _Order:
    """What is to be built, with which TensorRT; of the manifest all but what only the build can tell."""

    trt: Any
    onnx: Path
    target: Target
    profiles: Sequence[Profile]
    recipe: Recipe
    manifest: PlanManifest

    @property
    def cache_name(self) -> str:
        """A timing cache is of one TensorRT and one kind of GPU."""
        return f"tensorrt-{self.trt.__version__}-{plan_store.slug(self.manifest.gpu.name)}.timing"


def _order(repository: Path, target: Target, recipe: Recipe) -> _Order:
    trt = import_tensorrt()
    found = gpus()
    if not found:
        raise UsageError("no NVIDIA GPU here (nvidia-smi is missing or lists none); build the plan on a GPU node")
    profiles = profiles_of(target)
    manifest = _manifest(target, recipe, profiles, str(trt.__version__), found[0])
    onnx = repository / contract.BERT / contract.VERSION / TENSORRT_ONNX
    return _Order(trt, onnx, target, profiles, recipe, manifest)


def _build(order: _Order, cache_file: Path) -> tuple[PlanManifest, bytes]:
    trt, cache = order.trt, cache_file.read_bytes() if cache_file.is_file() else b""
    where = f"{order.manifest.gpu.name} with TensorRT {trt.__version__}"
    print(f"building on {where}; this takes minutes", file=sys.stderr, flush=True)
    built = build_plan(trt, order.onnx, order.target, order.profiles, order.recipe, cache, _monitor(trt))
    _keep(cache_file, built.timing_cache)
    manifest = replace(
        order.manifest,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        plan_sha256=hashlib.sha256(built.plan).hexdigest(),
        seconds=round(built.seconds, 1),
    )
    return manifest, built.plan


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


def _manifest(target: Target, recipe: Recipe, profiles: Sequence[Profile], version: str, gpu: Gpu) -> PlanManifest:
    return PlanManifest(
        created="",
        onnx_sha256=target.onnx_sha256,
        plan_sha256="",
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
        max_texts=target.max_texts,
        max_tokens=target.max_tokens,
        typical_tokens=target.typical_tokens,
        profiles=tuple(plain(profile) for profile in profiles),
        seconds=0.0,
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


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millibert"


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

"""A store of plans: those of many releases, GPUs and TensorRT versions side by side, apart from the releases.

A release never changes, and a plan belongs to one kind of machine, so plans have a place of their own. Each is a
folder, named by all that it depends on, which appears whole and is not changed afterwards:

    STORE/nvidia-h100-80gb-hbm3-sm90-trt11.4.1-6c1f0e…/model.plan
                                                       plan.json
    STORE/.timing/                                      TensorRT's timing caches

Any number of builders may write to a store, and any number of servers read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from millibert._errors import UsageError
from millibert_ensemble import staging
from millibert_ensemble.hashing import file_sha256
from millibert_ensemble.plan_manifest import PLAN, PLAN_MANIFEST, PlanManifest, load_plan_manifest

# Names with a dot are no plans: what is being written, and this.
TIMING = ".timing"
_STEM = "plan"
# What a plan is built from and how, beside the machine, which stands in the key to be read.
_HASHED = (
    "onnx_sha256",
    "profiles",
    "hardware_compatibility",
    "version_compatible",
    "sparse",
    "tf32",
    "optimization_level",
    "workspace_bytes",
)
# Of SHA-256, in hexadecimal: 64 bits tell the few thousand plans of a store apart.
_DIGITS = 16


def key_of(plan: PlanManifest) -> str:
    """Return the name of a plan's folder, which is known before it is built."""
    gpu = slug(plan.gpu.name)
    capability = plan.gpu.compute_capability.replace(".", "")
    document = plan.as_json()
    text = json.dumps({name: document[name] for name in _HASHED}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    return f"{gpu}-sm{capability}-trt{plan.tensorrt}-{digest}"


def slug(name: str) -> str:
    """Return a name as lower-case letters and digits with single hyphens."""
    words = "".join(letter if letter.isascii() and letter.isalnum() else " " for letter in name.lower()).split()
    return "-".join(words)


def keys(store: Path) -> list[str]:
    """Return the keys that are in a store; raises `UsageError` where there is no store."""
    if not store.is_dir():
        raise UsageError(f"no plan store at {store}: no such folder; `millibert engine --plans` makes one")
    return sorted(path.name for path in store.iterdir() if path.is_dir() and not path.name.startswith("."))


def state(store: Path) -> list[tuple[str, int]]:
    """Return what differs from an earlier state once a plan was added, removed or replaced."""
    found = []
    for key in keys(store):
        with contextlib.suppress(FileNotFoundError):  # removed since
            found.append((key, (store / key).stat().st_ino))
    return found


def damage(store: Path, key: str) -> str | None:
    """Say what is wrong with what is under a key; None: it is the plan that the key promises."""
    try:
        plan = load_plan_manifest(store / key / PLAN_MANIFEST)
    except UsageError as error:
        return str(error)
    if key_of(plan) != key:
        return f"{PLAN_MANIFEST} describes another plan, {key_of(plan)}"
    return plan_damage(store / key, plan)


def plan_damage(folder: Path, plan: PlanManifest) -> str | None:
    """Say why the plan in a folder is not the one that its manifest describes."""
    if not (folder / PLAN).is_file():
        return f"there is no {PLAN}"
    if file_sha256(folder / PLAN) != plan.plan_sha256:
        return f"{PLAN} is not the file that {PLAN_MANIFEST} describes: damaged, or half copied"
    return None


def holds(store: Path, key: str) -> bool:
    """Return whether a key is there, and what it promises."""
    return (store / key).is_dir() and damage(store, key) is None


def publish(store: Path, manifest: PlanManifest, plan: bytes) -> Path:
    """Put a plan under its key, in one step; returns the folder.

    Another builder's sound plan under the same key stays, as servers may be reading it; a damaged one is replaced.
    """
    place = store / key_of(manifest)
    with staging.staged(store, _STEM) as folder:
        staging.write(folder / PLAN, plan)
        staging.write(folder / PLAN_MANIFEST, manifest_text(manifest).encode())
        staging.sync(folder)
        try:
            folder.rename(place)
        except OSError as error:
            if error.errno not in staging.OCCUPIED:
                raise
            if not holds(store, place.name):
                staging.exchange(folder, place)
        staging.sync(store)
    return place


def sweep(store: Path) -> None:
    """Remove what builders that were killed have left."""
    staging.sweep(store, _STEM)


def manifest_text(manifest: PlanManifest) -> str:
    """The content of `plan.json`."""
    return json.dumps(manifest.as_json(), indent=2) + "\n"


def readable(store: Path) -> Iterator[tuple[str, PlanManifest | UsageError]]:
    """Yield every key with its manifest, or with what is wrong with it."""
    for key in keys(store):
        try:
            yield key, load_plan_manifest(store / key / PLAN_MANIFEST)
        except UsageError as error:
            yield key, error

r"""Build the TensorRT plan of a release, on the kind of GPU node that will serve it.

examples:
  millibert engine --repository model_repository
  millibert engine --repository model_repository --optimization-level 5 --timing-cache /cache/tensorrt.cache
  millibert engine --repository model_repository --dry-run --json
  millibert engine --repository /models/banking77-2 --plans /plans

Reads bert/1/tensorrt.onnx (from `millibert build --tensorrt …`) and writes bert/1/model.plan with plan.json, which says
what it was built with and for. Needs NumPy, onnx and TensorRT: no torch. Run it with the TensorRT of the serving image;
`millibert preflight` compares.

--plans leaves the release alone and puts the plan into a store, under a key of GPU product, compute capability,
TensorRT version, graph, profiles and recipe; a plan that is there already is not built again. `millibert preflight
--plans` looks for it. Any number of builders and servers may share a store.

--dry-run checks the graph and shows the profiles; it needs no TensorRT and no GPU.

exit status: 0 built, or in the store already; 1 failed (older plans are untouched), 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
import typing
from pathlib import Path
from typing import Any

from millibert._errors import MillibertError
from millibert_build.tensorrt.plan import PlanError, Recipe
from millibert_build.tensorrt.profiles import profiles_of
from millibert_build.tensorrt.readable import GraphError
from millibert_build.tensorrt.release_plan import build_release_plan, build_stored_plan, checked_target, plain
from millibert_build.tensorrt.target import Target
from millibert_ensemble.plan_manifest import HardwareCompatibility

_MIB = 2**20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert engine`."""
    parser.add_argument("--repository", type=Path, required=True, metavar="DIR", help="what `millibert build` made")
    parser.add_argument("--plans", type=Path, metavar="DIR", help="put the plan into this store, not into the release")
    parser.add_argument(
        "--optimization-level",
        type=int,
        choices=range(6),
        default=3,
        help="0: quick build, 5: longest search (default 3)",
    )
    parser.add_argument(
        "--workspace-mib",
        type=int,
        default=4096,
        metavar="N",
        help="GPU memory a kernel may use (default: %(default)s)",
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="kept between builds (default: in the store, else in the user's cache folder)",
    )
    parser.add_argument(
        "--hardware-compatibility",
        choices=typing.get_args(HardwareCompatibility),
        default="none",
        help="let other GPUs run the plan too, at some cost in speed",
    )
    parser.add_argument(
        "--version-compatible",
        action="store_true",
        help="let newer TensorRT versions run the plan, at some cost in speed",
    )
    parser.add_argument("--tf32", action="store_true", help="let fp32 products run as TF32: faster, less exact")
    parser.add_argument("--dry-run", action="store_true", help="check the graph, show the profiles, build nothing")
    parser.add_argument("--json", action="store_true", help="print the plan's manifest as JSON")


def run(args: argparse.Namespace) -> int:
    """Build; returns the exit status."""
    try:
        target = checked_target(args.repository)
        document = _dry_run(target) if args.dry_run else _build(target, args)
    except (GraphError, PlanError, OSError) as error:
        raise MillibertError(str(error)) from error
    print(json.dumps(document) if args.json else _describe(document, args.repository, args.plans))
    return 0


def recipe_of(args: argparse.Namespace, target: Target) -> Recipe:
    """The recipe that the arguments and the release ask for."""
    return Recipe(
        optimization_level=args.optimization_level,
        workspace_bytes=args.workspace_mib * _MIB,
        hardware_compatibility=args.hardware_compatibility,
        version_compatible=args.version_compatible,
        tf32=args.tf32,
        sparse=target.sparse,
    )


def _build(target: Target, args: argparse.Namespace) -> dict[str, Any]:
    recipe = recipe_of(args, target)
    if args.plans is None:
        return build_release_plan(args.repository, target, recipe, args.timing_cache).as_json()
    stored = build_stored_plan(args.repository, target, recipe, args.plans, args.timing_cache)
    return {**stored.manifest.as_json(), "folder": str(stored.folder), "built": stored.built}


def _dry_run(target: Target) -> dict[str, Any]:
    return {**target.as_json(), "profiles": [plain(profile) for profile in profiles_of(target)]}


def _describe(document: dict[str, Any], repository: Path, plans: Path | None) -> str:
    lines = [f"{document['precision']} graph, {document['layout']}, {document['labels']} labels"]
    for number, profile in enumerate(document["profiles"]):
        shapes = (f"{name} {'/'.join(map(_shape, of.values()))}" for name, of in profile.items())
        lines.append(f"profile {number} (min/opt/max): {', '.join(shapes)}")
    if "seconds" not in document:
        return "\n".join([*lines, "the graph can be expected to build; nothing was built"])
    where = f"{document['gpu']['name']}, TensorRT {document['tensorrt']}"
    built = document.get("built", True)
    lines.append(f"built in {document['seconds']:.0f} s for {where}" if built else f"there already, for {where}")
    if plans is None:
        return "\n".join([*lines, f"serve it with: millibert serve --repository {repository}"])
    lines.append(f"plan: {document['folder']}")
    lines.append(f"find it with: millibert preflight --repository {repository} --plans {plans} --out DIR")
    return "\n".join(lines)


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))

"""Which plan a release is served with on a machine: its own, or the best of a store; and why the others do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from millibert._errors import UsageError
from millibert_ensemble import contract, plan_store
from millibert_ensemble.machine import Machine
from millibert_ensemble.plan_manifest import PLAN, PLAN_MANIFEST, TENSORRT_ONNX, PlanManifest, load_plan_manifest
from millibert_ensemble.repository_check import CONFIG_NAME, RELEASE, config_path, parse_config

_OWN = f"{contract.BERT}/{contract.VERSION}/{PLAN}"


@dataclass(frozen=True)
class Wanted:
    """What a release says of the plan that would serve it."""

    onnx_sha256: str
    precision: str
    layout: str
    labels: int
    max_texts: int
    max_tokens: int
    typical_tokens: int
    profiles: frozenset[int]
    """The numbers of the profiles that Triton will ask for."""


class Choice(NamedTuple):
    """A plan that fits and its folder, or no folder and the reasons; `plan` may then be one that does not fit."""

    plan: PlanManifest | None
    folder: Path | None
    reasons: tuple[str, ...]


def wanted_of(repository: Path, manifest: Mapping[str, Any]) -> Wanted:
    """Read it from a release that has been checked; raises `UsageError` for a section that lacks something."""
    config = parse_config(config_path(repository, contract.BERT, CONFIG_NAME))
    try:
        given = {
            name: manifest["tensorrt"][name]
            for name in ("onnx_sha256", "precision", "layout", "max_texts", "max_tokens", "typical_tokens")
        }
        profiles = frozenset(int(number) for group in config.instance_group for number in group.profile)
        return Wanted(**given, labels=len(manifest["labels"]), profiles=profiles)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{RELEASE}: its section 'tensorrt' lacks {error}; build the release again"
        raise UsageError(f"{repository}: {reason}") from error


def own(repository: Path, wanted: Wanted, machine: Machine) -> Choice:
    """Judge the plan beside the release's graph."""
    folder = repository / contract.BERT / contract.VERSION
    if not (folder / PLAN).is_file():
        return Choice(None, None, (_absent(folder),))
    try:
        plan = load_plan_manifest(folder / PLAN_MANIFEST)
    except UsageError as error:
        return Choice(None, None, (str(error),))
    reasons = tuple(_misfits(folder, plan, wanted, machine))
    return Choice(plan, None if reasons else folder, reasons)


def best(repository: Path, store: Path, wanted: Wanted, machine: Machine) -> Choice:
    """Take the plan that suits the machine best: of a store's for the release's graph, and the release's own."""
    fitting: list[Choice] = []
    reasons: list[str] = []
    others = 0
    for key, plan in plan_store.readable(store):
        if isinstance(plan, UsageError):
            reasons.append(str(plan))
        elif plan.onnx_sha256 != wanted.onnx_sha256:
            others += 1
        elif misfits := list(_misfits(store / key, plan, wanted, machine)):
            reasons += [f"{key}: {reason}" for reason in misfits]
        else:
            fitting.append(Choice(plan, store / key, ()))
    if (repository / _OWN).is_file():
        mine = own(repository, wanted, machine)
        if mine.folder is not None:
            fitting.append(mine)
        reasons += [f"{_OWN}: {reason}" for reason in mine.reasons]
    if fitting:
        return max(fitting, key=lambda choice: _suits(choice, wanted, machine))
    of_others = f" (it has {others} of other graphs)" if others else ""
    return Choice(None, None, tuple(reasons) or (f"{store} has no plan of this release's graph{of_others}",))


def remarks(plan: PlanManifest, wanted: Wanted, machine: Machine) -> Iterator[str]:
    """What does not keep a plan from running, and is worth knowing."""
    yield from plan.remarks(machine)
    if plan.typical_tokens != wanted.typical_tokens:
        yield (
            f"the plan was tuned for texts of {plan.typical_tokens} tokens; this release's have {wanted.typical_tokens}"
        )


def _absent(folder: Path) -> str:
    path = folder / PLAN
    if path.is_symlink():
        return f"{_OWN} is a link to {path.readlink()}, which is not there"
    return f"there is no plan yet ({_OWN})"


def _misfits(folder: Path, plan: PlanManifest, wanted: Wanted, machine: Machine) -> Iterator[str]:
    """What keeps it from serving this release here; whether it is whole, which takes longest, comes last."""
    reasons = [*_strange(plan, wanted), *(plan.misfits(machine) if machine.gpus else ())]
    yield from reasons
    if not reasons and (damage := plan_store.plan_damage(folder, plan)):
        yield damage


def _strange(plan: PlanManifest, wanted: Wanted) -> Iterator[str]:
    """What makes it another release's plan."""
    if plan.onnx_sha256 != wanted.onnx_sha256:
        yield f"the plan was built from another graph than {TENSORRT_ONNX}"
    if (plan.precision, plan.layout) != (wanted.precision, wanted.layout):
        yield f"the plan is {plan.precision} {plan.layout}; the release says {wanted.precision} {wanted.layout}"
    if plan.labels != wanted.labels:
        yield f"the plan has {plan.labels} labels; the release has {wanted.labels}"
    if (plan.max_texts, plan.max_tokens) != (wanted.max_texts, wanted.max_tokens):
        yield (
            f"the plan takes {plan.max_texts} texts of {plan.max_tokens} tokens; "
            f"the release says {wanted.max_texts} of {wanted.max_tokens}"
        )
    if missing := wanted.profiles - set(range(len(plan.profiles))):
        yield f"the plan has {len(plan.profiles)} profiles; the release's config asks for number {min(missing)}"


def _suits(choice: Choice, wanted: Wanted, machine: Machine) -> tuple[Any, ...]:
    """Sort the better one last: built for these very GPUs and texts, for nothing else, with more effort, and later."""
    plan = choice.plan
    assert plan is not None
    return (
        sum(gpu.name == plan.gpu.name for gpu in machine.gpus),
        plan.typical_tokens == wanted.typical_tokens,
        plan.hardware_compatibility == "none",
        not plan.version_compatible,
        plan.optimization_level,
        plan.created,
    )

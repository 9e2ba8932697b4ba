"""The build, top to bottom: labelled text to a published model repository.

Each stage reads what the one before it wrote. What takes minutes, the stages that train, is kept in the work folder
(see `stages`), so that a build that was interrupted or failed a later stage does not train again. Every build that
gets as far as an engine leaves a report, published or refused.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millibert._errors import UsageError
from millibert_build import release
from millibert_build.build_report import report_of
from millibert_build.dataset import Splits, load_splits
from millibert_build.evaluate import Comparison, GateError
from millibert_build.findings import Findings, Source
from millibert_build.hub import resolve_base
from millibert_build.kept_data import save_data
from millibert_build.progress import Progress
from millibert_build.publish import RELEASE_FILE, check_replaceable, replacing
from millibert_build.report import Verdict, write_report
from millibert_build.repository import Artefacts, hash_files, write_models
from millibert_build.scenario import Engine, Precision, Pruning, Scenario
from millibert_build.stages import Trained, fine_tuned, pruned
from millibert_build.tensorrt.graph import make_graph
from millibert_build.tensorrt.target import Layout
from millibert_build.tensorrt.target import Precision as TensorrtPrecision
from millibert_build.variants import Variant, first_passing, judge_on_test, make_variants, passing
from millibert_build.workshop import Workshop, open_workshop

_AFTER_REFUSAL = (
    "Nothing was published; the previous repository, if any, is untouched. Train longer, remove less, use --precision "
    "fp32, or change [gates]."
)
Judge = Callable[[Trained, Comparison], Mapping[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where a build runs and what with."""

    engine: Engine
    precision: Precision
    out: Path
    work: Path
    tensorboard: Path | None = None
    tensorrt: tuple[TensorrtPrecision, Layout] | None = None
    """The graph to add for a TensorRT plan."""
    report: Path | None = None
    """The folder of report.html and report.json; None: the work folder."""


@dataclass(frozen=True)
class Plan:
    """Which checkpoints may be served: the fine-tuned one, and pruned ones, each kept in a work folder of its own."""

    unpruned: bool
    pruned: Mapping[Path, Pruning]
    tensorrt: bool = False
    """Whether a graph for TensorRT is made too."""

    @property
    def stages(self) -> int:
        """How many stages a build with this plan announces."""
        return 6 + len(self.pruned) + self.tensorrt


@dataclass(frozen=True)
class Release:
    """What was published, and what led to it."""

    manifest: dict[str, Any]
    findings: Findings
    report: Path


def build(scenario: Scenario, place: Place) -> Release:
    """Build `place.out`, a Triton model repository.

    Raises `UsageError` for wrong input and `GateError` for a missed gate; `place.out` is then as it was.
    """
    return build_best(scenario, place, plan_of(scenario, place))


def plan_of(scenario: Scenario, place: Place) -> Plan:
    """The one checkpoint that a scenario asks for."""
    wanted = scenario.pruning
    return Plan(not wanted.active, {place.work: wanted} if wanted.active else {}, place.tensorrt is not None)


def build_best(scenario: Scenario, place: Place, plan: Plan) -> Release:
    """Build the fastest of what `plan` allows that passes its gates."""
    check_replaceable(place.out)
    progress = Progress(plan.stages)
    with locked(place.work):
        with progress.stage("data"):
            splits = load_splits(scenario.data, scenario.labels, scenario.problem)
            source = Source(scenario, splits, resolve_base(scenario.base))
            progress.note(_describe(splits))
        return make_release(source, place, plan, progress)


def make_release(source: Source, place: Place, plan: Plan, progress: Progress, judge: Judge | None = None) -> Release:
    """Everything behind the data. `judge` may refuse what is about to be published, by raising `GateError`."""
    _check_top_k(source.scenario, source.splits)
    for warning in source.splits.warnings:
        progress.warn(warning)
    findings = Findings(source, place.engine, release.now())
    report = place.report or place.work
    try:
        _train(findings, place, plan, progress)
        _make_engines(findings, plan, place.precision, progress)
        _evaluate(findings, judge, progress)
        _add_tensorrt(findings, place, progress)
    except GateError as error:
        page, _ = write_report(report_of(findings, Verdict(False, (str(error),))), report)
        raise GateError(f"{error}. {_AFTER_REFUSAL} Report: {page}") from None
    with progress.stage("publish"):
        manifest = _publish(findings, place)
        page, _ = write_report(report_of(findings, Verdict(True)), report)
        progress.note(f"{place.out}, report in {page}")
    return Release(manifest, findings, page)


def _train(findings: Findings, place: Place, plan: Plan, progress: Progress) -> None:
    """Fine-tune, and prune in every way of the plan."""
    scenario, splits = findings.source.scenario, findings.splits
    with _training_log(place.tensorboard) as log:
        with progress.stage("train"):
            trained = fine_tuned(scenario, findings.source.base, splits, place.work, log)
            progress.note(_describe_training(trained))
            before = open_workshop(scenario, place.engine, trained, splits)
            findings.shops.append(before)
        for work, pruning in plan.pruned.items():
            with progress.stage("prune"):
                pruning_scenario = scenario.model_copy(update={"pruning": pruning})
                trained = pruned(pruning_scenario, before.trained, splits, work, log)
                shop = open_workshop(pruning_scenario, place.engine, trained, splits, before)
                progress.note(_describe_pruning(shop, before))
                findings.shops.append(shop)


def _make_engines(findings: Findings, plan: Plan, precision: Precision, progress: Progress) -> None:
    """Export every checkpoint, make its variants, and judge them on validation."""
    with progress.stage("export"):
        for shop in findings.shops:
            shop.export()
        progress.note(", ".join(f"ONNX, {shop.fp32.stat().st_size / 1e6:.1f} MB" for shop in findings.shops))
    with progress.stage("engine"):
        contenders = findings.shops if plan.unpruned else findings.shops[1:]
        findings.variants = make_variants(findings.shops, contenders, precision, findings.splits)
        findings.favourite = passing(findings.variants)[0]
        progress.note(_describe_engine(findings.engine, findings.favourite, findings.variants))


def _evaluate(findings: Findings, judge: Judge | None, progress: Progress) -> None:
    """The test texts, touched for the first time, have the last word."""
    with progress.stage("evaluate"):
        findings.test, findings.tested = judge_on_test(findings.variants, findings.splits)
        chosen = first_passing(passing(findings.variants), findings.tested)
        if chosen is not findings.favourite and findings.favourite is not None:
            progress.warn(f"{findings.favourite.name} passed on validation and not on test; {chosen.name} is served")
        findings.chosen = chosen
        findings.look_outside(chosen)
        comparison = findings.tested[chosen].comparison
        progress.note(_describe_comparison(comparison, findings.abstention()))
        if judge is not None:
            findings.judged = judge(chosen.shop.trained, comparison)


def _add_tensorrt(findings: Findings, place: Place, progress: Progress) -> None:
    """The chosen checkpoint once more, as the graph of a TensorRT plan."""
    if place.tensorrt is None or findings.chosen is None:
        return
    precision, layout = place.tensorrt
    with progress.stage("tensorrt"):
        shop = findings.chosen.shop
        findings.tensorrt = make_graph(shop, precision, layout, findings.splits, findings.test[shop])
        found = findings.tensorrt.comparison
        if findings.tensorrt.refusal is not None:
            raise GateError(f"the TensorRT graph ({precision}, {layout}): {findings.tensorrt.refusal}")
        progress.note(
            f"{layout} {precision} graph, run on this CPU: test {found.score_name} {found.engine_score:.4f}, agreement "
            f"{found.agreement:.4f}; on the GPU node: millibert engine --repository {place.out}"
        )


def _publish(findings: Findings, place: Place) -> dict[str, Any]:
    chosen = findings.chosen
    assert chosen is not None
    shop, splits = chosen.shop, findings.splits
    with replacing(place.out) as staging:
        artefacts = Artefacts(
            shop.trained.tokenizer,
            chosen.onnx,
            splits.labels,
            place.engine,
            chosen.precision,
            shop.calibration,
            findings.tensorrt,
        )
        write_models(staging, shop.scenario, artefacts)
        manifest = {**release.manifest_of(findings, chosen), "files": hash_files(staging)}
        (staging / RELEASE_FILE).write_text(release.as_json(manifest), encoding="utf-8")
        save_data(splits, place.work)
    return manifest


def _check_top_k(scenario: Scenario, splits: Splits) -> None:
    if scenario.top_k > len(splits.labels):
        raise UsageError(f"top_k {scenario.top_k} is more than the {len(splits.labels)} labels; lower it")


def _describe(splits: Splits) -> str:
    sizes = f"{len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test texts"
    return f"{sizes}, {len(splits.labels)} labels"


def _describe_training(trained: Trained) -> str:
    if trained.reused:
        return "unchanged: the checkpoint of the last build is used again"
    best = trained.best
    stopped = f" of {len(trained.curve)}" if best.number < len(trained.curve) else ""
    return f"validation score {best.validation_score:.4f} after epoch {best.number}{stopped}"


def _describe_pruning(shop: Workshop, before: Workshop) -> str:
    sizes = [sum(p.numel() for p in each.trained.model.parameters()) / 1e6 for each in (before, shop)]
    found = shop.pruning_loss(shop.validation, before.validation)
    unchanged = "unchanged: " if shop.trained.reused else ""
    return (
        f"{unchanged}{shop.removed}: {sizes[0]:.1f} to {sizes[1]:.1f} million parameters, validation "
        f"{found.score_name} {found.engine_score:.4f}, before {found.checkpoint_score:.4f}, "
        f"agreement {found.agreement:.4f}"
    )


def _describe_comparison(comparison: Comparison, abstention: dict[str, float] | None) -> str:
    kept_out = (
        ""
        if abstention is None
        else (
            f', "don\'t know" to {abstention["out_of_scope_refused"]:.1%} of out-of-scope and '
            f"{1 - abstention['in_scope_recall']:.1%} of test texts (AUROC {abstention['auroc']:.4f})"
        )
    )
    return (
        f"test {comparison.score_name} {comparison.engine_score:.4f}, checkpoint {comparison.checkpoint_score:.4f}, "
        f"agreement {comparison.agreement:.4f}, calibration error {comparison.calibration_error:.4f} "
        f"(uncalibrated {comparison.calibration_error_before:.4f}){kept_out}"
    )


def _describe_engine(engine: str, chosen: Variant, variants: Sequence[Variant]) -> str:
    speeds = "; ".join(
        f"{v.name} {v.texts_per_second:,.0f} texts/s{'' if v.refusal is None else ' (refused)'}" for v in variants
    )
    return f"{engine} {chosen.name} ({speeds} on validation texts, in process)"


@contextmanager
def _training_log(folder: Path | None) -> Iterator[Any]:
    """A TensorBoard writer, or None."""
    if folder is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise UsageError("--tensorboard needs the extra 'tensorboard': pip install 'millibert[tensorboard]'") from error
    with SummaryWriter(str(folder)) as writer:
        yield writer


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """One build at a time per work folder."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{work}: another build is running there; wait for it or use another --work") from error
        yield

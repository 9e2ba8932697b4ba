"""From the findings of a build to its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from millibert_build import release
from millibert_build import report as r
from millibert_build.dataset import Example, target_matrix
from millibert_build.findings import Findings, probabilities
from millibert_build.prune import structure_of
from millibert_build.stages import Trained
from millibert_build.tokens import load_tokenizer, token_ids
from millibert_build.variants import Judgement, Variant
from millibert_build.workshop import Measured, Workshop


def report_of(findings: Findings, verdict: r.Verdict) -> r.Report:
    """Everything that was found up to now, for the page."""
    source = findings.source
    return r.Report(
        name=source.scenario.name,
        problem=source.scenario.problem,
        created=findings.created,
        labels=source.splits.labels,
        verdict=verdict,
        data=_data(findings),
        environment=_environment(findings),
        phases=tuple(_phase(shop) for shop in findings.shops),
        stages=(*(_stage(findings, variant) for variant in findings.variants), *_tensorrt(findings)),
        candidates=candidates_of(findings) if _several(findings) else (),
        lineage=tuple(_lineage(findings)),
        **_on_test(findings),
    )


def _data(findings: Findings) -> r.DataSummary:
    splits = findings.splits
    named = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    counts = {
        name: tuple(target_matrix(each, splits.labels).sum(0).astype(int).tolist()) for name, each in named.items()
    }
    return r.DataSummary(
        texts={name: len(examples) for name, examples in named.items()},
        label_counts=counts,
        tokens=_token_lengths(findings.shops[0].trained, splits.train, findings.source.scenario.max_tokens),
        warnings=splits.warnings,
    )


def _token_lengths(trained: Trained, examples: Sequence[Example], limit: int) -> r.TokenLengths:
    whole = load_tokenizer(str(trained.folder)).backend_tokenizer
    whole.no_truncation()
    whole.no_padding()
    return r.token_lengths([len(ids) for ids in token_ids(whole, [example.text for example in examples])], limit)


def _environment(findings: Findings) -> r.Environment:
    source = findings.source
    facts = release.describe(source.scenario, source.base, source.splits, findings.created)
    gates = source.scenario.gates.model_dump()
    return r.Environment(facts["base"]["name"], facts["data"]["sha256"], facts["versions"], facts["machine"], gates)


def _phase(shop: Workshop) -> r.Phase:
    name = f"recovery after {shop.removed}" if shop.removed else "fine-tuning"
    return r.Phase(name, tuple(shop.trained.curve), shop.trained.best.number)


def _stage(findings: Findings, variant: Variant) -> r.Stage:
    tested = findings.tested.get(variant)
    first = findings.shops[0]
    return r.Stage(
        name=variant.name,
        validation=_measure(variant.shop, variant.logits, variant.shop.validation, first, first.validation),
        test=_measure(variant.shop, tested.logits, findings.test[variant.shop], first, findings.test[first])
        if tested is not None
        else None,
        size_bytes=variant.onnx.stat().st_size,
        texts_per_second=variant.texts_per_second,
        chosen=variant is findings.chosen,
        passed=_refusal(findings, variant) is None,
        why_not=_refusal(findings, variant) or (variant.note or None if variant.contends else "for comparison"),
    )


def _tensorrt(findings: Findings) -> Iterator[r.Stage]:
    """The graph of a TensorRT plan, where one was asked for; its speed is a GPU's matter."""
    graph, chosen, first = findings.tensorrt, findings.chosen, findings.shops[0]
    if graph is None or chosen is None:
        return
    yield r.Stage(
        name=f"TensorRT graph: {graph.target.precision}, {graph.target.layout}",
        test=_measure(chosen.shop, graph.logits, findings.test[chosen.shop], first, findings.test[first]),
        size_bytes=graph.onnx.stat().st_size,
        passed=graph.refusal is None,
        why_not=graph.refusal or "run on this CPU; no plan yet",
    )


def _measure(shop: Workshop, logits: Any, split: Measured, first: Workshop, baseline: Measured) -> r.Measure:
    """A checkpoint's graph on one split, against the fine-tuned checkpoint in fp32."""
    single = shop.scenario.problem == "single_label"
    return r.measure(
        probabilities(shop, logits),
        probabilities(first, baseline.reference),
        split.targets.argmax(1) if single else split.targets.astype(int),
        None if single else shop.calibration.thresholds,
    )


def _refusal(findings: Findings, variant: Variant) -> str | None:
    tested = findings.tested.get(variant)
    return variant.refusal or (tested.refusal if tested is not None else None)


def candidates_of(findings: Findings) -> tuple[r.Candidate, ...]:
    """All that could have been chosen, as measured on validation texts."""
    return tuple(
        r.Candidate(
            each.name,
            each.validation.engine_score,
            each.texts_per_second,
            _refusal(findings, each) is None,
            each is findings.chosen,
        )
        for each in findings.variants
        if each.contends
    )


def _several(findings: Findings) -> bool:
    return len({variant.shop for variant in findings.variants if variant.contends}) > 1


def _lineage(findings: Findings) -> Iterator[r.Release]:
    parent = added = None
    for ancestor in findings.source.lineage:
        name = str(ancestor["fingerprint"])[:12]
        yield r.Release(name, str(ancestor["created"]), parent, added)
        parent, added = name, str(ancestor["added"]["file"])
    fingerprint = findings.shops[0].trained.record["fingerprint"]
    yield r.Release(fingerprint[:12], findings.created, parent, added)


def _on_test(findings: Findings) -> dict[str, Any]:
    """What the test texts say of the variant that is served, or was to be; nothing where it did not come to that."""
    variant = findings.chosen or findings.favourite
    if variant is None or variant not in findings.tested:
        return {}
    shop, splits, logits = variant.shop, findings.splits, findings.tested[variant].logits
    single = splits.problem == "single_label"
    labels, texts = splits.labels, [example.text for example in splits.test]
    hot = findings.test[shop].targets.astype(int)
    targets = hot.argmax(1) if single else hot
    thresholds = None if single else shop.calibration.thresholds
    served = probabilities(shop, logits)
    predicted = r.predictions(served, thresholds)
    return {
        "per_label": r.per_label(labels, targets, predicted, thresholds),
        "confusion": r.confusion(targets, predicted, len(labels)) if single else None,
        "confused": r.confused_pairs(labels, targets, predicted, texts),
        "mistakes": r.worst_mistakes(labels, targets, served, texts, thresholds),
        "calibration": _calibration(shop, findings.tested[variant], targets),
        "abstention": _abstention(findings, variant, served) if single else None,
        "pruned": _pruned(shop),
    }


def _calibration(shop: Workshop, judged: Judgement, targets: Any) -> r.Calibration:
    temperature, found = shop.calibration.temperature, judged.comparison
    raw, served = (probabilities(shop, logits) for logits in (judged.logits * temperature, judged.logits))
    before, after = r.calibration_bins(raw, targets), r.calibration_bins(served, targets)
    return r.Calibration(temperature, before, after, found.calibration_error_before, found.calibration_error)


def _abstention(findings: Findings, variant: Variant, served: Any) -> r.Abstention:
    outside = findings.outside
    scores = probabilities(variant.shop, outside).max(1) if outside is not None else None
    return r.abstention(served.max(1), scores, variant.shop.calibration.thresholds[0])


def _pruned(shop: Workshop) -> r.Pruned | None:
    removed = shop.trained.record.get("removed")
    if shop.before is None or removed is None:
        return None
    return r.Pruned(
        tuple(_layers_removed(shop.before.trained.model.config, removed)),
        removed["parameters_before"],
        removed["parameters_after"],
    )


def _layers_removed(before: Any, removed: dict[str, Any]) -> Iterator[r.LayerRemoved]:
    """Layer by layer of the model before; heads and neurons are listed for the layers that remain."""
    count = before.num_hidden_layers
    shape = structure_of(before) or {
        "heads": [before.num_attention_heads] * count,
        "neurons": [before.intermediate_size] * count,
    }
    remaining = iter(zip(removed["heads"], removed["neurons"], strict=True))
    for layer, (heads, neurons) in enumerate(zip(shape["heads"], shape["neurons"], strict=True)):
        gone_heads, gone_neurons = (range(heads), neurons) if layer in removed["layers"] else next(remaining)
        yield r.LayerRemoved(layer, heads, heads - len(gone_heads), neurons, neurons - gone_neurons)

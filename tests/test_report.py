import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from millibert_build import report as r
from millibert_build.report import charts, formats

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 390)
ALWAYS = ["verdict", "stages", "curves", "labels", "confusion", "data", "mistakes", "lineage"]
EXTRA = ["candidates", "calibration", "abstention", "removed"]
NASTY = "<script>alert('x')</script> \"&<img src=http://example.org/x.png>" + "x" * 200


def epochs(count: int) -> tuple[r.Epoch, ...]:
    return tuple(r.Epoch(i, 3.0 / i, 0.9 - 0.5 / i, 2.5 / i) for i in range(1, count + 1))


def common(labels: tuple[str, ...], targets: np.ndarray, probabilities: np.ndarray, thresholds=None) -> r.Report:
    texts = [NASTY] * len(targets)
    reference = np.clip(probabilities + 0.01, 0, 1)
    predicted = probabilities.argmax(1) if thresholds is None else (probabilities >= thresholds).astype(int)
    fp32 = r.Stage("fine-tuned fp32", None, r.measure(reference, None, targets, thresholds), 1_000_000, 100.0)
    tested = r.measure(probabilities, reference, targets, thresholds)
    return r.Report(
        name="demo",
        problem="single_label" if thresholds is None else "multi_label",
        created="2026-01-02T03:04:05+00:00",
        labels=labels,
        verdict=r.Verdict(True),
        data=r.DataSummary({"test": len(texts)}, {"test": r.label_counts(targets, len(labels))}),
        environment=r.Environment("minilm", "ab" * 32),
        phases=(r.Phase("fine-tune", epochs(3), 3),),
        stages=(fp32, r.Stage("int8", tested, tested, 250_000, 310.0, chosen=True)),
        per_label=r.per_label(labels, targets, predicted, thresholds),
        confusion=r.confusion(targets, predicted, len(labels)) if thresholds is None else None,
        confused=r.confused_pairs(labels, targets, predicted, texts),
        mistakes=r.worst_mistakes(labels, targets, probabilities, texts, thresholds),
    )


def minimal() -> r.Report:
    rng = np.random.default_rng(1)
    return common(("bad", "good"), rng.integers(0, 2, 50), rng.dirichlet((1, 1), 50))


def full() -> r.Report:
    rng = np.random.default_rng(2)
    labels = tuple(f"a_rather_long_label_of_the_bank_number_{i}_{'x' * 20}" for i in range(77))
    targets = rng.integers(0, 77, 800)
    logits = rng.normal(size=(800, 77)) + 4 * np.eye(77)[targets]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    bins = r.calibration_bins(probabilities, targets)
    return dataclasses.replace(
        common(labels, targets, probabilities),
        phases=(r.Phase("fine-tune", epochs(12), 12), r.Phase("recovery", epochs(4), 3)),
        data=r.DataSummary(
            {"train": 800, "test": 800},
            {"train": r.label_counts(targets, 77)},
            r.token_lengths(rng.integers(3, 90, 800).tolist(), 64),
            ("a warning",),
        ),
        candidates=tuple(r.Candidate(f"c{i}", 0.9 - i / 100, 100.0 * i, i != 3, i == 2) for i in range(1, 5)),
        calibration=r.Calibration(1.3, bins, bins, 0.1, 0.02),
        abstention=r.abstention(probabilities.max(1), rng.uniform(0, 0.5, 60), 0.31),
        pruned=r.Pruned((r.LayerRemoved(0, 12, 9, 1536, 1000), r.LayerRemoved(1, 12, 0, 1536, 0)), 2000, 1500),
        lineage=(r.Release("one", "2026-01-01"), r.Release("two", "2026-01-02", "one", "3 texts")),
    )


def multi() -> r.Report:
    rng = np.random.default_rng(3)
    labels = tuple(f"intent_{i}" for i in range(30))
    targets = rng.integers(0, 2, (90, 30))
    probabilities = np.clip(targets * 0.3 + rng.uniform(0, 0.6, targets.shape), 0, 1)
    bins = r.calibration_bins(probabilities, targets)
    return dataclasses.replace(
        common(labels, targets, probabilities, [0.4] * 30),
        verdict=r.Verdict(False, ("agreement 0.9 < min_agreement 0.99",)),
        calibration=r.Calibration(1.0, bins, bins, 0.1, 0.02),
    )


CASES = {"minimal": minimal, "full": full, "multi": multi}
MORE = {"minimal": [], "full": EXTRA, "multi": ["calibration"]}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[str, r.Report, Path, Path]:
    report = CASES[request.param]()
    return request.param, report, *r.write_report(report, tmp_path_factory.mktemp(request.param))


def test_sections(case):
    name, _, html, _ = case
    found = re.findall(r'<(?:section|header) id="(\w+)"', html.read_text("utf-8"))
    assert sorted(found) == sorted(ALWAYS + MORE[name])


def test_texts_are_escaped_and_nothing_is_loaded(case):
    _, report, html, _ = case
    page = html.read_text("utf-8")
    assert report.mistakes
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert not re.findall(r"<[^>]*\b(?:src|href)=[\"']?(?:https?:)?//", page)
    assert not re.findall(r"url\(|@import", page)


def test_json_roundtrip(case):
    _, report, _, document = case
    assert r.read_report(document) == report
    assert json.loads(document.read_text("utf-8"))["score_name"] == report.score_name


def test_page_and_data_have_the_same_numbers(case):
    _, report, html, _ = case
    page = html.read_text("utf-8")
    for stage in report.stages:
        assert stage.test is not None
        assert formats.score(stage.test.score) in page
        assert formats.size(stage.size_bytes) in page
    change = report.stages[1].test
    assert change is not None
    assert f"{change.mean_change:.4f} / {change.max_change:.4f}" in page
    values = re.findall(r'data-value="([^"]*)" class="meter"', page)
    assert sorted(values) == sorted("" if row.f1 is None else str(row.f1) for row in report.per_label)


def test_a_name_of_a_stage_is_escaped():
    report = minimal()
    only = dataclasses.replace(report.stages[0], name="<b>x", chosen=True)
    assert "<b>x" not in r.render(dataclasses.replace(report, stages=(only,)))


def test_a_report_without_anything_measured():
    report = dataclasses.replace(
        minimal(), stages=(), phases=(), per_label=(), confusion=None, confused=(), mistakes=()
    )
    assert "Published" in r.render(report)


def test_nothing_is_left_behind_and_numpy_values_are_plain(tmp_path):
    report = dataclasses.replace(minimal(), environment=r.Environment("x", "y", gates={"min": np.float32(0.5)}))
    r.write_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["environment"]["gates"] == {"min": 0.5}


def test_confusion_and_per_label():
    targets, given = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert r.confusion(targets, given, 3) == ((1, 1, 0), (0, 2, 0), (0, 0, 0))
    a, b, c = r.per_label("abc", targets, given)
    assert (a.precision, a.recall, a.tp, a.fp, a.fn, a.tn) == (1.0, 0.5, 1, 0, 1, 2)
    assert (b.precision, b.recall, b.support) == (2 / 3, 1.0, 2)
    assert (c.precision, c.recall, c.f1) == (None, None, None)
    assert r.confused_pairs("abc", targets, given, "wxyz") == (r.Confused("a", "b", 1, ("x",)),)


def test_worst_mistakes_come_first():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.01, 0.99]])
    found = r.worst_mistakes(("a", "b"), np.array([0, 0, 0]), probabilities, "xyz")
    assert [(m.text, m.given, m.score) for m in found] == [("z", ("b",), 0.99), ("y", ("b",), 0.6)]
    missed = r.worst_mistakes(("a", "b"), np.array([[1, 1]]), np.array([[0.9, 0.2]]), "x", 0.5)
    assert missed == (r.Mistake("x", ("a", "b"), ("a",), 0.8),)


def test_calibration_and_abstention():
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05]])
    bins = r.calibration_bins(probabilities, np.array([0, 1]), bins=10)
    assert bins[9] == r.Bin(0.9, 1.0, 2, 0.95, 0.5)
    result = r.abstention(np.array([0.9, 0.8, 0.3]), np.array([0.1, 0.3]), 0.5)
    assert (result.in_scope_recall, result.out_of_scope_rejected) == (2 / 3, 1.0)
    assert result.auroc == pytest.approx(5.5 / 6)


def test_measure_compares_label_sets():
    probabilities, reference = np.array([[0.6, 0.4], [0.6, 0.6]]), np.array([[0.6, 0.6], [0.6, 0.6]])
    found = r.measure(probabilities, reference, np.array([[1, 0], [1, 1]]), 0.5)
    assert (found.score, found.agreement) == (1.0, 0.5)
    assert (found.mean_change, found.max_change) == pytest.approx((0.05, 0.2))


def test_token_lengths():
    tokens = r.token_lengths([3, 3, 4, 200], limit=128)
    assert (tokens.mean, tokens.median, tokens.max, tokens.truncated) == (52.5, 3.5, 200, 1)
    assert sum(tokens.histogram.counts) == 4


def test_confused_labels_stand_side_by_side():
    counts = [[9, 0, 0, 3], [0, 9, 0, 0], [0, 1, 9, 0], [0, 0, 0, 9]]
    order = charts.confusion_order(counts)
    assert sorted(order) == [0, 1, 2, 3]
    assert abs(order.index(0) - order.index(3)) == 1
    assert abs(order.index(1) - order.index(2)) == 1


def test_differences_are_marked_in_words_too():
    assert "▼ −1.25 pt" in formats.points(0.9, 0.9125)
    assert "= same" in formats.points(0.9, 0.9)
    assert "▲ 2.00×" in formats.times(200, 100)
    assert "▼ −75 %" in formats.shrunk(25, 100)


PROBE = """<title>probing</title><body>%s<script>
onload = () => { const said = [...document.querySelectorAll("iframe")].map((frame) => {
  const page = frame.contentDocument.documentElement;
  const sizes = [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect());
  return [page.scrollWidth, page.clientWidth, sizes.length, Math.min(...sizes.map((s) => Math.min(s.width, s.height)))];
}); document.body.innerHTML = `<pre>${JSON.stringify(said)}</pre>`; };
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
def test_the_page_fits_wide_and_narrow_screens(case, tmp_path):
    name, _, html, _ = case
    frames = "".join(
        f'<iframe src="{html.as_uri()}" style="border:0;width:{w}px;height:900px"></iframe>' for w in WIDTHS
    )
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE % frames, encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    said = re.search(r"<pre>(.*?)</pre>", dom)
    assert said is not None, dom[-500:]
    for width, (scrolled, client, drawings, smallest) in zip(WIDTHS, json.loads(said[1]), strict=True):
        assert scrolled <= client <= width, (name, width)
        assert drawings >= 2
        assert smallest > 100

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from load import report_command
from load.report_page import judge_repeats, render, words, write_page
from load.results import Answers, Arrival, Outcome, Resources, Run, Stage, read_runs, summarise, write_runs
from load.slo import Objective, parse_slo
from millibert import UsageError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 360)
ALWAYS = ["verdict", "latency", "time", "errors", "resources", "how", "machine"]
NASTY = "<script>alert('x')</script> \"&<img src=http://example.org/x.png>" + "x" * 200
CONFIG = json.dumps({"name": "bert", "max_batch_size": 64, "instance_group": [{"count": 1}], "note": NASTY})
SLO = parse_slo("p99<25ms,errors<0.1%")


def generated(seed: int, rate: float, seconds: float, slower: float, wrong: float) -> Answers:
    """A server that warms up for three seconds, queues more the nearer to 1,000/s, and refuses what is beyond."""
    rng = np.random.default_rng(seed)
    due = np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))
    wait = slower / max(0.05, 1 - rate * slower / 1000)
    latency = 0.004 * wait * rng.lognormal(0, 0.35, len(due)) * (1 + 2 * np.exp(-due / 0.7))
    outcome = np.full(len(due), Outcome.ANSWERED, dtype=object)
    outcome[rng.uniform(size=len(due)) < wrong] = Outcome.TIMED_OUT
    outcome[rng.uniform(size=len(due)) < max(0.0, rate * slower / 1000 - 0.95)] = Outcome.REFUSED
    return Answers(due, latency, outcome.astype(str))


def used(seconds: float) -> list[Resources]:
    names = {"tritonserver": 0.4, "tokenizer": 0.1, "bert": 0.9, "postprocess": 0.1, "load": 0.3}
    return [
        Resources(
            at=float(at),
            cpus={name: value * (1 + 0.1 * np.sin(at)) for name, value in names.items()},
            memory_mib={name: 60 + 700 * (name == "bert") + at / 10 for name in names},
            shared_memory_mib=16.0,
        )
        for at in range(1, int(seconds))
    ]


def made(
    seed: int = 0, rate: float = 400, seconds: float = 30, slower: float = 1.0, wrong: float = 0.0, **changed: object
) -> Run:
    found = summarise(generated(seed, rate, seconds, slower, wrong), seconds)
    parts = {"tokenizer": 0.3, "bert": 2.4 * slower**2, "postprocess": 0.2}
    document: dict[str, Any] = {
        "tool": "millibert",
        "url": "grpc://127.0.0.1:8001",
        "model": "customer_service",
        "texts_per_request": 1,
        "arrival": Arrival(kind="open", rate=rate, spacing="poisson"),
        "started": "2026-11-25T10:00:00+00:00",
        "texts_per_second": found.requests_per_second,
        "resources": used(seconds),
        "stages": [
            Stage(
                model=name,
                queue_ms=0.3 * ms,
                input_ms=0.05,
                compute_ms=ms,
                output_ms=0.04,
                total_ms=1.3 * ms + 0.12,
                texts_per_execution=3.5,
            )
            for name, ms in parts.items()
        ],
        "between_stages_ms": 0.25,
        "machine": {"cpu": "AMD EPYC 9000 of a cloud", "cpus": 2},
        "server": {"name": "triton", "version": "2.60.0", "bert": CONFIG},
        "reasons": {NASTY: 3} if found.counts.errors else {},
        **found._asdict(),
        **changed,
    }
    return Run.model_validate(document)


class Case(NamedTuple):
    """Arguments of a page, and which sections are there beside those that always are."""

    runs: Sequence[Run]
    objectives: Sequence[Objective] = SLO
    previous: Sequence[Run] | None = None
    curve: Sequence[Run] = ()
    more: Sequence[str] = ("stages",)
    charts: int = 0


CASES: dict[str, Callable[[], Case]] = {
    "one": lambda: Case([made()], charts=6),
    "full": lambda: Case(
        [made(seed, wrong=0.003) for seed in range(3)],
        previous=[made(10 + seed, slower=0.8) for seed in range(3)],
        curve=[made(20 + at, rate, seconds=10) for at, rate in enumerate((100, 200, 600, 800, 950))],
        more=("stages", "curve", "comparison"),
        charts=10,
    ),
    "overloaded": lambda: Case([made(rate=1100, seconds=90)], (), charts=7),
    "nothing answered": lambda: Case(
        [made(wrong=1.1, model=NASTY)], previous=[made()], more=("stages", "comparison"), charts=6
    ),
    "nothing known": lambda: Case(
        [made(resources=[], stages=[], between_stages_ms=None, machine={}, server={}, seconds=0.5, rate=4)],
        more=(),
        charts=3,
    ),
    "long, closed": lambda: Case(
        [made(rate=20, seconds=1200, arrival=Arrival(kind="closed", under_way=64), texts_per_request=8)], charts=6
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[Case, Path]:
    made_case = CASES[request.param]()
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, *made_case[:4])
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
    return made_case, path


def test_sections_and_charts(case) -> None:
    asked, path = case
    page = path.read_text("utf-8")
    assert sorted(re.findall(r'<(?:section|header) id="(\w+)"', page)) == sorted([*ALWAYS, *asked.more])
    charts = re.findall(r"<svg[^>]*>(<desc>[^<]+</desc>)?", page)
    assert len(charts) == asked.charts
    assert all(charts)


def test_texts_of_the_server_are_escaped_and_nothing_is_loaded(case) -> None:
    asked, path = case
    page = path.read_text("utf-8")
    assert "<script" not in page
    assert ("&lt;script&gt;alert" in page) == bool(asked.runs[0].server)
    assert not re.findall(r"<[^>]*\b(?:src|href)=[\"']?(?:https?:)?//", page)
    assert not re.findall(r"url\(|@import", page)
    assert "nan" not in page.lower().replace("finance", "")
    assert "None" not in page.replace("<b>None.</b>", "")


def test_the_verdict_comes_first_and_the_figures_are_those_of_the_run() -> None:
    run = made()
    page = render([run], SLO)
    assert run.latency_ms is not None
    assert "✓ PASS" in page
    assert page.index("✓ PASS") < page.index("Answered") < page.index('id="latency"')
    for figure in (run.latency_ms.p50, run.latency_ms.p99, run.latency_ms.max):
        assert f"<td>{words.figure(figure)}</td>" in page
    assert "no coordinated omission" in page
    assert "✗ FAIL" in render([run], parse_slo("p99<1ms"))
    assert "against no objectives" in render([run], ())


def test_medians_decide_and_each_repeat_is_told() -> None:
    runs = [made(), made(1), made(2, slower=1.4)]
    p99 = [run.latency_ms.p99 for run in runs if run.latency_ms is not None]
    limit = (sorted(p99)[1] + max(p99)) / 2
    (result,) = judge_repeats([Objective("p99", limit)], runs)
    assert result.verdict.held
    assert result.verdict.measured == sorted(p99)[1]
    assert result.kept_in == 2
    page = render(runs, [Objective("p99", limit)])
    assert "✓ PASS" in page
    assert "is kept in 2 of 3 repeats" in page
    assert all(words.ms(value) in page for value in p99)


def test_a_regression_names_the_stage() -> None:
    page = render([made(1, slower=1.4)], SLO, [made(2)])
    assert "Worse beyond the noise." in page
    assert re.search(r"The stage that grew most is <b>bert: \+\d+ % \(.* → .* ms\)</b>", page)
    assert "A single run tells the noise inside it" in page
    assert "The same, within the noise." in render([made(1)], SLO, [made(2)])


def test_a_closed_loop_says_what_it_hides() -> None:
    page = render([made(arrival=Arrival(kind="closed", under_way=64))], SLO)
    assert "not in these figures (coordinated omission)" in page


def test_numbers_for_people() -> None:
    gap = words.GAP
    assert [words.ms(each) for each in (0.1234, 12.345, 1234.5, 12345.6)] == [
        f"0.12{gap}ms",
        f"12.3{gap}ms",
        f"1,234{gap}ms",
        f"12.3{gap}s",
    ]
    assert [words.share(each) for each in (0, 0.00001, 0.0123, 1)] == [
        f"0{gap}%",
        f"0.001{gap}%",
        f"1.2{gap}%",
        f"100{gap}%",
    ]
    assert words.signed(-0.034) == f"−3.4{gap}%"
    assert words.signed(0.003, "share") == f"+0.30{gap}points"
    assert words.signed(-0.00001) == f"0.0{gap}%"
    assert [words.limit(0.001, "errors"), words.limit(25.0, "p99")] == [f"0.1{gap}%", f"25{gap}ms"]
    assert words.mib(20480) == f"20.00{gap}GiB"


PROBE = """<title>probing</title><body>%s<script>
onload = () => { const said = [...document.querySelectorAll("iframe")].map((frame) => {
  const page = frame.contentDocument.scrollingElement;
  const sizes = [...page.querySelectorAll("svg")].map((svg) => svg.getBBox());
  const outside = [...page.querySelectorAll("svg text")].filter((text) => {
    const [a, b] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
    return a.left < b.left - 1 || a.right > b.right + 1;
  }).map((text) => text.textContent);
  const requested = frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name);
  return {scrolled: page.scrollWidth, client: page.clientWidth, outside, requested,
          smallest: sizes.map((size) => Math.min(size.width, size.height))};
}); document.body.innerHTML = `<pre>${JSON.stringify(said).replaceAll("<", "(")}</pre>`; };
</script>"""


def seen(html: Path, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """What a browser makes of the page at each width, and what it said on its console."""
    frames = "".join(
        f'<iframe src="{html.as_uri()}" style="border:0;width:{width}px;height:900px"></iframe>' for width in WIDTHS
    )
    probe = folder / "probe.html"
    probe.write_text(PROBE % frames, encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    logs = ["--enable-logging=stderr", "--v=0"]
    command = [str(CHROMIUM), *flags, *logs, f"--user-data-dir={folder / 'profile'}", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    said = re.search(r"<pre>(.*?)</pre>", done.stdout)
    assert said is not None, done.stdout[-500:]
    return json.loads(said[1]), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
def test_the_page_fits_wide_and_narrow_screens(case, tmp_path) -> None:
    asked, html = case
    found, console = seen(html, tmp_path)
    assert console == ""
    for width, at_width in zip(WIDTHS, found, strict=True):
        assert at_width["scrolled"] <= at_width["client"] <= width
        assert at_width["requested"] == []
        assert len(at_width["smallest"]) == asked.charts
        assert min(at_width["smallest"]) > 40
        assert at_width["outside"] == []


def command(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="load-report")
    report_command.configure(parser)
    return report_command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    runs = {
        "one": [made()],
        "repeats": [made(seed) for seed in range(3)],
        "slow": [made(7, slower=1.4)],
        "rates": [made(at, rate, seconds=10) for at, rate in enumerate((400, 100, 800))],
    }
    paths = {name: tmp_path / f"{name}.json" for name in runs}
    for name, path in paths.items():
        write_runs(path, runs[name])
    return paths


def test_a_file_holds_one_run_or_several(files) -> None:
    assert len(read_runs(files["one"])) == 1
    assert [run.arrival.rate for run in read_runs(files["rates"])] == [400, 100, 800]


@pytest.mark.parametrize(
    ("content", "said"),
    [("[]", "no run in it"), ("{", "not JSON"), ('[{"tool": "ab"}]', "0.tool"), ("3", "the document")],
)
def test_what_is_no_run_is_told(tmp_path, content, said) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=said):
        read_runs(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_runs(tmp_path / "none.json")


def test_the_command_judges_and_writes(files, tmp_path, capsys) -> None:
    out = tmp_path / "out.html"
    assert command(files["one"], "--slo", "p99<500ms", "--out", out) == 0
    assert "PASS  p99<500ms: " in capsys.readouterr().out
    assert "✓ PASS" in out.read_text("utf-8")
    assert command(files["repeats"], "--slo", "p99<1ms", "--out", out, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["held"], document["runs"], len(document["verdicts"][0]["repeats"])) == (False, 3, 3)
    assert "✗ FAIL" in out.read_text("utf-8")


def test_other_loads_are_points_of_the_curve(files, tmp_path, capsys) -> None:
    out = tmp_path / "out.html"
    assert command(files["rates"], files["one"], "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 2
    page = out.read_text("utf-8")
    assert 'id="curve"' in page
    assert all(f">{rate}/s" in page for rate in (100, 400, 800))


def test_a_regression_fails_only_where_that_is_asked(files, tmp_path, capsys) -> None:
    arguments = (files["slow"], "--previous", files["one"], "--out", tmp_path / "out.html")
    assert command(*arguments) == 0
    assert command(*arguments, "--fail-on-regression") == 1
    said = capsys.readouterr().out
    assert "WORSE beyond the noise" in said
    assert "slower most: bert: +" in said
    assert command(files["one"], "--previous", files["one"], "--fail-on-regression", "--out", tmp_path / "o.html") == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("none.json", "--out", "out.html"),
        ("one.json", "--out", "nowhere/out.html"),
        ("one.json", "--out", "out.html", "--fail-on-regression"),
        ("one.json", "--out", "out.html", "--slo", "p98<3ms"),
        ("one.json",),
    ],
)
def test_wrong_usage_ends_with_2(files, tmp_path, monkeypatch, arguments) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    assert stopped.value.code == 2

"""Whether our load, Locust and perf_analyzer say the same of one server, and what each takes itself.

One server, one run, a closed loop of single texts. The tools take turns round by round, so that what else happens on
the machine hits all; a ratio is that of two neighbours of one round, and the median of the rounds counts. Server and
tool share the machine: a tool that takes more CPU leaves less to the server, and that is in its figures.

examples:
  python -m load.agreement --repository banking77_repository --data test.csv --label-column category
  python -m load.agreement --repository banking77_repository --data test.csv --protocol http --concurrency 64

perf_analyzer has to be there: `python -m load.install_perf_analyzer`.

exit status: 0 `millibert load` is within --within of perf_analyzer everywhere, 1 it is not, or a call failed, 2 wrong
usage
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import millibert
from load import locust_run, perf_analyzer
from load.command import run_command
from load.locust_run import LocustLoad
from load.machine import describe_machine
from load.perf_analyzer import Expected, PerfLoad
from load.released import add_release, serve
from load.results import LOAD, Run
from load.runs import Target, run_closed
from load.texts import ask_reference
from load.watch import Watch
from millibert._arguments import positive_float, positive_int
from millibert._client import Client
from millibert._errors import MillibertError, UsageError
from millibert._labelled_texts import read_labelled_texts
from millibert._perf_analyzer import PROGRAM, find
from millibert_ensemble.engine_choice import add_engine

OURS, LOCUST = "millibert", "locust"
PROTOCOLS = ("grpc", "http")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_release(parser)
    add_engine(parser)
    parser.add_argument("--protocol", choices=PROTOCOLS, nargs="+", default=PROTOCOLS, help="default: both")
    parser.add_argument(
        "--concurrency", type=positive_int, nargs="+", default=(1, 16, 64), metavar="N", help="default: 1 16 64"
    )
    parser.add_argument("--no-locust", action="store_true", help=f"only our load and {PROGRAM}")
    parser.add_argument("--seconds", type=positive_float, default=10.0, metavar="S", help="default: %(default)g")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--within", type=positive_float, default=0.05, metavar="SHARE", help="default: %(default)g")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    return run_command("load.agreement", __doc__, configure, run, table, argv, lambda found: bool(found["agree"]))


class Figures(NamedTuple):
    """What a tool said in one round, and what it took."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """Of the tool itself, a request."""


@dataclass(frozen=True)
class _Service:
    """What is asked, by whichever tool; each run comes with what the tool itself used."""

    url: str
    client: Client
    expected: Expected
    source: Path
    """The texts, for Locust."""
    data: Path
    """The same, for perf_analyzer."""
    seconds: float

    def ours(self, under_way: int) -> Run:
        wanted = [frozenset(label.encode() for label in right) for right in self.expected.right]
        return run_closed(Target(self.client, self.url, self.expected.texts, wanted), under_way, self.seconds)

    def perf_analyzer(self, under_way: int) -> Run:
        load = PerfLoad(self.url, self.client.model, self.data, self.seconds, concurrency=under_way)
        return self._watched(lambda: perf_analyzer.run(load, self.expected))

    def locust(self, under_way: int) -> Run:
        load = LocustLoad(self.url, {self.client.model: 1.0}, str(self.source), self.seconds, users=under_way)
        return self._watched(lambda: locust_run.run(load))

    def _watched(self, send: Callable[[], Run]) -> Run:
        with Watch(self.url) as watch:
            made = send()
        return made.model_copy(update={"resources": watch.resources})


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve the release, and ask it by every protocol with every tool."""
    if find() is None:
        raise UsageError(f"{PROGRAM} is not here: `python -m load.install_perf_analyzer` installs it")
    # Each once, as perf_analyzer names a text in its answers, not its place.
    rows = read_labelled_texts(args.data, args.text_column, args.label_column)
    texts = list(dict.fromkeys(row.text for row in rows))
    cases: list[dict[str, Any]] = []
    with (
        serve(args) as server,
        tempfile.TemporaryDirectory(prefix="millibert-agreement-") as folder,
        tqdm(total=_count(args), desc="runs", disable=None, leave=False) as bar,
    ):
        source, data = Path(folder, "texts.jsonl"), Path(folder, "texts.json")
        source.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
        perf_analyzer.write_data(data, server.grpc_url, None, texts)
        urls = {"grpc": server.grpc_url, "http": server.http_url}
        for protocol in args.protocol:
            with millibert.connect(urls[protocol], server.services[0]) as client:
                expected = Expected(client.labels(), texts, ask_reference(client, texts))
                service = _Service(urls[protocol], client, expected, source, data, args.seconds)
                for under_way in args.concurrency:
                    rounds = _rounds(service, under_way, args, bar)
                    cases.append({"protocol": protocol, "under_way": under_way, **judge(rounds, args.within)})
    return {**describe_machine(), "within": args.within, "seconds": args.seconds, "rounds": args.rounds,
            "cases": cases, "agree": all(case["agree"] for case in cases)}  # fmt: skip


def _count(args: argparse.Namespace) -> int:
    return len(args.protocol) * len(args.concurrency) * int(args.rounds) * (2 if args.no_locust else 3)


def _rounds(service: _Service, under_way: int, args: argparse.Namespace, bar: Any) -> dict[str, list[Figures]]:
    tools: dict[str, Callable[[int], Run]] = {PROGRAM: service.perf_analyzer, OURS: service.ours}
    if not args.no_locust:
        tools[LOCUST] = service.locust
    found: dict[str, list[Figures]] = {name: [] for name in tools}
    for number in range(args.rounds):
        # Neither of two is always the one that finds the server warm.
        for name in sorted(tools, reverse=bool(number % 2)):
            bar.set_postfix_str(f"{under_way} under way, {name}")
            found[name].append(figures(tools[name](under_way)))
            bar.update()
    return found


def figures(made: Run) -> Figures:
    """What a run says; raises `MillibertError` where a request got no right answer, or the run was too short."""
    if made.counts.errors or made.latency_ms is None:
        raise MillibertError(f"{made.tool}: {made.counts.errors:,} of {made.counts.sent:,} requests: {made.reasons}")
    if not made.resources:
        raise MillibertError(f"{made.tool} was done before its CPU time was looked at; give more --seconds")
    # Of most seconds: a tool starts and ends with work that is not the load.
    cpus = statistics.median(look.cpus[LOAD] for look in made.resources)
    rate = made.requests_per_second
    return Figures(rate, made.latency_ms.p50, made.latency_ms.p99, 1000 * cpus / rate)


def judge(rounds: Mapping[str, Sequence[Figures]], within: float) -> dict[str, Any]:
    """Medians of each tool, its rate over perf_analyzer's of the same round, and whether ours is close enough."""
    tools: dict[str, Any] = {}
    for name, found in rounds.items():
        ratios = [
            each.requests_per_second / reference.requests_per_second
            for each, reference in zip(found, rounds[PROGRAM], strict=True)
        ]
        medians = {field: statistics.median(getattr(each, field) for each in found) for field in Figures._fields}
        tools[name] = {
            **medians, "ratio": statistics.median(ratios), "ratios": ratios,
            "runs": [each.requests_per_second for each in found],
        }  # fmt: skip
    return {"tools": tools, "agree": abs(tools[OURS]["ratio"] - 1) <= within}


def table(found: dict[str, Any]) -> str:
    """Each case for people."""
    lines = [
        f"{found['cpu']}, {found['cpus']} CPUs, shared by server and load; single texts, closed loop, medians of "
        f"{found['rounds']} rounds of {found['seconds']:g} s",
        f"{'':<28} {'requests/s':>10} {'ratio':>6} {'lowest':>6} {'highest':>7} {'p50 ms':>8} {'p99 ms':>8} "
        f"{'CPU ms each':>11}",
    ]
    for case in found["cases"]:
        for name, each in case["tools"].items():
            what = f"{case['protocol']} {case['under_way']:>3}  {name}"
            spread = f"{min(each['ratios']):>6.3f} {max(each['ratios']):>7.3f}"
            lines.append(
                f"{what:<28} {each['requests_per_second']:>10,.0f} {each['ratio']:>6.3f} {spread} "
                f"{each['p50_ms']:>8.2f} {each['p99_ms']:>8.2f} {each['cpu_ms']:>11.3f}"
            )
    verdict = "PASS" if found["agree"] else "FAIL"
    lines.append(f"{verdict}  `millibert load` within {100 * found['within']:g} % of {PROGRAM}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

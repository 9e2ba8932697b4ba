r"""Put load on a served model and say whether it keeps its objectives: exit status 0, or 1.

examples:
  millibert load --url grpc://127.0.0.1:8001 --model banking77 --texts test.csv --slo "p99<50ms,errors<0.1%" --rate 400
  millibert load --url … --model … --texts test.csv --slo "p99<50ms" --find-rate --report report.html
  millibert load --url … --model … --texts test.csv --under-way 64 --duration 60 --repeats 3 --out run.json
  millibert load --url … --model … --slo "p99<50ms" --rate 400 --previous run.json --report report.html
  millibert load --url … --model … --slo "errors<1%,growth<3%" --rate 400 --duration 600 --repeats 1 --report soak.html

--rate sends so many requests a second whatever the server does (an open loop): by default at random intervals, like
those of many independent callers (a Poisson process), and latencies count from the moment that a request was due. A
server that falls behind cannot slow the load, and cannot hide what its callers wait ("coordinated omission"). With
--under-way, a closed loop, it can: use that for how much a server does, not for how long callers wait.

Answers are checked: each text is asked once before the load, and an answer with another best label counts as wrong. The
warm-up is found in the latencies and left out; so is whether a run was steady. A load is run --repeats times; an SLO is
judged by the medians, and how far the runs lie apart is shown.

--find-rate looks for the highest rate that keeps the SLO, by halving, and then tries that in full, --repeats times for
--duration; where that is too much after all, it goes down in steps of 5 %.

An SLO names latencies (mean, p50, p90, p95, p99, p99.9, max), shares of the requests (errors, refused, timeouts, wrong)
and, where the server runs on this machine, "growth": of its memory, from the first tenth of a run to its end.

The load comes from this machine: where the server shares it, the load's CPU time (shown) is part of the result.

exit status: 0 the SLO is kept (or none was given), 1 it is not, or a call failed, 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from load import repeats, slo
from load.results import LOAD, Run, write_runs
from load.runs import Target, run_closed, run_open
from load.search import highest_rate
from load.texts import ask_reference, read_source
from millibert._address import parse_address
from millibert._arguments import add_service, open_client, positive_float, positive_int
from millibert._client import Client
from millibert._errors import MillibertError, UsageError

# What the guess of a search is measured with.
_GUESS_UNDER_WAY, _GUESS_SECONDS = 16, 3.0
_GUESS_SHARE = 0.5
# A search hears of each rate once, and briefly; where what it found is not kept for the full time, it is too high.
_STEP, _MOST_STEPS = 0.95, 6


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert load`."""
    add_service(parser)
    parser.add_argument(
        "--texts",
        default="synthetic:lognormal:mean=15,sigma=0.6",
        metavar="SOURCE",
        help="a file of texts, or words at random, as many a text as it says (default: %(default)s)",
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--texts-per-request", type=positive_int, default=1, metavar="N", help="default: %(default)s")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--rate", type=positive_float, metavar="R", help="open loop: requests a second")
    how.add_argument("--under-way", type=positive_int, metavar="N", help="closed loop: requests at the same time")
    how.add_argument("--find-rate", action="store_true", help="open loop: the highest rate that keeps the SLO")
    parser.add_argument("--spacing", choices=("poisson", "even"), default="poisson", help="of an open loop")
    parser.add_argument("--duration", type=positive_float, default=20.0, metavar="S", help="default: %(default)g")
    parser.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--slo", type=slo.slo_argument, metavar="SLO", help='"p99<25ms,errors<0.1%%"')
    parser.add_argument("--no-check", action="store_true", help="count answers without looking at their labels")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the runs there, as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page about them there (.html)")
    parser.add_argument("--previous", type=Path, metavar="FILE", help="runs to compare with in the report")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Load, judge, print; returns the exit status."""
    if args.find_rate and args.slo is None:
        args.wrong_usage("--find-rate looks for the highest rate that keeps the SLO: give --slo")
    if parse_address(args.url).scheme not in ("grpc", "http"):
        raise UsageError("millibert load sends plain gRPC and HTTP only; in front of TLS use Locust (docs/load.md)")
    with open_client(args) as client:
        target = _target(args, client)
        tried: list[Run] = []
        if args.find_rate:
            rate, tried = _find(args, target)
            if rate is None:
                raise MillibertError(
                    f"no rate keeps {_written(args.slo)}: the lowest that was tried was {tried[-1].arrival.rate:.0f}/s"
                )
            args.rate = rate
        runs = _repeats(args, target)
        for _ in range(_MOST_STEPS if args.find_rate else 0):
            if _is_held(args, runs):
                break
            tried += runs
            args.rate *= _STEP
            runs = _repeats(args, target)
    document = _document(args, runs, tried)
    if args.out is not None:
        write_runs(args.out, runs)
    if args.report is not None:
        _write_report(args, runs, tried)
    print(json.dumps(document) if args.json else _table(document))
    return 0 if document["held"] is not False else 1


def _target(args: argparse.Namespace, client: Client) -> Target:
    texts = read_source(args.texts, args.text_column).each
    if args.texts_per_request > (most := client.max_batch_size()):
        raise UsageError(f"--texts-per-request {args.texts_per_request}: this model takes {most} at most")
    if len(texts) < args.texts_per_request:
        raise UsageError(f"{args.texts}: {len(texts)} texts are fewer than one request has")
    wanted = None if args.no_check else [_encoded(right) for right in ask_reference(client, texts)]
    return Target(client, args.url, texts, wanted, args.texts_per_request)


def _encoded(labels: frozenset[str]) -> frozenset[bytes]:
    return frozenset(label.encode() for label in labels)


def _repeats(args: argparse.Namespace, target: Target) -> list[Run]:
    numbers = tqdm(range(args.repeats), desc="runs", leave=False, disable=None)
    if args.rate is not None:
        numbers.set_postfix_str(f"{args.rate:,.0f}/s")
    return [_one(args, target, number) for number in numbers]


def _is_held(args: argparse.Namespace, runs: Sequence[Run]) -> bool:
    return all(verdict.held for verdict in slo.judge(args.slo, repeats.medians(runs)))


def _one(args: argparse.Namespace, target: Target, number: int) -> Run:
    if args.under_way is not None:
        return run_closed(target, args.under_way, args.duration)
    return run_open(target, args.rate, args.duration, poisson=args.spacing == "poisson", seed=number)


def _find(args: argparse.Namespace, target: Target) -> tuple[float | None, list[Run]]:
    """Search from half of what a closed loop reaches; each try takes half the duration."""
    closed = run_closed(target, _GUESS_UNDER_WAY, _GUESS_SECONDS)
    guess = max(1.0, _GUESS_SHARE * closed.requests_per_second)

    def try_rate(rate: float) -> Run:
        made = run_open(target, rate, args.duration / 2, poisson=args.spacing == "poisson")
        bar.update()
        bar.set_postfix_str(f"{rate:,.0f}/s {'held' if holds(made) else 'missed'}")
        return made

    def holds(made: Run) -> bool:
        return made.steady and all(verdict.held for verdict in slo.judge(args.slo, made.figures()))

    with tqdm(desc="searching", unit="run", leave=False, disable=None) as bar:
        found = highest_rate(try_rate, holds, guess)
    return found.rate, found.tried


def _document(args: argparse.Namespace, runs: list[Run], tried: list[Run]) -> dict[str, Any]:
    verdicts = slo.judge(args.slo or (), repeats.medians(runs))
    estimates = repeats.figures(runs)
    return {
        "model": args.model,
        "url": args.url,
        "arrival": runs[0].arrival.model_dump(exclude_none=True),
        "seconds": args.duration,
        "texts_per_request": args.texts_per_request,
        "answers": "counted" if args.no_check else "checked",
        "held": all(verdict.held for verdict in verdicts) if verdicts else None,
        "verdicts": [verdict.as_json() for verdict in verdicts],
        "figures": {name: found and found._asdict() for name, found in estimates.items()},
        "steady": all(made.steady for made in runs),
        "warm_up_seconds": max(made.warm_up_seconds for made in runs),
        "load_cpus": _load_cpus(runs),
        "tried": [{"rate": made.arrival.rate, "p99_ms": made.figures()["p99"]} for made in tried],
    }


def _load_cpus(runs: list[Run]) -> float | None:
    """CPUs that the load itself took, on average."""
    seen = [look.cpus[LOAD] for made in runs for look in made.resources]
    return sum(seen) / len(seen) if seen else None


def _write_report(args: argparse.Namespace, runs: list[Run], tried: list[Run]) -> None:
    from load.report_command import read_runs
    from load.report_page import write_page

    previous = read_runs(args.previous) if args.previous is not None else None
    write_page(args.report, runs, args.slo or (), previous, tried)


def _table(document: dict[str, Any]) -> str:
    arrival, found = document["arrival"], document["figures"]
    load = f"{arrival['rate']:,.0f} requests/s" if arrival["kind"] == "open" else f"{arrival['under_way']} under way"
    runs = len(found["requests_per_second"]["each"])
    lines = [
        f"{document['model']} at {document['url']}: {load}, {runs} times {document['seconds']:g} s, "
        f"{document['texts_per_request']} texts a request, answers {document['answers']}",
        _line("answered/s", found["requests_per_second"], 1.0, ""),
        *(_line(f"{name} ms", found[name], 1.0, "") for name in slo.LATENCIES),
        *(_line(name, found[name], 100.0, " %") for name in slo.SHARES),
    ]
    if found[slo.GROWTH] is not None:
        lines.append(_line(slo.GROWTH, found[slo.GROWTH], 100.0, " % of the server's memory"))
    if not document["steady"]:
        lines.append("not steady: latencies changed during a run; above its capacity a server falls behind ever more")
    if document["load_cpus"] is not None:
        lines.append(f"the load itself took {document['load_cpus']:.2f} CPUs")
    for verdict in document["verdicts"]:
        lines.append(f"{'PASS' if verdict['held'] else 'FAIL'}  {verdict['objective']}")
    return "\n".join(lines)


def _line(name: str, found: dict[str, Any] | None, factor: float, unit: str) -> str:
    if found is None:
        return f"{name:>12}  none: nothing was answered"
    each = ", ".join(f"{factor * value:,.2f}" for value in found["each"])
    reach = ""
    if found["interval"] is not None:
        # Nothing that was never below 0 can be, whatever Student says; memory can shrink.
        least = min(0.0, *found["each"])
        low, high = (factor * max(least, value) for value in found["interval"])
        reach = f"  95 % of the mean: {low:,.2f} to {high:,.2f}"
    return f"{name:>12} {factor * found['median']:>10,.2f}{unit}  (runs: {each}){reach}"


def _written(objectives: tuple[slo.Objective, ...]) -> str:
    return ",".join(map(str, objectives))

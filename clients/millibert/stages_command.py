"""Show where the time of a served model's requests goes, stage by stage, on a live server.

Reads Triton's counters twice and shows what happened between: for each model of the ensemble what a request waits in
its queue, takes for input, computes, and takes for output, and how many texts an execution merges. On the machine of
the server, CPU time of each process too. Where its metrics endpoint can be reached: how much of the work is on padding.

examples:
  millibert stages --url grpc://127.0.0.1:8001 --model banking77
  millibert stages --url http://127.0.0.1:8000 --model banking77 --seconds 60 --json
  millibert stages --url grpc://127.0.0.1:8001 --model banking77 --seconds 0      # since the models were loaded

What is in no stage is Triton's own: scheduling, and copies between the stages. The network and the client are outside.

exit status: 0 shown, 1 a call failed or nothing was served meanwhile, 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from millibert._address import parse_address
from millibert._arguments import add_service, open_client
from millibert._client import Client
from millibert._errors import MillibertError, NotFound, ServiceError, UsageError
from millibert._statistics import Counters
from millibert._tokens import TOKEN_KINDS, read_tokens

# Where Triton has its metrics unless told otherwise.
_METRICS_PORT = 8002
_PARTS = ("queue", "input", "compute", "output")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert stages`."""
    add_service(parser)
    parser.add_argument(
        "--seconds",
        type=_not_negative,
        default=10.0,
        metavar="N",
        help="how long to look (default: %(default)g); 0: since the models were loaded",
    )
    parser.add_argument(
        "--metrics-url",
        type=_metrics_url,
        metavar="URL",
        help="for the padding (default: port 8002 of the same host, where that answers)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Look, and print; returns the exit status."""
    _one_server(args)
    with open_client(args) as client:
        steps = client.steps()
        before, cpu_before, tokens_before = _look(args, client) if args.seconds else _NOTHING
        start = time.monotonic()
        _wait(args.seconds)
        after, cpu_after, tokens_after = _look(args, client)
        seconds = time.monotonic() - start
    if args.model not in after:
        raise NotFound("no such model", endpoint=args.url, model=args.model)
    found = {name: after[name] - before.get(name, Counters()) for name in (args.model, *steps) if name in after}
    if not found[args.model].requests:
        raise MillibertError(f"{args.model}: no request was answered in these {args.seconds:g} s; is there load on it?")
    cpu = {name: spent - cpu_before.get(name, 0.0) for name, spent in cpu_after.items()}
    tokens = {kind: count - tokens_before.get(kind, 0.0) for kind, count in tokens_after.items()}
    report = {**_report(args, found, cpu, seconds if args.seconds else None), "padding": padding(tokens)}
    print(json.dumps(report) if args.json else _table(report))
    return 0


class _Look(NamedTuple):
    """What is counted at one moment."""

    counters: dict[str, Counters]
    cpu: dict[str, float]
    tokens: dict[str, float]


_NOTHING = _Look({}, {}, {})


def _one_server(args: argparse.Namespace) -> None:
    """Counters of several servers, asked in turn, would make no sense."""
    try:
        parse_address(args.url)
    except UsageError as error:
        args.wrong_usage(str(error))


def _look(args: argparse.Namespace, client: Client) -> _Look:
    """Triton's counters, and CPU seconds of its processes and tokens where they can be seen."""
    return _Look(client.statistics(), _cpu(args.url), _tokens(args))


def _cpu(url: str) -> dict[str, float]:
    try:
        from millibert_ensemble.cpu_time import cpu_seconds, server_at
    except ModuleNotFoundError:  # psutil comes with the extra 'serve', which a client's machine does not need
        return {}
    address = parse_address(url)
    server = server_at(address.host, address.port)
    return cpu_seconds(server) if server is not None else {}


def _tokens(args: argparse.Namespace) -> dict[str, float]:
    """The engine's counters of tokens; none where nobody asked for them and the usual port does not answer."""
    if args.metrics_url is not None:
        return read_tokens(args.metrics_url, args.timeout)
    host = parse_address(args.url)._replace(scheme="http", port=_METRICS_PORT)
    try:
        return read_tokens(f"{host}/metrics", args.timeout)
    except ServiceError:
        return {}


def padding(tokens: Mapping[str, float]) -> float | None:
    """Share of the tokens that the engine computed on that were no text; None where that is not known."""
    if not all(tokens.get(kind) for kind in TOKEN_KINDS):
        return None
    text, computed = (tokens[kind] for kind in TOKEN_KINDS)
    return 1 - text / computed


def _wait(seconds: float) -> None:
    end, whole = time.monotonic() + seconds, round(seconds)
    with tqdm(total=whole, desc="looking", unit="s", disable=None, leave=False) as bar:
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
            bar.update(min(1, whole - bar.n))


def _report(
    args: argparse.Namespace, found: Mapping[str, Counters], cpu: Mapping[str, float], seconds: float | None
) -> dict[str, Any]:
    whole = found[args.model]
    stages: list[dict[str, Any]] = [
        {
            "model": name,
            **{f"{part}_ms": counters.milliseconds(part) for part in _PARTS},
            "total_ms": counters.milliseconds("total"),
            "executions": counters.executions,
            "texts_per_execution": counters.texts_per_execution,
            "failures": counters.failures,
        }
        for name, counters in found.items()
        if name != args.model
    ]
    return {
        "model": args.model,
        "seconds": seconds,
        "requests": whole.requests,
        "failures": whole.failures,
        "texts": whole.texts,
        "requests_per_second": whole.requests / seconds if seconds else None,
        "texts_per_second": whole.texts / seconds if seconds else None,
        "total_ms": whole.milliseconds("total"),
        "between_stages_ms": whole.milliseconds("total") - sum(stage["total_ms"] for stage in stages),
        "stages": stages,
        "cpu_seconds_per_1000_requests": {name: 1000 * spent / whole.requests for name, spent in cpu.items()},
    }


def _table(report: dict[str, Any]) -> str:
    lines = [_headline(report)]
    if report["stages"]:
        width = max(len(stage["model"]) for stage in report["stages"])
        width = max(width, len("between stages"))
        lines.append(
            f"{'ms a request':<{width}} {'queue':>8} {'input':>8} {'compute':>8} {'output':>8} {'total':>8} "
            f"{'executions':>11} {'texts each':>11}"
        )
        lines += [_row(stage, width) for stage in report["stages"]]
        lines.append(f"{'between stages':<{width}} {'':>8} {'':>8} {'':>8} {'':>8} {report['between_stages_ms']:>8.2f}")
    if report["padding"] is not None:
        lines.append(f"on padding: {report['padding']:.1%} of the tokens computed on")
    cpu = report["cpu_seconds_per_1000_requests"]
    if cpu:
        spent = ", ".join(f"{name} {value:.2f}" for name, value in sorted(cpu.items(), key=lambda item: -item[1]))
        lines.append(f"CPU seconds for 1,000 requests: {spent}")
    return "\n".join(lines)


def _headline(report: dict[str, Any]) -> str:
    rate = ""
    if report["seconds"]:
        rate = (
            f" in {report['seconds']:.1f} s ({report['requests_per_second']:,.0f} requests/s, "
            f"{report['texts_per_second']:,.0f} texts/s)"
        )
    failed = f", {report['failures']:,} failed" if report["failures"] else ""
    return f"{report['model']}: {report['requests']:,} requests{rate}{failed}, {report['total_ms']:.2f} ms each"


def _row(stage: Mapping[str, Any], width: int) -> str:
    parts = " ".join(f"{stage[f'{part}_ms']:>8.2f}" for part in (*_PARTS, "total"))
    return f"{stage['model']:<{width}} {parts} {stage['executions']:>11,} {stage['texts_per_execution']:>11.1f}"


def _metrics_url(text: str) -> str:
    if not text.startswith("http://"):
        raise argparse.ArgumentTypeError(f"expected http://host:port/metrics, not {text}")
    return text


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text}")
    return number

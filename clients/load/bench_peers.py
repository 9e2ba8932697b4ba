r"""The same model, texts and load on what people serve such models with today, and on a release, in one run.

example:
  python -m load.bench_peers --repository banking77_repository --checkpoint .millibert/banking77/checkpoint \
                             --data test.csv --label-column category

Infinity as shipped, a hand-written LitServe service with ONNX Runtime, and a hand-written FastAPI service with
transformers, each in an environment of its own with pinned versions (installed into `.peers/` on first use: 4 GB), all
in fp32; ours as released, and in fp32 too. One server runs at a time. Load comes from our own client, over HTTP for
all, and over gRPC for ours too. Before each is measured it must give the labels that the release gives.

exit status: 0 measured, 1 a server or a request failed, 2 wrong usage
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from load.command import run_command
from load.generator import Load, measure
from load.machine import describe_machine
from load.peers import PEERS, Peer, classify, environments, running
from load.released import add_release
from load.transports import Request, Requests, triton_requests
from load.twins import write_fp32_twin
from millibert import connect
from millibert._arguments import positive_float, positive_int
from millibert._labelled_texts import read_labelled_texts
from millibert_build.fuse import fuse
from millibert_ensemble import contract
from millibert_ensemble.models.bert.threads import cpu_limit
from millibert_ensemble.repository_check import CONFIG, parse_config
from millibert_ensemble.server import TritonServer

# Texts that the labels are compared on.
_COMPARED = 128


class Served(NamedTuple):
    """A server that runs: where requests go, and the labels that it gives to some texts."""

    requests: Mapping[str, Requests]  # by transport
    labels: Sequence[str]


class Contender(NamedTuple):
    """Something to measure."""

    name: str
    configuration: str
    serve: Callable[[Sequence[str]], Any]  # texts -> context manager of `Served`


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_release(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="what the release was made from")
    parser.add_argument("--concurrency", type=positive_int, nargs="+", default=[1, 64], metavar="N")
    parser.add_argument("--seconds", type=positive_float, default=8.0, metavar="N", help="of each run")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="runs of each case")
    parser.add_argument("--peers", choices=[peer.name for peer in PEERS], nargs="*", help="default: all")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    return run_command("load.bench_peers", __doc__, configure, run, table, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every contender in turn, several rounds of it; ours first, whose labels the others are held against."""
    texts = [row.text for row in read_labelled_texts(args.data, args.text_column, args.label_column)]
    chosen = [peer for peer in PEERS if args.peers is None or peer.name in args.peers]
    pythons = {peer.name: environments.ensure(peer) for peer in chosen}
    rows: dict[tuple[str, str, int], list[Any]] = {}
    labels: dict[str, Sequence[str]] = {}
    with tempfile.TemporaryDirectory(prefix="millibert-peers-") as folder:
        contenders = [
            *_ours(args, Path(folder)),
            *(_peer(peer, pythons[peer.name], args.checkpoint) for peer in chosen),
        ]
        for _ in tqdm(range(args.rounds), desc="rounds", disable=None, leave=False):
            for contender in contenders:
                with contender.serve(texts) as served:
                    labels.setdefault(contender.name, served.labels)
                    for transport, requests in served.requests.items():
                        for concurrency in args.concurrency:
                            one = measure(Load(requests, seconds=args.seconds, concurrency=concurrency), 1)
                            rows.setdefault((contender.name, transport, concurrency), []).append(one)
    first = labels[contenders[0].name]
    same = {name: sum(a == b for a, b in zip(first, own, strict=True)) / len(first) for name, own in labels.items()}
    return {
        **describe_machine(),
        "texts": len(texts),
        "rounds": args.rounds,
        "contenders": {
            each.name: {"configuration": each.configuration, "same": same[each.name]} for each in contenders
        },
        "cases": [_case(key, runs) for key, runs in rows.items()],
    }


def _case(key: tuple[str, str, int], runs: Sequence[Any]) -> dict[str, Any]:
    name, transport, concurrency = key
    return {
        "name": name,
        "transport": transport,
        "concurrency": concurrency,
        "requests_per_second": statistics.median(one.texts_per_second for one in runs),
        "p50_ms": statistics.median(one.p50_ms for one in runs),
        "p99_ms": statistics.median(one.p99_ms for one in runs),
    }


def _ours(args: argparse.Namespace, folder: Path) -> Iterator[Contender]:
    precision = parse_config(args.repository / contract.BERT / CONFIG).parameters["precision"].string_value
    fused, fp32 = folder / "fused", folder / "fp32"
    fuse(args.repository, fused)
    write_fp32_twin(args.repository, args.checkpoint, fp32)
    yield Contender(
        "millibert", f"the release, {precision}, as an ensemble", lambda texts: _triton(args.repository, texts)
    )
    yield Contender("millibert, fused", f"the release, {precision}, fused", lambda texts: _triton(fused, texts))
    yield Contender("millibert, fp32", "the same model in fp32, as an ensemble", lambda texts: _triton(fp32, texts))


@contextmanager
def _triton(repository: Path, texts: Sequence[str]) -> Iterator[Served]:
    with TritonServer(repository) as server:
        model = server.services[0]
        urls = {"http": server.http_url, "grpc": server.grpc_url}
        with connect(server.grpc_url, model) as client:
            answers = [client.classify(text, top_k=1) for text in texts[:_COMPARED]]
        requests = {transport: triton_requests(url, model, texts) for transport, url in urls.items()}
        yield Served(requests, [answer.label for answer in answers])


def _peer(peer: Peer, python: Path, checkpoint: Path) -> Contender:
    @contextmanager
    def serve(texts: Sequence[str]) -> Iterator[Served]:
        with running(peer, python, checkpoint, cpu_limit()) as url:
            headers = {"Content-Type": "application/json"}
            requests = Requests(url, peer.path, [Request(peer.body([text]), headers) for text in texts])
            yield Served({"http": requests}, [classify(peer, url, [text])[0] for text in texts[:_COMPARED]])

    return Contender(peer.name, peer.configuration, serve)


def table(found: dict[str, Any]) -> str:
    """Every contender, and what the first is to each of them."""
    lines = [
        f"{found['cpus']} CPUs ({found['cpu']}), {found['texts']} texts, one a request; medians of {found['rounds']} "
        "runs; load from our own client on the same machine",
        f"{'':<18} {'':>4} {'under way':>10} {'requests/s':>11} {'p50 ms':>9} {'p99 ms':>9} {'same label':>11}",
    ]
    for case in found["cases"]:
        same = found["contenders"][case["name"]]["same"]
        head = f"{case['name']:<18} {case['transport']:>4} {case['concurrency']:>10}"
        figures = f"{case['requests_per_second']:>11,.0f} {case['p50_ms']:>9.2f} {case['p99_ms']:>9.2f}"
        lines.append(f"{head} {figures} {same:>11.1%}")
    lines += [f"{name}: {about['configuration']}" for name, about in found["contenders"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

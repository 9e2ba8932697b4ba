"""What our clients cost: a call against one written by hand with tritonclient, many texts against perf_analyzer.

One server, one run; the two that are compared take turns, so that what else happens on the machine hits both.

- One text at a time, nothing else under way: the median of a call of each of our four clients, less that of a call by
  hand over the same connection form, which fills an `InferInput`, calls `infer` and reads all outputs as arrays.
- `classify_many`: its texts per second against perf_analyzer's, with requests of the same size and as many under way.

examples:
  python -m load.bench_clients --repository banking77_repository --data test.csv --label-column category
  python -m load.bench_clients --repository banking77_repository --data test.csv --calls 0 --texts 100000

perf_analyzer: `python -m load.install_perf_analyzer`. Without it the second part is left out.

exit status: 0 measured, 1 a call failed, 2 wrong usage
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import millibert
from load.command import run_command
from load.machine import describe_machine
from load.released import add_release, serve, served_by
from millibert import MillibertError
from millibert import _perf_analyzer as perf_analyzer
from millibert._arguments import positive_int
from millibert._labelled_texts import read_labelled_texts
from millibert_ensemble.contract import RESPONSE_TENSORS, TEXT
from millibert_ensemble.engine_choice import add_engine

Call = Callable[[str], object]
FORMS = ("grpc", "http", "grpc-aio", "http-aio")
_WARM_UP = 50


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_release(parser)
    add_engine(parser)
    parser.add_argument("--calls", type=int, default=1500, metavar="N", help="of each kind (default: %(default)s)")
    parser.add_argument(
        "--texts", type=int, default=20_000, metavar="N", help="for classify_many (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="of these (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--concurrency", type=positive_int, default=8, metavar="N", help="default: %(default)s")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    return run_command("load.bench_clients", __doc__, configure, run, table, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve the release and measure both parts."""
    texts = [row.text for row in read_labelled_texts(args.data, args.text_column, args.label_column)]
    found: dict[str, Any] = {**describe_machine(), "overhead": {}, "many": {}}
    with serve(args) as server:
        found["engine"] = served_by(server)
        urls = {"grpc": server.grpc_url, "http": server.http_url}
        for form in FORMS if args.calls else ():
            found["overhead"][form] = overhead(
                form, urls[form.removesuffix("-aio")], server.services[0], texts, args.calls
            )
        if args.texts and perf_analyzer.is_here():
            found["many"] = many(server.grpc_url, server.services[0], texts, args)
    return found


# One text at a time


def overhead(form: str, url: str, model: str, texts: Sequence[str], calls: int) -> dict[str, float]:
    """Milliseconds: medians of our calls and of those by hand, in turn, and their difference."""
    spent: dict[str, list[float]] = {"ours": [], "by_hand": []}
    with ours(form, url, model) as our_call, by_hand(form, url, model) as hand_call:
        kinds: dict[str, Call] = {"ours": our_call, "by_hand": hand_call}
        for number, text in enumerate(tqdm([*texts[:_WARM_UP], *itertools.islice(itertools.cycle(texts), calls)],
                                           desc=form, unit=" calls", disable=None, leave=False)):  # fmt: skip
            for name in sorted(kinds, reverse=bool(number % 2)):  # neither is always the first
                start = time.perf_counter()
                kinds[name](text)
                if number >= _WARM_UP:
                    spent[name].append(time.perf_counter() - start)
    medians = {name: 1000 * statistics.median(values) for name, values in spent.items()}
    return {**medians, "difference": medians["ours"] - medians["by_hand"]}


@contextmanager
def ours(form: str, url: str, model: str) -> Iterator[Call]:
    """A call of one of our clients."""
    if not form.endswith("-aio"):
        with millibert.connect(url, model) as client:
            yield client.classify
        return
    with asyncio.Runner() as runner:
        asynchronous = millibert.connect_async(url, model)
        yield lambda text: runner.run(asynchronous.classify(text))
        runner.run(asynchronous.close())


@contextmanager
def by_hand(form: str, url: str, model: str) -> Iterator[Call]:
    """The same call as somebody would write it with tritonclient alone."""
    module = _tritonclient(form)
    netloc = url.partition("://")[2]

    def inputs(text: str) -> list[Any]:
        tensor = module.InferInput(TEXT.name, [1, 1], TEXT.datatype)
        tensor.set_data_from_numpy(np.array([[text.encode()]], np.object_))
        return [tensor]

    def read(result: Any) -> list[Any]:
        return [result.as_numpy(tensor.name) for tensor in RESPONSE_TENSORS]

    if not form.endswith("-aio"):
        client = module.InferenceServerClient(netloc)
        yield lambda text: read(client.infer(model, inputs(text)))
        client.close()
        return
    with asyncio.Runner() as runner:

        async def infer(text: str) -> list[Any]:
            return read(await asynchronous.infer(model, inputs(text)))

        async def make() -> Any:
            return module.InferenceServerClient(netloc)

        asynchronous = runner.run(make())
        yield lambda text: runner.run(infer(text))
        runner.run(asynchronous.close())


def _tritonclient(form: str) -> Any:
    if form == "grpc":
        from tritonclient import grpc

        return grpc
    if form == "http":
        from tritonclient import http

        return http
    if form == "grpc-aio":
        import tritonclient.grpc.aio as grpc_aio

        return grpc_aio
    import tritonclient.http.aio as http_aio

    return http_aio


# Many texts


def many(url: str, model: str, texts: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Texts a second of perf_analyzer and of `classify_many`, by threads and by asyncio, in turn; medians, ratios."""
    rates: dict[str, list[float]] = {"perf_analyzer": [], "threads": [], "asyncio": []}
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory()), "texts.json")
        perf_analyzer.write_texts(data, texts)
        for _ in tqdm(range(args.rounds), desc="rounds", disable=None, leave=False):
            measured = perf_analyzer.measure(url, model, data, args.batch_size, args.concurrency)
            if measured is not None:
                rates["perf_analyzer"].append(measured.texts_per_second)
            rates["threads"].append(_rate(url, model, texts, args))
            rates["asyncio"].append(asyncio.run(_rate_async(url, model, texts, args)))
    if not rates["perf_analyzer"]:
        raise MillibertError("perf_analyzer's figures did not become steady; is something else running here?")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {name: medians[name] / medians["perf_analyzer"] for name in ("threads", "asyncio")}
    facts = {"texts": args.texts, "batch_size": args.batch_size, "concurrency": args.concurrency}
    return {**facts, "texts_per_second": medians, "ratio": ratios, "runs": rates}


def _rate(url: str, model: str, texts: Sequence[str], args: argparse.Namespace) -> float:
    source = itertools.islice(itertools.cycle(texts), args.texts)
    with millibert.connect(url, model) as client:
        start = time.perf_counter()
        answered = client.classify_many(source, batch_size=args.batch_size, concurrency=args.concurrency)
        right = sum(isinstance(answer, millibert.Classification) for answer in answered)
        seconds = time.perf_counter() - start
    return _checked(right, args.texts) / seconds


async def _rate_async(url: str, model: str, texts: Sequence[str], args: argparse.Namespace) -> float:
    source = itertools.islice(itertools.cycle(texts), args.texts)
    right = 0
    async with millibert.connect_async(url, model) as client:
        start = time.perf_counter()
        async for answer in client.classify_many(source, batch_size=args.batch_size, concurrency=args.concurrency):
            right += isinstance(answer, millibert.Classification)
        seconds = time.perf_counter() - start
    return _checked(right, args.texts) / seconds


def _checked(answered: int, asked: int) -> int:
    if answered != asked:
        raise MillibertError(f"{asked - answered:,} of {asked:,} texts were not answered")
    return answered


def table(found: dict[str, Any]) -> str:
    """Both parts for people."""
    lines = [f"{found['cpu']}, {found['cpus']} CPUs, shared by server and clients"]
    if found["overhead"]:
        lines.append(f"{'one text, ms':<14} {'ours':>8} {'by hand':>8} {'more':>8}")
        lines += [
            f"{form:<14} {each['ours']:>8.3f} {each['by_hand']:>8.3f} {each['difference']:>+8.3f}"
            for form, each in found["overhead"].items()
        ]
    if many := found["many"]:
        shape = f"{many['batch_size']} texts a request, {many['concurrency']} under way"
        lines.append(f"{many['texts']:,} texts, {shape}: texts/s")
        lines += [f"  {name:<14} {rate:>8,.0f}" for name, rate in many["texts_per_second"].items()]
        lines += [f"  classify_many by {name}: {ratio:.3f} of perf_analyzer" for name, ratio in many["ratio"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

r"""Packed against padded on a CUDA GPU, in PyTorch: for machines that have a GPU and no TensorRT.

examples:
  millibert bench-gpu --checkpoint .millibert/banking77/checkpoint --data test.csv --text-column text
  millibert bench-gpu --checkpoint .millibert/banking77/checkpoint --data test.csv --precision bf16 --json

Runs the very modules that are exported to ONNX, with the same weights, on batches of the texts in file order: launched
one kernel after the other, and replayed from CUDA graphs, which is what a small batch needs. Times are those of CUDA
events around a batch whose inputs lie on the GPU already. Before anything is timed, both layouts must give the same
answers as fp32.

--device cpu checks the script itself; nothing is graphed then.

exit status: 0 measured, 1 no GPU or wrong answers, 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from millibert._errors import MillibertError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIZES = (1, 8, 32, 128)
# Enough for a median, few enough for one graph each.
BATCHES = 16
_WARM_UPS = 3
# Share of texts that must get the label of fp32.
MIN_AGREEMENT = 0.99

Step = Callable[[], "Tensor"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert bench-gpu`."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a fine-tuned checkpoint")
    parser.add_argument("--data", required=True, metavar="FILE", help="texts, labelled or not")
    parser.add_argument("--text-column", default="text", metavar="NAME")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--batch", type=int, nargs="+", default=list(SIZES), metavar="N", help="texts of a batch")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times that each batch is run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch sees no CUDA GPU here; run this on a GPU node, with a CUDA build of PyTorch")
    from millibert_build.bench_batches import batches_of, read_ids

    ids = read_ids(args.checkpoint, args.data, args.text_column, args.max_tokens)
    with torch.device(args.device), torch.inference_mode():
        layouts = _layouts(args)
        agreement = _agreement(args, layouts, batches_of(ids, 32)[:BATCHES])
        rows = [_measure(args, layouts, batches_of(ids, size)[:BATCHES]) for size in args.batch]
    report = {**_machine(args.device), "precision": args.precision, **agreement, "results": rows}
    print(json.dumps(report) if args.json else _table(report))
    return 0


class _Layout:
    """A module on the device, and how a batch becomes its inputs."""

    def __init__(self, module: Any, arrange: Callable[[Any], Any], device: str) -> None:
        self._module = module.to(device)
        self._arrange = arrange
        self._device = device

    def step(self, batch: Sequence[Sequence[int]]) -> Step:
        """A function that runs this batch; its inputs are on the device already."""
        import torch

        inputs = [torch.as_tensor(array, device=self._device) for array in self._arrange(batch).values()]
        return lambda: self._module(*inputs)


def _layouts(args: argparse.Namespace) -> dict[str, _Layout]:
    """Both layouts in the wanted precision, and the padded one in fp32 as the reference."""
    import torch

    from millibert_build.checkpoint import load_model
    from millibert_build.layouts import packed, padded
    from millibert_build.packed_bert import PackedBert, PaddedBert

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.precision]
    with torch.device("cpu"):
        made = {
            "reference": (PaddedBert(load_model(args.checkpoint), args.max_tokens), padded),
            "padded": (PaddedBert(load_model(args.checkpoint), args.max_tokens, dtype), padded),
            "packed": (PackedBert(load_model(args.checkpoint), args.max_tokens, dtype), packed),
        }
    return {name: _Layout(module.eval(), arrange, args.device) for name, (module, arrange) in made.items()}


def _agreement(args: argparse.Namespace, layouts: dict[str, _Layout], batches: Sequence[Any]) -> dict[str, float]:
    """Largest difference of a logit between the layouts, and how often each gives fp32's label; raises if rarely."""
    import torch

    logits = {name: torch.cat([layout.step(batch)() for batch in batches]) for name, layout in layouts.items()}
    found = {"max_logit_difference": float((logits["packed"] - logits["padded"]).abs().max())}
    for name in ("packed", "padded"):
        share = float((logits[name].argmax(1) == logits["reference"].argmax(1)).float().mean())
        found[f"{name}_agreement"] = share
        if not share >= MIN_AGREEMENT:
            raise MillibertError(
                f"{name} {args.precision} gives fp32's label to {share:.2%} of {len(logits[name])} texts only "
                f"(at least {MIN_AGREEMENT:.0%} wanted); nothing was timed"
            )
    return found


def _measure(args: argparse.Namespace, layouts: dict[str, _Layout], batches: Sequence[Any]) -> dict[str, Any]:
    """Milliseconds a batch and texts per second of each layout, in turns: medians of the rounds, over all batches."""
    steps: dict[tuple[str, str], list[Step]] = {}
    for how in _ways(args.device):
        for name in ("padded", "packed"):
            several = [layouts[name].step(batch) for batch in batches]
            steps[name, how] = [_captured(step) for step in several] if how == "graphs" else several
    rounds: dict[tuple[str, str], list[list[float]]] = {key: [] for key in steps}
    for _ in tqdm(range(_WARM_UPS + args.rounds), desc=f"batch {len(batches[0])}", disable=None, leave=False):
        for key, several in steps.items():
            rounds[key].append([_seconds(step, args.device) for step in several])
    row: dict[str, Any] = {"batch": len(batches[0])}
    for (name, how), times in rounds.items():
        medians = [statistics.median(of_batch) for of_batch in zip(*times[_WARM_UPS:], strict=True)]
        row[f"{name}_{how}_ms"] = 1000 * statistics.median(medians)
        row[f"{name}_{how}_texts_per_second"] = sum(map(len, batches)) / sum(medians)
    return row


def _ways(device: str) -> tuple[str, ...]:
    return ("eager", "graphs") if device == "cuda" else ("eager",)


def _captured(step: Step) -> Step:
    """The same step as a CUDA graph: its launches are recorded once and replayed."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):  # capturing forbids what the first calls do: allocate, choose algorithms
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


def _seconds(step: Step, device: str) -> float:
    import torch

    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    step()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000


def _machine(device: str) -> dict[str, str]:
    import torch

    from millibert_build.release import cpu_name

    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda or "none"}


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['device']}, PyTorch {report['torch']} (CUDA {report['cuda']}), {report['precision']}",
        f"largest difference of a logit between the layouts {report['max_logit_difference']:.1e}; fp32's label: packed "
        f"{report['packed_agreement']:.2%}, padded {report['padded_agreement']:.2%} of the texts",
        f"{'batch':>5} {'launched':>9} {'padded ms':>10} {'packed ms':>10} {'padded texts/s':>15} "
        f"{'packed texts/s':>15} {'ratio':>6}",
    ]
    for row in report["results"]:
        for how in ("eager", "graphs"):
            if f"padded_{how}_ms" not in row:
                continue
            speeds = [row[f"{name}_{how}_texts_per_second"] for name in ("padded", "packed")]
            lines.append(
                f"{row['batch']:>5} {how:>9} {row[f'padded_{how}_ms']:>10.3f} {row[f'packed_{how}_ms']:>10.3f} "
                f"{speeds[0]:>15,.0f} {speeds[1]:>15,.0f} {speeds[1] / speeds[0]:>6.2f}"
            )
    return "\n".join(lines)

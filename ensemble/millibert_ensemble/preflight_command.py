"""Say whether this machine can serve a model repository, before a server tries to; for people and initContainers.

examples:
  millibert preflight --repository model_repository
  millibert preflight --repository /models/banking77-2 --json
  millibert preflight --repository /models/banking77-2 --plans /plans --wait 1800 --out /repository/current

Checks the repository (files against their hashes, configs, tensors along the ensemble, labels) and, where the release
has a TensorRT graph, its plan against this machine's TensorRT and GPUs. --plans looks for the plan in a store too
(`millibert engine --plans`), and takes the best that fits; --wait gives a build that is under way the time to put it
there.

--out makes a model repository of the release and that plan, out of links, for `millibert serve`; with the CPU engine
alone where no plan fits and the release lets the CPU engine serve instead (serving.cpu_fallback of its scenario). An
older one is replaced in one step, and stays where none can be made.

exit status: 0 usable, 1 the repository is broken, 2 wrong usage, 3 the plan must be built again (the command is
printed; the CPU engine works meanwhile, unless the release does not let it), 4 no plan can run here, the CPU engine can
(same); with --out, 0 whenever the model repository has been made
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from millibert_ensemble import plan_store
from millibert_ensemble.assemble import assemble, check_replaceable
from millibert_ensemble.machine import Machine, this_machine
from millibert_ensemble.preflight import STATUS, Verdict, preflight

_POLL_SECONDS = 5.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert preflight`."""
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--plans", type=Path, metavar="DIR", help="a store of plans, from `millibert engine --plans`")
    parser.add_argument(
        "--wait",
        type=int,
        default=0,
        metavar="SECONDS",
        help="with --plans: how long to wait for a plan of this machine's GPU (default: not at all)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="make a model repository of release and plan there")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parser.set_defaults(wrong_usage=parser.error)


def run(args: argparse.Namespace) -> int:
    """Judge, make the repository, and print; returns the exit status."""
    if args.wait and args.plans is None:
        args.wrong_usage("--wait is for a plan in a store; give --plans")
    if args.out is not None:
        check_replaceable(args.repository, args.out)
    verdict = _judge(args.repository, args.plans, args.wait)
    made = args.out is not None and verdict.engine is not None
    if made:
        assemble(args.repository, verdict.plan_folder, args.out)
    status = 0 if made else STATUS[verdict.answer]
    if args.json:
        document = {**verdict.as_json(), "exit_status": status, "repository": str(args.out) if made else None}
        print(json.dumps(document, ensure_ascii=False))
    else:
        print(describe(verdict))
        if made:
            print(f"made {args.out}; serve it with: millibert serve --repository {args.out}")
    return status


def _judge(repository: Path, plans: Path | None, seconds: int) -> Verdict:
    """Judge; while a better plan can come and time is left, judge again whenever the store has changed."""
    machine = this_machine()
    if plans is None or not seconds:
        return preflight(repository, machine, plans)
    deadline = time.monotonic() + seconds
    seen = plan_store.state(plans)
    verdict = preflight(repository, machine, plans)
    with _ending_at_sigterm():
        if _waits(verdict):
            print(f"waiting up to {seconds} s for a plan of this GPU in {plans}", file=sys.stderr, flush=True)
        while _waits(verdict) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            if (found := plan_store.state(plans)) != seen:
                seen = found
                verdict = preflight(repository, machine, plans)
    return verdict


def _waits(verdict: Verdict) -> bool:
    """Whether a plan is missing, or there is only one that was tuned on another GPU and not meant for this one."""
    plan = verdict.plan
    if verdict.engine != "tensorrt" or plan is None:
        return verdict.answer == "rebuild"
    here = {gpu.name for gpu in verdict.machine.gpus}
    return plan.hardware_compatibility == "none" and plan.gpu.name not in here


@contextlib.contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """As the first process of a container, which this is in a Pod, it would not: the kernel keeps the signal away."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def describe(verdict: Verdict) -> str:
    """The verdict for people."""
    running = {"tensorrt": ": the TensorRT plan", "cpu": ": the CPU engine", None: ": no engine"}[verdict.engine]
    lines = [
        f"{verdict.answer}{running if verdict.answer != 'broken' else ''}",
        f"machine: {_machine(verdict.machine)}",
    ]
    lines += [f"- {reason}" for reason in verdict.reasons]
    lines += [f"note: {remark}" for remark in verdict.remarks]
    if verdict.plan_folder:
        lines.append(f"plan: {verdict.plan_folder}")
    if verdict.command:
        lines.append(f"build the plan on this machine: {verdict.command}")
    if verdict.options:
        lines.append(f"serve it with: tritonserver {' '.join(verdict.options)} … (`millibert serve` does)")
    return "\n".join(lines)


def _machine(machine: Machine) -> str:
    gpus = ", ".join(f"{gpu.name} (compute capability {gpu.compute_capability})" for gpu in machine.gpus)
    return f"{gpus or 'no GPU'}, {f'TensorRT {machine.tensorrt}' if machine.tensorrt else 'no TensorRT'}"

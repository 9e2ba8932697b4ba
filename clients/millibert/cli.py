"""The console command `millibert`: one sub-command per job, each imported only when it is called.

A sub-command is a module with `configure(parser)`, which adds its arguments, and `run(args)`, which does the
job and returns the exit status: 0 done, 1 the job failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from millibert._errors import MillibertError


class Command(NamedTuple):
    """Where a sub-command lives, what it is for, and the extra that brings its dependencies."""

    module: str
    summary: str
    extra: str | None


# In the order of the flow.
COMMANDS = {
    "build": Command("millibert_build.build_command", "labelled text to a Triton model repository", "build"),
    "tune": Command("millibert_build.tune_command", "the fastest of several ways to prune and quantise", "build"),
    "fuse": Command("millibert_build.fuse_command", "a release as one model, for nodes without a GPU", "build"),
    "engine": Command("millibert_build.engine_command", "the TensorRT plan of a release, on its GPU node", "engine"),
    "preflight": Command("millibert_ensemble.preflight_command", "whether this machine can serve a repository", None),
    "verify-gpu": Command(
        "millibert_build.verify_command", "build, check and measure the plan on a GPU node", "engine"
    ),
    "bench-engine": Command(
        "millibert_build.bench_engine", "rows that texts share against padding, in process", "build"
    ),
    "bench-gpu": Command("millibert_build.bench_gpu", "packed against padded on a CUDA GPU, in PyTorch", "build"),
    "serve": Command("millibert_ensemble.serve_command", "run Triton on a model repository", "serve"),
    "classify": Command("millibert.classify_command", "labels and scores of texts, from a server", None),
    "status": Command("millibert.status_command", "whether servers and models are up, ready and well", None),
    "stages": Command("millibert.stages_command", "where a served model's time goes, on a live server", None),
    "load": Command("load.load_command", "load on a served model, and whether it keeps its objectives", "load"),
    "perf": Command("load.perf_command", "a served model, or one of its stages, measured with perf_analyzer", "load"),
    "tune-serving": Command("load.tune_serving", "instances, threads and batches with the highest rate", "build"),
    "load-report": Command("load.report_command", "one page about runs under load, and their regressions", "load"),
    "evaluate": Command("millibert.evaluate_command", "accuracy measured through a server", None),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `millibert ARGV`; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        return _without_command(arguments)
    try:
        module = importlib.import_module(COMMANDS[name].module)
        parser = argparse.ArgumentParser(
            prog=f"millibert {name}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(parser)
        return int(module.run(parser.parse_args(arguments[1:])))
    except ModuleNotFoundError as error:
        return _missing_module(name, error)
    except MillibertError as error:
        print(f"millibert {name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output (head, less) has gone. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _without_command(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="millibert",
        description="BERT text classifiers in milliseconds on NVIDIA Triton.",
        epilog="`millibert COMMAND --help` shows a command's options and examples.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary)
    parser.parse_args(arguments or ["--help"])
    return 2


def _version() -> str:
    from importlib.metadata import version

    return f"millibert {version('millibert')}"


def _missing_module(name: str, error: ModuleNotFoundError) -> int:
    extra = COMMANDS[name].extra
    ours = (error.name or "").startswith("millibert")
    if ours or extra is None:
        raise error
    print(
        f"millibert {name}: the module {error.name!r} is not installed; "
        f"this command needs the extra {extra!r}: pip install 'millibert[{extra}]'",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""Make a release's fused form: tokenizer, CPU engine and postprocessor as one model, for nodes without a GPU.

example:
  millibert fuse --repository banking77_repository --out banking77_fused
  millibert serve --repository banking77_fused
  millibert fuse --repository banking77_repository --instances 2 --out banking77_fused     # more a second, more memory

Same name, same contract, same answers; `serve`, `preflight`, `stages` and every client work as before. What it brings
is measured by `python -m load` (forms `fused` and `fused2`); docs/performance.md has figures. A request may have twice
as many texts. The ensemble stays as it is.

An instance computes nothing while Triton takes its answers and brings it new requests. With two, which share the CPUs,
one does so while the other computes: more large requests a second. But each holds an engine in memory, and texts that
come one at a time go to both in turn, which is slower.

exit status: 0 made, 1 failed (the reason is on stderr), 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from millibert._arguments import positive_int
from millibert_build.fuse import describe, fuse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert fuse`."""
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR", help="the release")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model repository to make")
    parser.add_argument(
        "--instances", type=positive_int, metavar="N", help="of the model (default: as the release has engines)"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest")


def run(args: argparse.Namespace) -> int:
    """Fuse and print; returns the exit status."""
    manifest = fuse(args.repository, args.out, args.instances)
    print(json.dumps(manifest, ensure_ascii=False) if args.json else describe(manifest, args.out))
    return 0

"""What the commands of this package have in common: arguments are read, something is measured and printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from millibert._errors import MillibertError

Found = dict[str, Any]


def run_command(
    name: str,
    documentation: str | None,
    configure: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], Found],
    table: Callable[[Found], str],
    argv: list[str] | None,
    passed: Callable[[Found], bool] = lambda found: True,
) -> int:
    """Run `python -m NAME ARGV`; returns the exit status.

    That is 0, or 1 where what was found has not `passed` or a `MillibertError` kept it from being found; wrong usage
    ends with 2. Prints a table, or with `--json` one JSON document.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    configure(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    try:
        found = run(args)
    except MillibertError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found) if args.json else table(found))
    return 0 if passed(found) else 1

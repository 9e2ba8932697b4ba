"""Serve a release and classify through it, over gRPC and HTTP, as an application would.

`make demo` runs this after the build. Everything is real: the Triton server, both protocols, the answers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import millibert

TEXTS = (
    "my parcel was supposed to be here on tuesday, where is it??",
    "Paid twice for one pair of boots, PayPal shows both.",
    "I sent the lamp back two weeks ago and still have no money",
    "do u have the green jacket in size M",
)


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    repository = parser.parse_args().repository
    with served(repository) as ready:
        model = ready["models"][0]
        print(f"\nTriton serves {model!r} at {ready['grpc']} and {ready['http']}")
        answers = {url: classify(url, model) for url in (ready["grpc"], ready["http"])}
    first, second = answers.values()
    if [a.label for a in first] != [a.label for a in second]:
        print("gRPC and HTTP disagree", file=sys.stderr)
        return 1
    print(f"\nServer stopped. Serve it yourself: .venv/bin/millibert serve --repository {repository}")
    return 0


def classify(url: str, model: str) -> tuple[millibert.Classification, ...]:
    """Print and return the answers of one endpoint."""
    print(f"\nmillibert.connect({url!r}, {model!r}).classify(texts)")
    with millibert.connect(url, model) as client:
        answers = client.classify(TEXTS)
    for answer in answers:
        print(f"  {answer.text}")
        print("      " + "   ".join(f"{p.label} {p.score:.3f}" for p in answer.predictions))
    return answers


@contextmanager
def served(repository: Path) -> Iterator[dict]:  # type: ignore[type-arg]
    """Run `millibert serve` on free ports; yields what its ready line says."""
    ports = [f"--{use}-port=0" for use in ("http", "grpc", "metrics")]
    command = [sys.executable, "-m", "millibert.cli", "serve", "--repository", str(repository), "--json", *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            if not line:
                raise SystemExit(server.wait())
            yield json.loads(line)
        finally:
            server.terminate()
    if server.returncode:
        raise SystemExit(f"the server ended with status {server.returncode}")


if __name__ == "__main__":
    sys.exit(main())

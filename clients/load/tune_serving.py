r"""Find how a release is best served on this machine: the settings with the highest rate that keeps an SLO.

examples:
  millibert tune-serving --repository model_repository --texts test.csv --slo "p99<50ms,errors<0.1%" --out tuned
  millibert tune-serving --repository model_repository --slo "p99<20ms" --seconds 10 --repeats 5 --out tuned --json

Tries instances of the engine, threads of each, texts that an execution merges, and the delay of a batch that is not
full: one after another on a real server, from the release's own settings on, keeping what is better. For each the
highest rate that keeps the SLO is searched (open loop, random arrivals). In the end the best and the release's own
settings are run in turns; the best is published only if it is better by more than the two differ among themselves,
else the release stays as it is, and that is an answer too.

Every trial is kept in --work; a run that was interrupted goes on after the last one. Run it on a machine of the kind
that will serve, with nothing else on it.

exit status: 0 tried (and published, where something was better), 1 a call failed or no settings keep the SLO, 2 wrong
usage
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

import millibert
from load import slo
from load.machine import describe_machine
from load.results import Run
from load.runs import Target, run_closed, run_open
from load.search import highest_rate
from load.serving_settings import Settings, alternatives, read_settings, write_variant
from load.texts import read_source
from millibert._arguments import positive_float, positive_int
from millibert._errors import MillibertError, UsageError
from millibert_build.publish import RELEASE_FILE, check_replaceable, replacing
from millibert_build.release import as_json
from millibert_build.repository import hash_files
from millibert_ensemble.hashing import file_sha256
from millibert_ensemble.models.bert.threads import cpu_limit
from millibert_ensemble.server import TritonServer

_GUESS_UNDER_WAY, _GUESS_SECONDS, _GUESS_SHARE = 16, 2.0, 0.5


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert tune-serving`."""
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the tuned release goes")
    parser.add_argument("--slo", type=slo.slo_argument, required=True, metavar="SLO", help='"p99<25ms,errors<0.1%%"')
    parser.add_argument(
        "--texts", default="synthetic:lognormal:mean=15,sigma=0.6", metavar="SOURCE", help="as of `millibert load`"
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--seconds", type=positive_float, default=4.0, metavar="N", help="of each run")
    parser.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="of the last comparison")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keeps the trials (default: .millibert/tune-serving beside here)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def run(args: argparse.Namespace) -> int:
    """Try, compare, publish, print; returns the exit status."""
    release = _release(args.repository)
    check_replaceable(args.out)
    trials = _Trials(args, release)
    own = read_settings(args.repository, cpu_limit())
    best = _climb(trials, own, int(release["max_texts"]))
    if trials.rate(best) is None:
        raise MillibertError(f"no settings keep {','.join(map(str, args.slo))} on this machine at any rate")
    comparison = trials.compare(own, best) if best != own else None
    better = comparison is not None and comparison["better"]
    document = {
        **describe_machine(),
        "model": release["name"],
        "slo": [str(objective) for objective in args.slo],
        "own": own._asdict(),
        "best": best._asdict(),
        "trials": trials.done,
        "comparison": comparison,
        "published": str(args.out) if better else None,
    }
    if better:
        _publish(args.repository, best, args.out, document)
    print(json.dumps(document) if args.json else _table(document))
    return 0


def _release(repository: Path) -> dict[str, Any]:
    path = repository / RELEASE_FILE
    if not path.is_file():
        raise UsageError(f"{repository} is no release: it has no {RELEASE_FILE}; make one with `millibert build`")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _climb(trials: _Trials, own: Settings, least_batch: int) -> Settings:
    """Take each alternative that is better; those that come after differ from it in one respect."""
    best = own
    tried = {own}
    planned = len(set(alternatives(own, cpu_limit(), least_batch)) | {own})
    with tqdm(total=planned, desc="settings", leave=False, disable=None) as bar:
        trials.rate(own)
        bar.update()
        for knob in range(len(list(alternatives(own, cpu_limit(), least_batch)))):
            candidate = list(alternatives(best, cpu_limit(), least_batch))[knob]
            if candidate in tried:
                continue
            tried.add(candidate)
            if (trials.rate(candidate) or 0.0) > (trials.rate(best) or 0.0):
                best = candidate
            bar.update()
    return best


class _Trials:
    """Measures settings, and remembers what it has measured in a file with a line for each."""

    def __init__(self, args: argparse.Namespace, release: dict[str, Any]) -> None:
        self._args = args
        self._texts = read_source(args.texts, args.text_column).each
        work = args.work or Path(".millibert", "tune-serving")
        work.mkdir(parents=True, exist_ok=True)
        self._file = work / "trials.jsonl"
        # A trial counts again only for the same question.
        self._question = {
            "release": file_sha256(args.repository / RELEASE_FILE),
            "slo": ",".join(map(str, args.slo)),
            "texts": args.texts,
            "seconds": args.seconds,
            **describe_machine(),
        }
        self.done: list[dict[str, Any]] = [trial for trial in self._kept() if trial["question"] == self._question]

    def rate(self, settings: Settings) -> float | None:
        """The highest rate that keeps the SLO with these settings, measured once; None: none does."""
        for trial in self.done:
            if trial["settings"] == settings._asdict():
                kept: float | None = trial["rate"]
                return kept
        with self._served(settings) as target:
            closed = run_closed(target, _GUESS_UNDER_WAY, _GUESS_SECONDS)
            found = highest_rate(
                lambda rate: run_open(target, rate, self._args.seconds, poisson=True),
                self._holds,
                max(1.0, _GUESS_SHARE * closed.requests_per_second),
            )
        points = [
            {"rate": made.arrival.rate, "p99_ms": made.figures()["p99"], "errors": made.figures()["errors"]}
            for made in found.tried
        ]
        trial = {"question": self._question, "settings": settings._asdict(), "rate": found.rate, "runs": points}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trial) + "\n")
        self.done.append(trial)
        return found.rate

    def compare(self, own: Settings, best: Settings) -> dict[str, Any]:
        """Run both in turns at the best one's rate, both servers up."""
        rate = self.rate(best) or 0.0
        p99: dict[Settings, list[float]] = {own: [], best: []}
        with self._served(own) as one, self._served(best) as other:
            for number in range(self._args.repeats):
                for settings, target in ((own, one), (best, other)):
                    made = run_open(target, rate, self._args.seconds, poisson=True, seed=number)
                    p99[settings].append(made.figures()["p99"] or float("inf"))
        mine, its = (statistics.median(p99[settings]) for settings in (own, best))
        spread = max(max(each) - min(each) for each in p99.values())
        return {
            "rate": rate,
            "own_p99_ms": p99[own],
            "best_p99_ms": p99[best],
            "better": its < mine and mine - its > spread / 2,
        }

    def _holds(self, made: Run) -> bool:
        return made.steady and all(verdict.held for verdict in slo.judge(self._args.slo, made.figures()))

    def _kept(self) -> Iterator[dict[str, Any]]:
        if not self._file.exists():
            return
        for line in self._file.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed while writing it
                continue

    @contextmanager
    def _served(self, settings: Settings) -> Iterator[Target]:
        # Beside the release: hard links do not reach into another file system.
        with tempfile.TemporaryDirectory(prefix=".tune-", dir=self._args.repository.resolve().parent) as folder:
            variant = Path(folder, "repository")
            write_variant(self._args.repository, settings, variant, cpu_limit())
            with (
                TritonServer(variant) as server,
                millibert.connect(server.grpc_url, server.services[0]) as client,
            ):
                yield Target(client, server.grpc_url, self._texts, None)


def _publish(repository: Path, settings: Settings, out: Path, evidence: dict[str, Any]) -> None:
    with replacing(out) as staging, tempfile.TemporaryDirectory(dir=repository.resolve().parent) as folder:
        write_variant(repository, settings, variant := Path(folder, "repository"), cpu_limit())
        shutil.copytree(variant, staging, dirs_exist_ok=True)
        manifest = _release(repository)
        (staging / RELEASE_FILE).unlink()
        manifest["serving"] = {"settings": settings._asdict(), "evidence": evidence}
        manifest["files"] = dict(hash_files(staging))
        (staging / RELEASE_FILE).write_text(as_json(manifest), encoding="utf-8")


def _table(document: dict[str, Any]) -> str:
    own, best = Settings(**document["own"]), Settings(**document["best"])
    lines = [f"{document['model']}, {document['cpus']} CPUs ({document['cpu']}), SLO {','.join(document['slo'])}"]
    for trial in sorted(document["trials"], key=lambda trial: -(trial["rate"] or 0.0)):
        rate = "no rate" if trial["rate"] is None else f"{trial['rate']:,.0f}/s"
        settings = Settings(**trial["settings"])
        note = " (the release's own)" if settings == own else ""
        lines.append(f"{rate:>12}  {settings}{note}")
    if document["comparison"] is None:
        lines.append("the release's own settings are the best that were tried; nothing was published")
        return "\n".join(lines)
    found = document["comparison"]
    own_p99, best_p99 = _each(found["own_p99_ms"]), _each(found["best_p99_ms"])
    lines.append(f"in turns at {found['rate']:,.0f}/s, p99 ms: own {own_p99}; best {best_p99}")
    published = f"published in {document['published']}: {best}"
    lines.append(published if document["published"] else "no more than the noise; nothing was published")
    return "\n".join(lines)


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)

"""A release as one model instead of four: the same service, files and answers, with less work around the engine.

An ensemble passes each request through three processes; here one process does all three steps. It is for CPU nodes:
there a third of a request's CPU time goes into passing it on. A GPU's plan needs the ensemble.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from millibert._errors import UsageError
from millibert_build.publish import RELEASE_FILE, check_replaceable, replacing
from millibert_build.release import as_json
from millibert_build.repository import FUSED, MODELS, check_config, hash_files, load_config
from millibert_ensemble import contract
from millibert_ensemble.repository_check import CONFIG, FUSED_WIRING, WIRING, check_repository, parse_config

# Triton's side of each model, and what tells the one in front how far the engine is: nobody is in front here.
_LEFT_OUT = ("model.py", "admission.py", "progress.py")


def fuse(repository: Path, out: Path, instances: int | None = None) -> dict[str, Any]:
    """Publish the fused form of `repository` at `out` in one step; returns its manifest.

    `instances` share the CPUs; as many as the release has engines unless it says how many.

    Raises `UsageError` where the repository is broken or fused already; `out` is then as it was.
    """
    check = check_repository(repository)
    if check.problems:
        raise UsageError(f"{repository} cannot be fused: {'; '.join(check.problems)}")
    if check.manifest.get(WIRING) == FUSED_WIRING:
        raise UsageError(f"{repository} is fused already")
    if out.resolve() == repository.resolve():
        raise UsageError(f"{out}: the release itself; give another --out, or serving the ensemble needs a new build")
    check_replaceable(out)
    name = str(check.manifest["name"])
    with replacing(out) as staging:
        version = staging / name / contract.VERSION
        version.mkdir(parents=True)
        for model in contract.COMPOSING_MODELS:
            for path in sorted((repository / model / contract.VERSION).iterdir()):
                if path.is_file() and path.name not in _LEFT_OUT and ".plan" not in path.suffixes:
                    shutil.copyfile(path, version / path.name)
        for path in sorted((MODELS / FUSED).glob("*.py")):
            shutil.copyfile(path, version / path.name)
        config = _config(repository, name, instances)
        (staging / name / CONFIG).write_text(text_format.MessageToString(config, as_utf8=True), encoding="utf-8")
        manifest = {**check.manifest, WIRING: FUSED_WIRING}
        manifest.pop("tensorrt", None)
        manifest["files"] = dict(hash_files(staging))
        (staging / RELEASE_FILE).write_text(as_json(manifest), encoding="utf-8")
    return manifest


def _config(repository: Path, name: str, instances: int | None) -> Any:
    """The template with the limits, queues and parameters that the four models have."""
    config = load_config(FUSED)
    bert = parse_config(repository / contract.BERT / CONFIG)
    config.name = name
    config.dynamic_batching.CopyFrom(bert.dynamic_batching)
    config.instance_group[0].count = instances or bert.instance_group[0].count
    for model in (name, *contract.COMPOSING_MODELS):
        for key, value in parse_config(repository / model / CONFIG).parameters.items():
            config.parameters[key].string_value = value.string_value
    # As many texts as an execution of the engine merges: more than a request to the ensemble may have.
    config.parameters[contract.MAX_TEXTS_PARAMETER].string_value = str(bert.max_batch_size)
    if instances is not None and "threads" in config.parameters:
        config.parameters["threads"].string_value = "0"  # it was for another number of instances
    check_config(config, FUSED)
    return config


def describe(manifest: dict[str, Any], out: Path) -> str:
    """What was made, in a line."""
    return f"fused {json.dumps(manifest['name'])} in {out}; serve it with: millibert serve --repository {out}"

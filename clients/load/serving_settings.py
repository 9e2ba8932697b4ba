"""How a release is served, as far as it can be tuned without building anew: what its engine's config says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import text_format

from millibert_ensemble import contract
from millibert_ensemble.models.bert.threads import share_of
from millibert_ensemble.repository_check import CONFIG, parse_config

_MERGED = contract.MAX_TEXTS_PARAMETER  # of a fused model, whose executions take more


class Settings(NamedTuple):
    """Of the CPU engine's model."""

    instances: int
    threads: int
    """Of each instance."""
    batch: int
    """Texts that one execution merges at most."""
    queue_delay_us: int
    """How long a batch that is not full waits for more."""

    def __str__(self) -> str:
        return (
            f"{self.instances} x {self.threads} threads, {self.batch} texts, {self.queue_delay_us / 1000:g} ms of delay"
        )


def engine_model(repository: Path) -> str:
    """The model that holds the engine: `bert`, or the only one of a fused release."""
    if (repository / contract.BERT).is_dir():
        return contract.BERT
    (config,) = repository.glob(f"*/{CONFIG}")
    return config.parent.name


def read_settings(repository: Path, cpus: int) -> Settings:
    """Those that a release has; `cpus` is what the engine uses where its config leaves that open."""
    config = parse_config(repository / engine_model(repository) / CONFIG)
    threads = config.parameters["threads"].string_value if "threads" in config.parameters else "0"
    instances = config.instance_group[0].count
    return Settings(
        instances=instances,
        threads=int(threads) or share_of(cpus, instances),
        batch=int(config.parameters[_MERGED].string_value) if _MERGED in config.parameters else config.max_batch_size,
        queue_delay_us=config.dynamic_batching.max_queue_delay_microseconds,
    )


def alternatives(now: Settings, cpus: int, least_batch: int) -> Iterator[Settings]:
    """What differs from these in one respect and makes sense on so many CPUs.

    `least_batch`: a request may hold so many texts, and has to fit.
    """
    for instances in (1, 2):
        # Together no more threads than there are CPUs; and one fewer, which leaves one to Triton itself.
        share = share_of(cpus, instances)
        for threads in sorted({share, max(1, share - 1)}, reverse=True):
            yield now._replace(instances=instances, threads=threads)
    for batch in (least_batch, 2 * least_batch, 4 * least_batch):
        yield now._replace(batch=batch)
    for delay in (0, 500, 2000):
        yield now._replace(queue_delay_us=delay)


def write_variant(repository: Path, settings: Settings, out: Path, cpus: int) -> None:
    """A copy of a release, of hard links, with these settings, found on a machine of so many CPUs."""
    shutil.copytree(repository, out, copy_function=os.link)
    path = out / engine_model(repository) / CONFIG
    config = changed(parse_config(path), settings, cpus)
    path.unlink()
    path.write_text(text_format.MessageToString(config, as_utf8=True), encoding="utf-8")


def changed(config: Any, settings: Settings, cpus: int) -> Any:
    """The config of the engine's model with these settings.

    Threads that are the instance's share of the CPUs are left open: on another machine its share is another one, and a
    text alone then has all CPUs.
    """
    config.instance_group[0].count = settings.instances
    config.parameters["threads"].string_value = str(settings.threads)
    if settings.threads == share_of(cpus, settings.instances):
        del config.parameters["threads"]
    if _MERGED in config.parameters:
        config.parameters[_MERGED].string_value = str(settings.batch)
    else:
        config.max_batch_size = settings.batch
    config.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay_us
    return config

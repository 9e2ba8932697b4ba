"""Servers for `millibert status` to look at, and what it says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from millibert import cli
from millibert_ensemble.server import TritonServer

SCHEMES = ("grpc", "http")


@contextmanager
def served(repository: Path, *options: str) -> Iterator[TritonServer]:
    """A Triton with options of its own, live but perhaps never ready."""
    server = TritonServer(repository, options=options)
    server.start()
    try:
        yield server
    finally:
        server.close()


def url_of(server: Any, scheme: str) -> str:
    return str(getattr(server, f"{scheme}_url"))


def status(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["status", *arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code, out = status(capsys, *arguments, "--json")
    return code, json.loads(out)

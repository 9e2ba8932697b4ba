"""`millibert classify` in processes of their own, and what they write."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.conftest import RunningServer

NOWHERE = ("--url", "grpc://127.0.0.1:1", "--model", "echo")
COMMAND = [sys.executable, "-m", "millibert.cli", "classify"]
SECONDS = 30
SLOW = [f"sleep 0.2 {number}" for number in range(20)]
ONE_BY_ONE = ("--batch-size", "1", "--concurrency", "1")


def classify(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=60, input=stdin)


def text_file(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def documents(lines: bytes | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


def texts_in(path: Path) -> list[str]:
    return [document["text"] for document in documents(path.read_bytes())]


def partial_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def wait_for_lines(path: Path, count: int) -> None:
    """Until the file has as many lines."""
    end = time.monotonic() + SECONDS
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def service_of(server: RunningServer, protocol: str = "grpc") -> list[str]:
    return ["--url", server.grpc_url if protocol == "grpc" else server.http_url, "--model", "echo"]

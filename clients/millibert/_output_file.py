"""A file of answers that is written aside, can be gone on with after an interruption, and gets its name at the end."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from millibert._errors import UsageError

SUFFIX = ".jsonl"
PARTIAL_SUFFIX = ".partial"


def as_line(document: dict[str, Any]) -> str:
    """One line of JSON Lines, without its end; ASCII, because a text may hold what UTF-8 cannot."""
    return json.dumps(document)


class OutputFile:
    """JSON Lines, one per text, in `PATH.partial` until `complete` gives them their name. A context manager.

    Every line is handed to the system as it is written: a process that is killed loses none but the last. What cannot
    be read or written raises `UsageError`.
    """

    def __init__(self, path: Path, *, restart: bool, force: bool) -> None:
        """`restart`: forget what a `.partial` holds. `force`: `complete` may replace a file of that name."""
        if path.suffix.lower() != SUFFIX:
            raise UsageError(f"{path}: JSON Lines are written; give a name that ends in {SUFFIX}")
        if path.exists() and not force:
            raise UsageError(f"{path}: exists already; give another name, or --force to replace it")
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self.lines = 0
        """Complete ones."""
        self.errors = 0
        """Those among them that say why a text has no answer."""
        with self._writing():
            # Appending also creates it, and leaves what is there until the lock is ours.
            self._file: BinaryIO = self.partial.open("a+b")
        self._lock()
        if restart:
            self._cut(0)

    def resume(self, texts: Iterator[str]) -> None:
        """Go on after the lines that are there, which must be the answers to the first of the texts, in order.

        Takes those texts. Drops a last line that is incomplete.
        """
        end = 0
        with self._writing():
            self._file.seek(0)
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                document, text = self._parsed(line), next(texts, None)
                if text is None or document.get("text") != text:
                    raise self._refused("is not the answer to the text at this place of the input")
                self._count(document)
                end += len(line)
        self._cut(end)

    def write(self, document: dict[str, Any]) -> None:
        """Append a line."""
        with self._writing():
            self._file.write(f"{as_line(document)}\n".encode())
            self._file.flush()
        self._count(document)

    def complete(self) -> None:
        """Give the file its name; from then on it outlasts a loss of power too."""
        with self._writing():
            os.fsync(self._file.fileno())
            self.partial.replace(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._size():
            self.partial.unlink(missing_ok=True)
        # After a failed write, to close would fail on the same bytes again.
        with suppress(OSError):
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UsageError(f"{self.partial}: another run is writing it; wait for its end") from error
        except OSError:
            # A file system without locks.
            return

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _cut(self, end: int) -> None:
        with self._writing():
            self._file.truncate(end)

    def _count(self, document: dict[str, Any]) -> None:
        self.lines += 1
        self.errors += "error" in document

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            document = json.loads(line)
        except ValueError as error:
            raise self._refused("is not JSON") from error
        if not isinstance(document, dict):
            raise self._refused("is no JSON object")
        return document

    def _refused(self, reason: str) -> UsageError:
        return UsageError(
            f"{self.partial}:{self.lines + 1}: {reason}; the file belongs to another input: give that one, or "
            "--restart to begin anew"
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(f"{self.partial}: cannot be written: {error.strerror}") from error

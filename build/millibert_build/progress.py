"""What a build tells the person in front of it, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Numbered stages, each with what it found and how long it took."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._number = 0
        self._note = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run one stage; its line is printed when it is done, or says that it failed."""
        self._number += 1
        self._note = ""
        head = f"[{self._number}/{self._total}] {name:<9}"
        if sys.stderr.isatty():
            self._print(f"{head}…", end="\r")
        start = time.monotonic()
        try:
            yield
        except BaseException:
            self._print(f"{head}failed after {time.monotonic() - start:.1f} s")
            raise
        self._print(f"{head}{self._note} ({time.monotonic() - start:.1f} s)")

    def note(self, text: str) -> None:
        """What the running stage found."""
        self._note = text

    def warn(self, text: str) -> None:
        """Something the user should know and that does not stop the build."""
        self._print(f"warning: {text}")

    def _print(self, text: str, end: str = "\n") -> None:
        print(text, file=sys.stderr, end=end, flush=True)

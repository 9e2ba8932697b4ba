"""Lets a process fork between gRPC calls, and not amid them.

gRPC prepares itself for a fork only where no other thread is inside it; forked at another moment, a child that calls
gRPC hangs or crashes. So a fork waits for the calls under way to end, and new ones wait for the fork. Where that does
not help, the child is told instead of left hanging.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType

from millibert._errors import UsageError

# A fork does not wait longer than this for slow calls; gRPC is then lost to the child.
_LONGEST_WAIT_SECONDS = 2.0


class ForkGate:
    """To be entered (`with`) around each call. Safe to share between threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._forking = False
        self._asyncio = False
        self._lost = False
        os.register_at_fork(before=self._close, after_in_parent=self._open_again, after_in_child=self._open_in_child)

    def check(self, *, asyncio: bool = False) -> None:
        """Before a channel is opened: raises `UsageError` in a process whose gRPC did not survive its fork.

        With `asyncio` gRPC has a thread of its own that never leaves it, so that no child of this process can use it.
        """
        if self._lost:
            raise UsageError(
                "gRPC cannot be used in this process: it was forked from one that uses gRPC with asyncio, or was amid "
                "long calls; use http:// here, or start the process by 'spawn' or 'forkserver'"
            )
        self._asyncio = self._asyncio or asyncio

    def __enter__(self) -> None:
        with self._changed:
            while self._forking:
                self._changed.wait()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._inside -= 1
            if self._forking:
                self._changed.notify_all()

    def _close(self) -> None:
        with self._changed:
            self._forking = True
            self._changed.wait_for(lambda: self._inside == 0, _LONGEST_WAIT_SECONDS)

    def _open_in_child(self) -> None:
        self._lost = self._lost or self._asyncio or self._inside > 0
        self._changed = threading.Condition()
        self._inside = 0
        self._forking = False

    def _open_again(self) -> None:
        with self._changed:
            self._forking = False
            self._changed.notify_all()


FORK_GATE = ForkGate()
"""Of this process."""

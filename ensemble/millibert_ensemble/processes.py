"""Processes that must not outlive their purpose, on Linux.

A stub is the process in which Triton's Python backend runs one instance of a model. Triton does not look
after its stubs: one that dies stays dead, and they outlive a server that is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

STUB = "triton_python_backend_stub"
# From <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# The kernel keeps this many characters of a process's name.
_NAME_LENGTH = 15
# SIGKILL is not refused, but a process in the middle of a system call may take a moment.
_KILL_SECONDS = 5.0

# Loaded once, here: between fork and exec is no place to open libraries.
_libc = ctypes.CDLL(None, use_errno=True)


class Stub(NamedTuple):
    """A stub process and the model that it runs."""

    pid: int
    model: str


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies, so that it can reap them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def dies_with(parent: int) -> Callable[[], None]:
    """Return a `preexec_fn`: the child is killed when the *thread* of `parent` that started it ends.

    SIGKILL and not SIGTERM: nobody would be left to end a child whose drain hangs.
    """

    def between_fork_and_exec() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)

    return between_fork_and_exec


def stubs(server: int) -> list[Stub]:
    """Return the stubs of the tritonserver with that pid, dead ones that nobody has reaped among them."""
    try:
        children = psutil.Process(server).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [Stub(child.pid, _model(child)) for child in children if _is_stub(child)]


def carrying(mark: str) -> list[psutil.Process]:
    """Return the processes with an argument that starts with `mark` or is `…=mark`, and their descendants."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or ()
        if any(argument.startswith(mark) or argument.endswith(f"={mark}") for argument in arguments):
            found += [process, *_descendants(process)]
    return list(dict.fromkeys(found))


def kill(processes: Iterable[psutil.Process]) -> None:
    """End processes at once and wait until none of them runs; whose children they are may yet reap them."""
    doomed = list(processes)
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + _KILL_SECONDS
    for process in doomed:
        _await_end(process.pid, max(0.0, deadline - time.monotonic()))


def reap() -> None:
    """Let the kernel forget the dead children of this process, adopted ones among them."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _await_end(pid: int, seconds: float) -> None:
    # A pidfd and not psutil's wait: that one waits until a stranger's child is reaped, too.
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll(seconds * 1000)
    finally:
        os.close(descriptor)


def _is_stub(process: psutil.Process) -> bool:
    # The name and not the command line: a dead one has no command line left.
    try:
        return process.name()[:_NAME_LENGTH] == STUB[:_NAME_LENGTH]
    except psutil.NoSuchProcess:
        return False


def _model(stub: psutil.Process) -> str:
    """Return the model's name: a stub's first argument is REPOSITORY/MODEL/VERSION/model.py."""
    try:
        return Path(stub.cmdline()[1]).parent.parent.name
    except (psutil.Error, IndexError):
        return "unknown"


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []

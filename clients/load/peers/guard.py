"""Leads the process group of a server and takes all of it down in the end. Run as a script: guard.py COMMAND ...

Standard input is a pipe that nobody writes to: it ends with the guard's owner, even by SIGKILL. Servers start processes
of their own, and those outlive a server that is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

# What a server may take to end by itself, so that it removes what it left in shared memory.
GRACE_SECONDS = 5.0


def main() -> int:
    """Run the command; returns its exit status if it ends by itself, and does not return if the owner ends first."""
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    ended = os.pidfd_open(server.pid)
    readable, _, _ = select.select([sys.stdin, ended], [], [])
    if ended in readable:
        return server.wait()
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(GRACE_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # its processes, and this one
    return 0  # not reached


if __name__ == "__main__":
    sys.exit(main())

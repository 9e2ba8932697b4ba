"""Stays beside a server's owner and sweeps up when the owner is killed. Run with -m, not imported.

Standard input is a pipe that nobody writes to: it ends with the owner, even by SIGKILL. The one argument
is the workspace's name.
"""

from __future__ import annotations

import sys

from millibert_ensemble import workspace

if __name__ == "__main__":
    sys.stdin.read()
    workspace.sweep_after(sys.argv[1])

"""A virtual environment for each peer, made on first use and again when its requirements change.

The peers' packages exclude each other, and ours. An environment is whole when its marker is there, which is written
last and holds a hash of the requirements and of the Python version.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

from load.peers.peer import Peer
from millibert._errors import MillibertError

ENVIRONMENTS = Path(__file__).parents[3] / ".peers"
_MARKER = "installed"
# pip says what is wrong at its end.
_LINES = 15


def ensure(peer: Peer, environments: Path = ENVIRONMENTS) -> Path:
    """Return the Python of the peer's environment, which is installed first where it is missing or out of date.

    Takes minutes and 1 to 2 GB then. Raises MillibertError with the end of pip's output when pip fails.
    """
    folder = environments / peer.name
    if not is_ready(peer, environments):
        print(f"installing {peer.name} into {folder} …", file=sys.stderr)
        environments.mkdir(parents=True, exist_ok=True)
        (environments / ".gitignore").write_text("*\n")
        venv.create(folder, clear=True, with_pip=True)
        _install(folder, peer)
        (folder / _MARKER).write_text(_fingerprint(peer))
    return python_of(peer, environments)


def is_ready(peer: Peer, environments: Path = ENVIRONMENTS) -> bool:
    """Whether the peer's environment is there, whole and up to date."""
    marker = environments / peer.name / _MARKER
    return marker.is_file() and marker.read_text() == _fingerprint(peer)


def python_of(peer: Peer, environments: Path = ENVIRONMENTS) -> Path:
    """The Python of the peer's environment; the link itself, since what it links to knows of no environment."""
    return (environments / peer.name / "bin" / "python").absolute()


def _install(folder: Path, peer: Peer) -> None:
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    command = [*pip, "--requirement", str(peer.requirements)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        end = "\n".join(done.stdout.splitlines()[-_LINES:])
        raise MillibertError(f"pip could not install {peer.requirements.name} into {folder}:\n{end}")


def _fingerprint(peer: Peer) -> str:
    version = "{}.{}".format(*sys.version_info)
    return hashlib.sha256(peer.requirements.read_bytes() + version.encode()).hexdigest()

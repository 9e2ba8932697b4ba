"""Other ways to serve the same checkpoint, to measure against, each in an environment of its own.

with running(peer, environments.ensure(peer), checkpoint, threads) as url:
    labels = classify(peer, url, texts)
"""

from load.peers.peer import PEERS, Peer
from load.peers.running import classify, running

__all__ = ["PEERS", "Peer", "classify", "running"]

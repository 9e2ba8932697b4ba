"""How long requests have waited, where Triton does not say when they came; without Triton.

An execution takes all that waits. So what is in it came since the one before began, one after another: the oldest has
waited for as long as that took, the youngest not at all, and the others are taken to have come evenly in between.
"""

from __future__ import annotations

# After an execution Triton hands its answers over, and takes the requests that wait, in so many seconds at most, and in
# so many more for each request (docs/log.md has 75 to 170 us). What comes later than that found nothing under way.
_HANDOVER, _HANDOVER_OF_A_REQUEST = 0.005, 0.0003


class Arrivals:
    """The times at which the requests of an execution came, from when executions began and ended.

    Several instances may take from the same queue: that what is left was not there before holds for each of them. An
    execution of `full` texts may have left some behind; then no time passes for those after it, so that they count as
    older than they are rather than younger, until an execution has taken all that waits again.
    """

    def __init__(self, full: int, now: float) -> None:
        self._full, self._since, self._over = full, now, now

    def begin(self, requests: int, texts: int, now: float) -> list[float]:
        """When each of so many requests came, in their order; all in seconds of one clock, that of `now`."""
        since = now if now > self._over else self._since
        self._since = now if texts < self._full else since
        return [since + (now - since) * (place + 0.5) / requests for place in range(requests)]

    def end(self, requests: int, now: float) -> None:
        """An execution of so many requests is done, but for handing over the answers."""
        self._over = now + _HANDOVER + requests * _HANDOVER_OF_A_REQUEST

"""How long a call of a reward may take before it is given up."""

from __future__ import annotations

from collections import deque

FACTOR, FLOOR_S, CEILING_S = 5.0, 1.0, 10.0
_ENOUGH, _REMEMBERED = 16, 1000


class CallLimit:
    """`timeout_s` where it is given; else learned: FACTOR times the slowest of the last calls that gave a value, but
    no less than FLOOR_S, and no more than CEILING_S, which also holds until enough calls are known. Where more than
    FACTOR calls run at once it is so many times the slowest: what they ask may serve them one after the other.

    So a reward of milliseconds that hangs costs a second, and one that takes seconds gets its time. What a process
    takes for its first calls, in which it may import or load something, counts for the first calls of others alone.
    """

    def __init__(self, timeout_s: float | None = None, concurrency: int = 1) -> None:
        self.ceiling_s = timeout_s or CEILING_S
        """No call takes longer."""
        self.is_fixed = timeout_s is not None
        self._factor = max(FACTOR, concurrency)
        self._later: deque[float] = deque(maxlen=_REMEMBERED)
        self._first: deque[float] = deque(maxlen=_REMEMBERED)

    def seconds(self, is_first: bool) -> float:
        """The limit of a call; ``is_first``: its process has finished none yet."""
        if self.is_fixed or len(self._first) + len(self._later) < _ENOUGH:
            return self.ceiling_s
        known = [*self._first, *self._later] if is_first or len(self._later) < _ENOUGH else self._later
        return min(max(self._factor * max(known), FLOOR_S), self.ceiling_s)

    def learn(self, seconds: float, is_first: bool) -> None:
        """A call gave a value after so many seconds, given up by then or not."""
        (self._first if is_first else self._later).append(seconds)

    def describe(self, seconds: float) -> str:
        """``seconds``, a limit that ``seconds()`` gave, with where it comes from."""
        if self.is_fixed:
            return f"{seconds:.3g} s"
        source = "the default" if seconds == self.ceiling_s else "a limit learned from its other calls"
        return f"{seconds:.3g} s, {source} (timeout_s sets one)"

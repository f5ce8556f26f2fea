"""Whose turn it is, so that shares hold at every moment: counted, not drawn.

After n turns a source with the share s has had s n of them to within 1 - 1 / (2k - 2), with k sources: the algorithm of
R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980), which no other can better. So in n turns
of which every source's share is a whole number, each has had exactly that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


class Turns:
    """An endless order of sources by their shares. What is to be saved is ``counts``."""

    def __init__(self, shares: Sequence[Fraction]) -> None:
        """``shares`` are exact, and their sum is 1."""
        assert sum(shares) == 1
        self._shares = list(shares)
        self.counts = [0] * len(shares)
        """The turns that each has had."""

    def __next__(self) -> int:
        """The number of the source whose turn it is."""
        number = self._next() if len(self._shares) > 1 else 0
        self.counts[number] += 1
        return number

    def _next(self) -> int:
        turn = sum(self.counts) + 1
        slack = Fraction(1, 2 * len(self._shares) - 2)
        owed = [share * turn - count for share, count in zip(self._shares, self.counts, strict=True)]
        waiting = [number for number, own in enumerate(owed) if own >= slack]
        # The turn by which it must have had one, or it would be owed more than 1 - slack.
        return min(waiting, key=lambda number: (math.ceil((1 - slack - owed[number]) / self._shares[number]), number))

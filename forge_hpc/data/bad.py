"""Examples that nothing can be made of: left out and counted, as long as they are exceptions."""

from __future__ import annotations

import logging

from forge_hpc.config.errors import UserError

logger = logging.getLogger(__name__)
FIRST = 100
"""More than half of so many examples may not be bad."""


class BadExample(UserError):
    """An example that is not what ``data`` says it is, or has nothing to learn; the message begins with its place."""


class BadExamples:
    """The bad examples of one source."""

    def __init__(self) -> None:
        self.num_seen = 0
        """All examples that were looked at, good and bad."""
        self.num_bad = 0
        self.last: BadExample | None = None

    def count(self, error: BadExample | None = None) -> None:
        """One more example; ``error`` says what is bad about it. The first one is logged.

        Raises:
            UserError: more than half of the first 100 are bad, or would be if the rest were good.
        """
        self.num_seen += 1
        if error is None:
            return
        self.num_bad, self.last = self.num_bad + 1, error
        if self.num_bad == 1:
            logger.warning("%s: the example is left out; further ones are only counted", error.message)
        if self.num_seen <= FIRST and self.num_bad > FIRST // 2:
            raise UserError(
                f"{self.num_bad} of the first {self.num_seen} examples are bad: {error.message}", error.hint
            )

    def state_dict(self) -> list[int]:
        """JSON can hold it."""
        return [self.num_seen, self.num_bad]

    def load_state_dict(self, state: list[int]) -> None:
        """Go on from a saved state."""
        self.num_seen, self.num_bad = state

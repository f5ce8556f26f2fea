"""What is raised where a reward could not be computed."""

from __future__ import annotations


class RewardError(Exception):
    """A reward gave no finite number for an episode, which is counted by ``kind`` and left out."""

    KINDS = ("raised", "not_finite", "timeout", "died", "memory", "load", "empty", "environment", "logprobs")
    """``raised`` an exception, ``not_finite`` (NaN or infinity), ``timeout``, ``died`` (its process ended), ``memory``
    (MemoryError), ``load`` (a process of it could not be started), ``empty`` (a completion without a token),
    ``environment`` (that of the episode failed), ``logprobs`` (of the generator that are not finite)."""

    def __init__(self, message: str, kind: str = "raised") -> None:
        assert kind in self.KINDS, kind
        super().__init__(message)
        self.kind = kind

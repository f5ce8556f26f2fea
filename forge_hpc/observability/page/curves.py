"""What is drawn of every run: the figures by their keys in ``metrics.jsonl``, which are TensorBoard's tags."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from forge_hpc.observability.tables import rewards_of_sources


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture of one or more figures over steps."""

    title: str
    keys: tuple[str, ...]
    unit: str = ""

    def label(self, key: str) -> str:
        """What the curve is called in it: a source's by the source's name."""
        return next(iter(rewards_of_sources([key])), key)

    @property
    def caption(self) -> str:
        key = f": {self.keys[0]}" if len(self.keys) == 1 else ""
        return f"{self.title}{key}{f' ({self.unit})' if self.unit else ''}"


PANELS = (
    Panel("Reward", ("reward/mean",)),
    Panel("Loss", ("loss",)),
    Panel("KL to the reference", ("kl/mean",), "nats"),
    Panel("Entropy", ("entropy/mean",), "nats"),
    Panel("Mismatch of generator and trainer", ("mismatch/logprob_abs_mean",), "nats"),
    Panel("Staleness", ("staleness/mean", "staleness/max"), "steps"),
    Panel("Throughput of a GPU", ("perf/tokens_per_s",), "tokens/s"),
    Panel("Length of a response", ("response/length_mean", "response/length_max"), "tokens"),
    Panel("Norm of the gradient", ("grad_norm",)),
)
"""docs/metrics.md has the same table, and a test compares them."""

MOST_LINES = 8
"""Of a picture: so many colours there are."""

TRAINER_PARTS = {
    "train": ("time/train_s",),
    "wait for rollouts": ("time/wait_generator_s",),
    "save": ("time/checkpoint_s",),
    "sleep and wake": ("time/sleep_s", "time/wake_s"),
}
"""Parts of a step of the trainers; what is left of it are weights and all else."""
GENERATOR_PARTS = {"generate": ("time/generate_s",), "wait for trainers": ("time/wait_trainer_s",)}


def panels_of_sources(keys: Iterable[str]) -> list[Panel]:
    """The reward of each source of a run with these figures; none where it has no sources of its own."""
    rewards = list(rewards_of_sources(keys).values())
    return [
        Panel("Reward of each source", tuple(rewards[begin : begin + MOST_LINES]))
        for begin in range(0, len(rewards), MOST_LINES)
    ]

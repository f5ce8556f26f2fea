"""The figures of a step's rollouts."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from forge_hpc.data.types import Completion, Group
from forge_hpc.rewards import RewardError
from forge_hpc.rollouts.groups import has_signal, unequal_openings


def measure(groups: Sequence[Group], step: int) -> dict[str, float]:
    """The figures of a step's rollouts, over all completions before any filtering: of all, and with several sources of
    those of each, as ``source/NAME/KEY``."""
    figures = _measure(groups, step)
    for name in sorted({group.prompt.source for group in groups} - {""}):
        own = [group for group in groups if group.prompt.source == name]
        if any(group.episodes for group in own):
            measured = _measure(own, step)
        else:
            failed = float(sum(group.num_failed for group in own))
            measured = {"groups/drawn": float(len(own)), "episodes/failed": failed}
        figures |= {f"source/{name}/{key}": value for key, value in measured.items()}
    return figures


def _measure(groups: Sequence[Group], step: int) -> dict[str, float]:
    episodes = [episode for group in groups for episode in group.episodes]
    failures = [failure for group in groups for failure in group.failures]
    if not episodes:
        cause = failures[-1][1] if failures else "older than rollout.max_staleness allows"
        raise RuntimeError(f"all completions of step {step} failed, at last with: {cause}")
    kinds = Counter(kind for kind, _ in failures)
    rewards = np.array([episode.reward for episode in episodes])
    lengths = np.array([episode.num_sampled for episode in episodes])
    staleness = np.array([step - 1 - episode.policy_version for episode in episodes])
    terms: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for name, value in episode.rewards.items():
            terms[name].append(value)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        **{f"reward/{name}": float(np.mean(values)) for name, values in terms.items()},
        **_measure_turns(groups),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated_fraction": _truncated_fraction([episode.completion for episode in episodes]),
        "groups/drawn": float(len(groups)),
        "groups/zero_signal": float(sum(not has_signal(group) for group in groups)),
        "episodes/failed": float(sum(group.num_failed for group in groups)),
        **{f"rewards/failed_{kind}": float(kinds[kind]) for kind in RewardError.KINDS},
        "staleness/max": float(staleness.max()),
        "staleness/mean": float(staleness.mean()),
        "tokens/generated": float(lengths.sum()),
    }


def _truncated_fraction(completions: Sequence[Completion]) -> float:
    """The share of responses that a limit cut off; an episode has one a turn."""
    cut_off = sum(c.metadata.get("truncated_turns", c.finish_reason == "length") for c in completions)
    return cut_off / sum(c.metadata.get("turns", 1) for c in completions)


def _measure_turns(groups: Sequence[Group]) -> dict[str, float]:
    """Of episodes with an environment: responses of one, the share that a limit ended and not the environment (or after
    a last response that a limit cut off), and the groups that were not one task."""
    completions = [episode.completion for group in groups for episode in group.episodes]
    turns = [completion.metadata["turns"] for completion in completions if "turns" in completion.metadata]
    if not turns:
        return {}
    branches = [completion.metadata["branches"] for completion in completions if "branches" in completion.metadata]
    return {
        **({"episode/branches_mean": float(np.mean(branches))} if branches else {}),
        "episode/turns_mean": float(np.mean(turns)),
        "episode/truncated_fraction": float(np.mean([c.finish_reason != "stop" for c in completions])),
        "groups/unequal_openings": float(sum(unequal_openings(group) is not None for group in groups)),
    }


class RolloutClock:
    """How long the rollouts of a step take, and how long the generators had nothing to do before it."""

    def __init__(self) -> None:
        self.generate_s = 0.0
        """From the start of the last step whose rollouts ended to their end, rewards included."""
        self.wait_trainer_s = 0.0
        """Generators stood idle before the last step that they began."""
        self._in_flight = 0
        self._idle_since = time.perf_counter()

    def metrics(self) -> dict[str, float]:
        return {"time/generate_s": self.generate_s, "time/wait_trainer_s": self.wait_trainer_s}

    def begin(self, num_calls: int) -> float:
        """The rollouts of a step begin as so many calls; returns the time to hand to ``end``."""
        now = time.perf_counter()
        self.wait_trainer_s = 0.0 if self._in_flight else now - self._idle_since
        self._in_flight += num_calls
        return now

    def end(self, started: float) -> None:
        """One of the calls has ended."""
        now = time.perf_counter()
        self.generate_s = now - started
        self._in_flight -= 1
        if not self._in_flight:
            self._idle_since = now

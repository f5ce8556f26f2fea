"""When held-out figures end a training: no better one in so many evaluations (``evaluation.patience``).

Read from the evaluations themselves, which a restart goes back to with its checkpoint: nothing else has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from forge_hpc.config.schema import Config


def why_stopped(config: Config, evaluations: Iterable[Mapping[str, Any]]) -> str | None:
    """Why training ends with the newest of the evaluations, None where it goes on.

    Args:
        evaluations: the records of ``evaluations.jsonl``. That of step 0 does not count: nothing was learned then. Of
            two of one step, as SFT has at its end, the first does. One without the figure is not better.
    """
    name, patience = config.checkpoint.best, config.evaluation.patience
    if name is None or patience is None:
        return None
    best: tuple[float, int] | None = None
    num_since = last = 0
    for record in evaluations:
        if record["step"] == last:
            continue
        last = record["step"]
        value = record.get(name)
        if value is not None and (best is None or is_better(name, value, best[0])):
            best, num_since = (value, record["step"]), 0
        else:
            num_since += 1
    if num_since < patience:
        return None
    since = "there was none" if best is None else f"the best, {best[0]:.4g}, is of step {best[1]}"
    return f"stopped early: no better {name} in {num_since} evaluations, {since}"


def is_better(name: str, value: float, than: float) -> bool:
    """Whether a figure is better than another one of its name: of a ``loss`` less is better, of all others more."""
    return value < than if name.rpartition("/")[2] == "loss" else value > than

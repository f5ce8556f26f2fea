"""What may differ between two starts of a run. One rule for whoever submits the run again and for the run itself."""

from __future__ import annotations

from forge_hpc.config.errors import UserError
from forge_hpc.config.load import diff_config
from forge_hpc.config.recipes import load_recipe
from forge_hpc.config.schema import Config

_FREE_KEYS = (
    "slurm.",
    "logging.",
    "cluster.start_timeout_s",
    "cluster.nodes",
    "cluster.trainer_nodes",
    "cluster.rollout_nodes",
    "cluster.spare_nodes",
    "cluster.rollout_ratio",
    "generator.replicas",
    "trainer.processes_per_node",
    "trainer.training.steps",
    "checkpoint.keep",
    "checkpoint.interval",
    "checkpoint.export_interval",
    "evaluation.",
)
"""How a run is queued and watched, where it runs (checkpoints fit any number of nodes), how often it saves and
evaluates, and how long it goes on; not what it computes."""


def safe_changes(old: Config, new: Config, steps_done: int, refusal: str, hint: str) -> list[str]:
    """What differs between the configurations of two starts, one line a key: ``checkpoint.keep: 2 -> 1``.

    Args:
        steps_done: optimizer steps that the run has done.
        refusal: what to say, before the keys, of changes that a run may not see.
        hint: what to do about them.

    Raises:
        UserError: something differs that may not, or the run has done more steps than are asked for now.
    """
    found = diff_config(old, new)
    if old.data.template_date is None:  # begun before runs kept it
        found = [change for change in found if change[0] != "data.template_date"]
    # To a run that evaluates, and does nothing else, its evaluation is what it computes.
    trains = load_recipe(new).needs(new).trains
    free = tuple(key for key in _FREE_KEYS if trains or key != "evaluation.")
    differing = [change for change in found if not change[0].startswith(free)]
    if differing:
        shown = ", ".join(f"{key} ({old} there, {new} now)" for key, old, new in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(f"{refusal}: {shown}{more}", hint)
    if (steps := new.trainer.training.steps) < steps_done:
        raise UserError(
            f"trainer.training.steps={steps}, and the run has done {steps_done} steps already",
            f"ask for {steps_done} or more, or choose another --run-dir",
        )
    return [f"{key}: {_shown(old)} -> {_shown(new)}" for key, old, new in found]


def _shown(value: object) -> str:
    return "null" if value is None else str(value)

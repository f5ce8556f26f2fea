"""What may differ between two starts of a run. One rule for whoever submits the run again and for the run itself.

Which keys may is said at each field of the schema, as ``resume``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from forge_hpc.config.adapters import adapter_configs
from forge_hpc.config.errors import UserError
from forge_hpc.config.fields import FIXED, ROUNDING, rule_of
from forge_hpc.config.load import diff_config
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import Config


def safe_changes(old: Config, new: Config, steps_done: int, refusal: str, hint: str) -> list[str]:
    """What differs between the configurations of two starts, one line a key: ``checkpoint.keep: 2 -> 1``. A line says
    so where sums may be added up in another order from now on: the run goes on, but not to the same last bit.

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
    only_evaluates = not needs_of(new).trains
    differing = [
        change
        for change in found
        if rule_of(Config, change[0]).resume == FIXED or (only_evaluates and change[0].startswith("evaluation."))
    ]
    if differing:
        shown = ", ".join(f"{key} ({old} there, {new} now)" for key, old, new in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(f"{refusal}: {shown}{more}", hint)
    if (steps := max(own.trainer.training.steps for own in adapter_configs(new))) < steps_done:
        raise UserError(
            f"trainer.training.steps={steps}, and the run has done {steps_done} steps already",
            f"ask for {steps_done} or more, or choose another --run-dir",
        )
    return [f"{line}{_note(key)}" for line, (key, _, _) in zip(change_lines(found), found, strict=True)]


def change_lines(found: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """What ``diff_config`` found, a line a key."""
    return [f"{key}: {_shown(old)} -> {_shown(new)}" for key, old, new in found]


def _note(key: str) -> str:
    return " (may change the last bit)" if rule_of(Config, key).resume == ROUNDING else ""


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

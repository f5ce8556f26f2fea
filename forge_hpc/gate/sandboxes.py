"""Whether programs that a model wrote can run on this node: every sandbox of the run is started once, and ended.

A sandbox that a user's own reward or environment makes is that one's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from forge_hpc.config import Config, UserError
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.sources import held_out_sets, run_sources

_USES_ONE = "code"
"""The reward and the environment of that name."""


def sandboxes_of(config: Config, node: int) -> list[dict[str, Any]]:
    """The sandboxes that a run uses on one of its nodes, each once, as fields of ``SandboxConfig``.

    Args:
        node: its number in the allocation; where others are left out it gets a smaller one.

    Raises:
        UserError: the recipe cannot be loaded.
    """
    found: list[dict[str, Any]] = []
    for options in _sandboxes(config, node):
        if options not in found:
            found.append(options)
    return found


def _sandboxes(config: Config, node: int) -> Iterator[dict[str, Any]]:
    if config.cluster.workers_on == "first" and node > 0:
        return
    sources, configured = run_sources(config), asdict(config.sandbox)
    rewards = [reward for run in sources for reward in run.config.reward]
    rewards += [reward for one in held_out_sets(config) for reward in one.rewards]
    environments = [run.config.environment for run in sources]
    names = {*(reward.name for reward in rewards), *(environment.name for environment in environments)}
    if _USES_ONE not in names:  # then the recipe need not be loaded
        return
    generators = needs_of(config).generators
    if generators == "beside" or (generators == "after" and config.evaluation.num_prompts):
        for reward in rewards:
            # They are dealt out from the first node on, and a spare node may take the place of one of those.
            is_here = reward.workers is None or node < reward.workers + config.cluster.spare_nodes
            if reward.name == _USES_ONE and is_here:
                yield reward.args.get("sandbox", configured)
    if generators == "beside":
        for environment in environments:
            if environment.name == _USES_ONE:
                yield environment.args.get("sandbox", configured)


def look_at_sandboxes(config: Config, node: int) -> dict[str, Any] | None:
    """None where this node needs none; empty where all that it needs start; else why the first one does not, as JSON:
    ``message`` and ``hint``."""
    try:
        needed = sandboxes_of(config, node)
    except UserError:  # of the recipe: the controller says so
        return None
    if not needed:
        return None
    from omegaconf.errors import OmegaConfBaseException

    from forge_hpc.sandbox import Sandbox  # brings asyncio, which few supervisors need

    try:
        for options in needed:
            Sandbox.of(options).check()
    except UserError as error:
        return {"message": error.message.removeprefix("sandbox: "), "hint": error.hint}
    except OSError as error:
        return {"message": str(error), "hint": None}
    except OmegaConfBaseException:  # wrong options: the reward says so, and the run ends
        return None
    return {}

"""Whether programs that a model wrote can run on this node: every sandbox of the run is started once, and ended.

A sandbox that a user's own reward or environment makes is that one's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from forge_hpc.config import Config, UserError
from forge_hpc.config.sources import run_sources

_USES_ONE = "code"
"""The reward and the environment of that name."""


def sandboxes_of(config: Config, node: int) -> list[dict[str, Any]]:
    """The sandboxes that a run uses on one of its nodes, each once, as fields of ``SandboxConfig``."""
    found: list[dict[str, Any]] = []
    for options in _sandboxes(config, node):
        if options not in found:
            found.append(options)
    return found


def _sandboxes(config: Config, node: int) -> Iterator[dict[str, Any]]:
    configured = asdict(config.sandbox)
    for run in run_sources(config):
        for reward in run.config.reward:
            is_here = reward.workers is None or node < reward.workers  # they are dealt out from the first node on
            if reward.name == _USES_ONE and is_here:
                yield reward.args.get("sandbox", configured)
        if run.config.environment.name == _USES_ONE:
            yield run.config.environment.args.get("sandbox", configured)


def look_at_sandboxes(config: Config, node: int) -> dict[str, Any] | None:
    """None where this node needs none; empty where all that it needs start; else why the first one does not, as JSON:
    ``message`` and ``hint``."""
    if not (needed := sandboxes_of(config, node)):
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

"""Which nodes generate and which train: every split that works, with the seconds of a step in it, the quickest first.

The model: a step's tokens over the tokens a second of the GPUs that generate, and of those that train. Where generation
runs ahead (``rollout.max_staleness`` above 0) the slower side decides, in turns the two add up. What it leaves out: the
longest answer of a step, restarts, evaluations, saves, and that more trainers talk more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from forge_hpc.config import Config, Placement, UserError, plan
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.split import working_nodes
from forge_hpc.observability.tables import table
from forge_hpc.sizing.speed import Speed

_SHOWN = 5


@dataclass(frozen=True)
class Proposal:
    """A split, and what a step takes in it."""

    overrides: tuple[str, ...]
    config: Config
    """With them."""
    placement: Placement
    step_s: float
    generate_s: float
    train_s: float

    @property
    def waits(self) -> str:
        """Who has nothing to do, and for how much of a step."""
        idle = {"generators": self.step_s - self.generate_s, "trainers": self.step_s - self.train_s}
        who = max(idle, key=lambda role: idle[role])
        return f"{who} {idle[who] / self.step_s:.0%}"


def proposals(cfg: Config, speed: Speed, check: Callable[[Config, Placement], object]) -> list[Proposal]:
    """All splits of ``cluster.nodes`` that work, the quickest first; of two that are equally quick the one with more
    rollout nodes.

    Args:
        check: raises a UserError for a split that does not fit.

    Raises:
        UserError: there is nothing to split, or no split works; then with the reason of the last one.
    """
    needs = needs_of(cfg)
    if not needs.models or needs.generators != "beside":
        raise UserError(f"recipe={cfg.recipe} has no generators beside trainers: all nodes do the same", None)
    found, reason = [], None
    for overrides, changed in _splits(cfg):
        try:
            placement = plan(changed, changed.cluster.gpus_per_node)
            check(changed, placement)
        except UserError as error:
            reason = error
            continue
        times = speed.step_s(placement, needs, synchronous=cfg.rollout.max_staleness == 0)
        found.append(Proposal(overrides, changed, placement, *times))
    if not found:
        raise reason or UserError(f"{cfg.cluster.nodes} nodes have no split", "give more --nodes")
    return sorted(found, key=lambda p: (round(p.step_s, 3), -len(p.placement.rollout_nodes)))


def describe(found: list[Proposal], speed: Speed) -> list[str]:
    """The quickest splits as a table, and where the figures are from."""
    best = found[0]
    rows = [
        [
            " ".join(each.overrides),
            str(each.placement.trainer_procs),
            str(each.placement.replicas * each.placement.tensor_parallel_size),
            *map(_seconds, (each.generate_s, each.train_s, each.step_s)),
            each.waits,
        ]
        for each in found[:_SHOWN]
    ]
    unit = "GPUs" if best.placement.gpus_per_node else "processes"
    header = ["split", f"trainer {unit}", f"generator {unit}", "generate, s", "train, s", "step, s", "waiting"]
    return [
        *table(header, rows),
        "",
        f"A step generates {speed.generated:,.0f} tokens and trains on {speed.trained:,.0f}.",
        f"A generator's {unit[:-1] if unit == 'GPUs' else 'process'} writes {speed.generated_per_s:,.0f} tokens/s, "
        f"a trainer's trains on {speed.trained_per_s:,.0f} tokens/s.",
        f"That is {speed.source}.",
    ]


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _splits(cfg: Config) -> Iterator[tuple[tuple[str, ...], Config]]:
    cluster = cfg.cluster
    working = working_nodes(cfg)
    if working > 1:
        for rollout in range(1, working):
            yield _with(cfg, rollout_nodes=rollout, trainer_nodes=working - rollout)
    else:
        gpus = cluster.gpus_per_node or 0
        for rollout in range(1, gpus):
            yield _with(cfg, rollout_ratio=rollout / gpus)
        if gpus <= 1:
            yield _with(cfg, rollout_ratio=cluster.rollout_ratio)
    if cfg.rollout.max_staleness == 0 and not cluster.spare_nodes and cluster.gpus_per_node:
        yield _with(cfg, colocate=True)


def _with(cfg: Config, **keys: float | bool) -> tuple[tuple[str, ...], Config]:
    changed = copy.deepcopy(cfg)
    changed.cluster.rollout_nodes = changed.cluster.trainer_nodes = None
    changed.cluster.colocate = False
    for key, value in keys.items():
        setattr(changed.cluster, key, value)
    return tuple(f"cluster.{key}={_text(value)}" for key, value in keys.items()), changed


def _text(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"

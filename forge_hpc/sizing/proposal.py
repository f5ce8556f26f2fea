"""Which nodes generate and which train: every split that works, with the seconds of a step in it, the quickest first.

The model: a step's tokens over the tokens a second of the GPUs that generate, and of those that train. Where generation
runs ahead (``rollout.max_staleness`` above 0) the slower side decides, on the same GPUs the two add up. What it leaves
out: the longest answer of a step, restarts, evaluations, saves, and that more trainers talk more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from forge_hpc.config import Config, Placement, UserError, plan
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import EngineConfig
from forge_hpc.config.split import takes_turns, working_nodes
from forge_hpc.config.validate import check_generators
from forge_hpc.observability.tables import table
from forge_hpc.sizing.memory import MemoryPlan
from forge_hpc.sizing.speed import Speed

_SHOWN = 5
_SHARE_BESIDE_TRAINER = 0.45
"""Of a GPU's memory, for a generator that is awake while a trainer computes there."""


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
    warnings: tuple[str, ...] = ()
    """Of its memory plan."""

    @property
    def waits(self) -> str:
        """Who has nothing to do, and for how much of a step; nobody where both compute on the same GPUs."""
        if self.placement.shares_at_once:
            return "nobody"
        idle = {"generators": self.step_s - self.generate_s, "trainers": self.step_s - self.train_s}
        who = max(idle, key=lambda role: idle[role])
        return f"{who} {idle[who] / self.step_s:.0%}"


def proposals(cfg: Config, speed: Speed, check: Callable[[Config, Placement], MemoryPlan | None]) -> list[Proposal]:
    """All splits of ``cluster.nodes`` that work, the quickest first; of two that are equally quick the one with more
    rollout nodes.

    Args:
        check: the memory plan of a split, None where it is not known. Raises a UserError for one that does not fit.

    Raises:
        UserError: there is nothing to split, or no split works; then with the reason of the last one.
    """
    needs = needs_of(cfg)
    if not needs.models or needs.generators != "beside":
        raise UserError(f"recipe={cfg.recipe} has no generators beside trainers: all nodes do the same", None)
    found: list[Proposal] = []
    seen: set[tuple[Placement, float]] = set()
    reason = None
    for overrides, changed in _splits(cfg):
        try:
            check_generators(changed)
            placement = plan(changed, changed.cluster.gpus_per_node)
            memory = check(changed, placement)
        except UserError as error:
            reason = error
            continue
        is_new = _shares_at_once(changed) and not _shares_at_once(cfg)
        split = placement, changed.generator.engine.gpu_memory_utilization
        if split in seen or (is_new and not _has_room_for_both(changed, placement, memory)):
            continue
        seen.add(split)
        times = speed.step_s(placement, needs, synchronous=cfg.rollout.max_staleness == 0)
        found.append(Proposal(overrides, changed, placement, *times, warnings=memory.warnings if memory else ()))
    if not found:
        raise reason or UserError(f"{cfg.cluster.nodes} nodes have no split", "give more --nodes")
    return sorted(found, key=lambda p: (round(p.step_s, 3), len(p.warnings), -len(p.placement.rollout_nodes)))


def _shares_at_once(cfg: Config) -> bool:
    return cfg.cluster.colocate and not takes_turns(cfg)


def _has_room_for_both(cfg: Config, placement: Placement, memory: MemoryPlan | None) -> bool:
    """Whether it is known that a trainer has all that it wants beside a generator that is awake, and that one's KV
    cache holds its answers of a step."""
    if memory is None or memory.warnings or "activations" not in memory.roles["trainers"].gib:
        return False
    answers = cfg.rollout.prompts_per_step * cfg.rollout.group_size / placement.replicas
    sequences = memory.roles["generators"].sequences
    return sequences is not None and sequences >= min(cfg.generator.engine.max_num_seqs, answers)


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
    has_others = any(not each.placement.shares_at_once for each in found)
    untried = "Sharing GPUs at once was measured with 0.6B alone: try another split too."
    unit = "GPUs" if best.placement.gpus_per_node else "processes"
    header = ["split", f"trainer {unit}", f"generator {unit}", "generate, s", "train, s", "step, s", "waiting"]
    return [
        *table(header, rows),
        "",
        f"A step generates {speed.generated:,.0f} tokens and trains on {speed.trained:,.0f}.",
        f"A generator's {unit[:-1] if unit == 'GPUs' else 'process'} writes {speed.generated_per_s:,.0f} tokens/s, "
        f"a trainer's trains on {speed.trained_per_s:,.0f} tokens/s.",
        f"That is {speed.source}.",
        *([untried] if best.placement.shares_at_once and not speed.together and has_others else []),
    ]


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _splits(cfg: Config) -> Iterator[tuple[tuple[str, ...], Config]]:
    cluster = cfg.cluster
    working = working_nodes(cfg)
    usual: dict[str, float] = {}
    utilization = cfg.generator.engine.gpu_memory_utilization
    shares = bool(cluster.gpus_per_node) and _shares_at_once(cfg)
    if shares and utilization <= _SHARE_BESIDE_TRAINER:
        usual["gpu_memory_utilization"] = EngineConfig().gpu_memory_utilization  # less was given for that alone
    if working > 1:
        for rollout in range(1, working):
            yield _with(cfg, usual, rollout_nodes=rollout, trainer_nodes=working - rollout)
    else:
        gpus = cluster.gpus_per_node or 0
        for rollout in range(1, gpus):
            yield _with(cfg, usual, rollout_ratio=rollout / gpus)
        if gpus == 0 or (gpus == 1 and not cluster.colocate):  # one GPU is shared in any case
            yield _with(cfg, rollout_ratio=cluster.rollout_ratio)
    if cluster.spare_nodes or not cluster.gpus_per_node:
        return
    awake: dict[str, float] = {}
    if cfg.rollout.max_staleness == 0:
        asleep = {} if cfg.generator.engine.sleep_level else {"sleep_level": EngineConfig().sleep_level}
        yield _with(cfg, usual | asleep, colocate=True)
        awake["sleep_level"] = 0
    if not shares and utilization > _SHARE_BESIDE_TRAINER:
        awake["gpu_memory_utilization"] = _SHARE_BESIDE_TRAINER
    yield _with(cfg, awake, colocate=True)


def _with(
    cfg: Config, engine: Mapping[str, float] = MappingProxyType({}), **cluster: float | bool
) -> tuple[tuple[str, ...], Config]:
    changed = copy.deepcopy(cfg)
    changed.cluster.rollout_nodes = changed.cluster.trainer_nodes = None
    changed.cluster.colocate = False
    sections = [("cluster", changed.cluster, cluster), ("generator.engine", changed.generator.engine, engine)]
    for _, section, keys in sections:
        for key, value in keys.items():
            setattr(section, key, value)
    given = [f"{name}.{key}={_text(keys[key])}" for name, _, keys in sections for key in keys]
    for key in ("rollout_nodes", "trainer_nodes", "colocate"):  # of another split, where they have been given
        before, after = getattr(cfg.cluster, key), getattr(changed.cluster, key)
        if key not in cluster and before != after:
            given.append(f"cluster.{key}={'null' if after is None else _text(after)}")
    return tuple(given), changed


def _text(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"

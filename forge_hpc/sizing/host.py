"""Memory of the nodes themselves: what a run keeps there that grows with its models, beside what any process takes.

    trainers    weights, gradients and moments on the CPU; what saves are staged in; weights for other hosts
    generators  weights and KV cache on the CPU; one copy of weights that come from other hosts; weights that sleep

Arithmetic over what is allocated where: ``training/staging.py``, ``weights/snapshots.py``, ``weights/remote.py``,
``wire/host.py``. Adapters are left out, and so is what the kernel takes back by itself: files that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from forge_hpc.config.errors import UserError
from forge_hpc.config.needs import POLICY, Needs
from forge_hpc.config.schema import Config, EngineConfig
from forge_hpc.config.split import Placement, frozen_apart
from forge_hpc.sizing.memory import GIB, ITEMSIZE, has_other_weights
from forge_hpc.sizing.model import ModelSize

Sizes = Callable[[str | None], ModelSize | None]
PROCESS_BYTES = GIB
"""Of a trainer or a generator without a model: libraries and allocators. The demo's take 0.5 and 0.7 GiB on the CPU."""
_STATE, _SAVES, _SENT, _FROZEN = "training state", "staged saves", "weights to send", "frozen models"
_ENGINES, _CACHE, _RECEIVED, _ASLEEP, _PROCESSES = "engines", "KV cache", "weights received", "sleep", "processes"
COLUMNS = (_STATE, _SAVES, _SENT, _FROZEN, _ENGINES, _CACHE, _RECEIVED, _ASLEEP, _PROCESSES)
_HINTS = {
    _STATE: "more trainer nodes hold less of it each, trainer.lora.enable=true a fourth",
    _SAVES: "checkpoint.async_save=false stages none, and training waits for saves; more trainer nodes stage less each",
    _FROZEN: "with reference.device=auto the reference is on the GPUs",
    _CACHE: "set a lower generator.engine.kv_cache_memory_gib",
    _RECEIVED: "generator.weight_transport=nccl keeps no weights there, for networks that you trust",
    _ASLEEP: "generator.engine.sleep_level=2 keeps nothing of engines that sleep",
}
"""What takes less, by the largest of what is kept."""


@dataclass(frozen=True)
class Need:
    """What takes memory of a node."""

    what: str
    """One of ``COLUMNS``."""
    num_bytes: int


@dataclass(frozen=True)
class Room:
    """Memory that a run has on a node."""

    num_bytes: int
    what: str
    """Whose limit it is, in messages."""
    more: str = ""
    """What gives it more."""


def room_of(num_bytes: int, is_cgroups: bool, available: int | None = None) -> Room:
    """What a machine has, by ``gate.memory.memory_limit``, or of that what is ``available`` now."""
    what = "the limit of its cgroup" if is_cgroups else "all that it has"
    more = "raise slurm.mem, or the container's limit" if is_cgroups else "take a node with more memory"
    return Room(num_bytes, what, more) if available is None else Room(available, "available now", more)


@dataclass(frozen=True)
class HostPlan:
    """What a run keeps in the memory of each node."""

    nodes: tuple[tuple[Need, ...], ...]
    """By node, in the order of the placement."""

    def refusal(self, node: int, room: Room, who: str) -> UserError | None:
        """Why the node cannot hold its part: what is written there, without processes, is more than it has. ``who``
        names it."""
        needs = [need for need in self.nodes[node] if need.what != _PROCESSES]
        if (total := _total(needs)) <= room.num_bytes:
            return None
        return UserError(
            f"{who} is to keep {total / GIB:.1f} GiB in its memory ({_parts(needs)}) and may have "
            f"{room.num_bytes / GIB:.1f} ({room.what})",
            _hint(needs, room.more),
        )

    def warning(self, node: int, room: Room, who: str) -> str | None:
        """What is to be said where the node may run out of memory: where it has too little for the processes too."""
        needs = self.nodes[node]
        if (total := _total(needs)) <= room.num_bytes or [need.what for need in needs] == [_PROCESSES]:
            return None
        return (
            f"{who} takes about {total / GIB:.1f} GiB of its memory ({_parts(needs)}) and has "
            f"{room.num_bytes / GIB:.1f} ({room.what}): processes may be killed ({_hint(needs, room.more)})"
        )

    def alike(self) -> dict[tuple[Need, ...], list[int]]:
        """Nodes by what they keep, without those that keep nothing."""
        found: dict[tuple[Need, ...], list[int]] = {}
        for node, needs in enumerate(self.nodes):
            if needs:
                found.setdefault(needs, []).append(node)
        return found


def plan_host(cfg: Config, needs: Needs, placement: Placement, size_of: Sizes) -> HostPlan | None:
    """Estimate what each node keeps in its own memory.

    Args:
        size_of: the size of a model by its path, None being the policy's.

    Returns:
        None where the size of a model, or the number of GPUs, is not known.
    """
    sizes = {path: size_of(path) for path in (None, *(need.path for need in needs.models.values()))}
    params = {path: size.num_params for path, size in sizes.items() if size is not None}
    if placement.gpus_per_node is None or len(params) < len(sizes):
        return None
    roles = (
        (placement.trainer_nodes, [*_trainers(cfg, needs, placement, params)]),
        (placement.frozen_nodes, [*_frozen(cfg, needs, placement, params)]),
        (placement.rollout_nodes, [*_generators(cfg, needs, placement, params[None])]),
        *((place.nodes, [*_served(cfg, number, placement, size_of)]) for number, place in enumerate(placement.served)),
    )
    nodes = []
    for node in range(placement.nodes):
        held = [need for where, parts in roles if node in where for need in parts]
        held.append(Need(_PROCESSES, placement.processes_on(node) * PROCESS_BYTES))
        nodes.append(_by_column(held))
    return HostPlan(tuple(nodes))


def plan_lent(cfg: Config, num_replicas: int, *, on_gpus: bool, size_of: Sizes) -> HostPlan | None:
    """The same of a node that another job lends, with so many generators and no trainer; None where the size of the
    model is not known."""
    if (size := size_of(None)) is None:
        return None
    weights = size.num_params * ITEMSIZE[cfg.model.dtype]
    held = [] if on_gpus else [*_on_cpu(num_replicas, weights, cfg.generator.engine)]
    if _streams(cfg):
        held.append(Need(_RECEIVED, weights))
    return HostPlan((_by_column([*held, Need(_PROCESSES, num_replicas * PROCESS_BYTES)]),))


def _by_column(held: Sequence[Need]) -> tuple[Need, ...]:
    sums = {what: sum(need.num_bytes for need in held if need.what == what) for what in COLUMNS}
    return tuple(Need(what, num_bytes) for what, num_bytes in sums.items() if num_bytes)


def _trainers(cfg: Config, needs: Needs, placement: Placement, params: Mapping[str | None, int]) -> Iterator[Need]:
    """Of the ranks of one node."""
    if not placement.trainer_procs:
        return
    lora, training = cfg.trainer.lora.enable, cfg.trainer.training
    on_cpu, itemsize = not placement.gpus_per_node, ITEMSIZE[training.dtype]
    shards = placement.trainer_procs // cfg.trainer.parallelism.data_parallel_replicate_degree
    share = placement.trainer_procs_per_node / shards
    trained = sum(params[need.path] for need in needs.models.values() if need.trained)
    if on_cpu:
        yield Need(_STATE, int(share * trained * itemsize * (1 if lora else 4)))
    if cfg.checkpoint.async_save and not lora:  # weights and two moments, from the first save on
        yield Need(_SAVES, int(share * trained * itemsize * 3))
    apart = frozen_apart(cfg, needs)
    for name, need in needs.models.items():
        if not need.trained and name not in apart and not (lora and need.path in (None, cfg.model.path)):
            yield from _of_frozen(cfg, params[need.path] * share, on_cpu=on_cpu, offload=need.offload)
    if needs.generators == "beside" and POLICY in needs.models and not cfg.trainer.lora.sends_adapters:
        own = params[None] * ITEMSIZE[cfg.model.dtype] / shards
        copies = 2 if cfg.generator.send_changes and placement.nodes > 1 else 1  # this version, and the one before
        if on_cpu:
            yield Need(_SENT, int(placement.trainer_procs_per_node * own) * copies)
        elif _other_hosts(cfg, placement):
            yield Need(_SENT, placement.trainer_procs_per_node * _page_locked(int(own)) * copies)


def _generators(cfg: Config, needs: Needs, placement: Placement, num_params: int) -> Iterator[Need]:
    """Of the engines of one node."""
    if placement.generate_after_training:  # trainers have gone by then, and took more
        return
    engine, weights = cfg.generator.engine, num_params * ITEMSIZE[cfg.model.dtype]
    if not placement.gpus_per_node:
        yield from _on_cpu(placement.replicas_per_node, weights, engine)
    elif placement.takes_turns and engine.sleep_level == 1:
        yield Need(_ASLEEP, placement.replicas_per_node * weights)
    if needs.generators == "beside" and _other_hosts(cfg, placement):
        yield Need(_RECEIVED, weights)


def _served(cfg: Config, number: int, placement: Placement, size_of: Sizes) -> Iterator[Need]:
    one = cfg.served[number]
    if not placement.gpus_per_node and (size := size_of(one.path)) is not None:
        engines, weights = len(placement.served[number].gpus), size.num_params * ITEMSIZE[cfg.model.dtype]
        yield from _on_cpu(engines, weights, one.engine)


def _on_cpu(num: int, weights: int, engine: EngineConfig) -> Iterator[Need]:
    """So many engines. vLLM fills their KV caches with zeros as they start."""
    if not has_other_weights(engine):
        yield Need(_ENGINES, num * weights)
    if "kv_cache_memory_bytes" not in engine.extra:  # which vLLM reads in its own way
        yield Need(_CACHE, int(num * engine.kv_cache_memory_gib * GIB))


def _frozen(cfg: Config, needs: Needs, placement: Placement, params: Mapping[str | None, int]) -> Iterator[Need]:
    """Of the processes of one node that have frozen models alone."""
    for need in frozen_apart(cfg, needs).values():
        share = params[need.path] / max(1, len(placement.frozen_nodes))
        yield from _of_frozen(cfg, share, on_cpu=not placement.gpus_per_node, offload=need.offload)


def _of_frozen(cfg: Config, num_params: float, *, on_cpu: bool, offload: bool) -> Iterator[Need]:
    """In the compute dtype, which is float32 on the CPU."""
    if on_cpu or offload:
        itemsize = 4 if on_cpu else ITEMSIZE[cfg.trainer.training.mixed_precision_param]
        yield Need(_FROZEN, int(num_params * itemsize))


def _other_hosts(cfg: Config, placement: Placement) -> bool:
    """Whether whole weights go to generators over streams: from trainers of other hosts."""
    is_apart = any([*placement.trainer_nodes] != [node] for node in placement.rollout_nodes)
    return bool(placement.trainer_nodes) and is_apart and _streams(cfg)


def _streams(cfg: Config) -> bool:
    """Whether what goes between hosts are whole weights over streams."""
    return cfg.generator.weight_transport == "tls" and not cfg.trainer.lora.sends_adapters


def _page_locked(num_bytes: int) -> int:
    """PyTorch's allocator of page-locked memory takes the next power of two."""
    return 1 << max(0, num_bytes - 1).bit_length()


def _total(needs: Sequence[Need]) -> int:
    return sum(need.num_bytes for need in needs)


def _parts(needs: Sequence[Need]) -> str:
    largest = sorted(needs, key=lambda need: -need.num_bytes)
    return ", ".join(f"{need.what} {need.num_bytes / GIB:.1f}" for need in largest)


def _hint(needs: Sequence[Need], more: str) -> str:
    """By the largest of what can be less."""
    able = max((need for need in needs if need.what in _HINTS), key=lambda need: need.num_bytes, default=None)
    return "; or ".join(filter(None, [more, _HINTS[able.what] if able is not None else ""]))

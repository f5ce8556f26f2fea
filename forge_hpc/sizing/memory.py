"""The memory plan of a run: what each role holds of its GPUs, estimated as the trainers will do it themselves
(``training/build.py``), and vLLM's share beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from forge_hpc.config.errors import UserError
from forge_hpc.config.needs import Needs
from forge_hpc.config.schema import Config, EngineConfig
from forge_hpc.config.served import served_config
from forge_hpc.config.split import Placement
from forge_hpc.sizing.microbatch import RESERVE_BYTES, WholeBytes, compiles, plan_microbatch, plan_shared
from forge_hpc.sizing.model import ModelSize

GIB = 2**30
COLUMNS = ("weights", "optimizer", "activations", "gathered", "KV cache", "other")
ITEMSIZE = {"float32": 4, "bfloat16": 2}
_BATCHED_TOKENS = 8192
_ENGINE_BYTES = 1.5 * GIB
"""Context, CUDA graphs and workspaces of an engine, besides what a batch takes."""


@dataclass(frozen=True)
class RoleMemory:
    """GiB that a role holds of each of its GPUs, by column; of those that are not there nothing is known, or needed."""

    gib: dict[str, float] = field(default_factory=dict)
    remark: str = ""
    sequences: int | None = None
    """Of the longest, that a generator's KV cache holds at once; None where that is not known."""

    @property
    def total_gib(self) -> float:
        return sum(self.gib.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of all roles, and what will hardly work."""

    gpu_gib: float
    roles: dict[str, RoleMemory]
    """Of those of ``trainers``, ``generators``, ``frozen`` and ``served NAME`` that there are."""
    warnings: tuple[str, ...] = ()


def plan_memory(
    cfg: Config, needs: Needs, placement: Placement, gpu_gib: float, size_of: Callable[[str | None], ModelSize | None]
) -> MemoryPlan | None:
    """Estimate what each GPU holds.

    Args:
        gpu_gib: memory of a GPU.
        size_of: the size of a model by its path, None being the policy's.

    Returns:
        None where there is no GPU, or the size of a model is not known.

    Raises:
        UserError: weights alone do not fit, or not all that a single sequence takes.
    """
    paths = [None, *(need.path for need in needs.models.values())]
    if not placement.gpus_per_node or any(size_of(path) is None for path in paths):
        return None
    roles, warnings = {}, []
    shared = placement.shares_at_once
    engine_share = cfg.generator.engine.gpu_memory_utilization
    if placement.trainer_procs:
        if placement.shared_gpus:
            state = _state_gib(cfg, needs, placement, size_of, between_steps=placement.takes_turns)
            plan_shared(int(gpu_gib * GIB), engine_share, int(sum(state) * GIB), in_turns=placement.takes_turns)
        room_gib = gpu_gib * (1 - engine_share) if shared else gpu_gib
        roles["trainers"] = _trainers(cfg, needs, placement, room_gib, size_of)
        kept, there = roles["trainers"].total_gib, "what the generator beside it leaves" if shared else "a GPU's memory"
        if kept > room_gib:
            warnings.append(
                f"a trainer takes about {kept:.1f} GiB, {room_gib:.1f} are {there}: it may run out of memory "
                "(more trainer nodes or GPUs, a shorter trainer.training.seq_len, or trainer.lora.enable=true)"
            )
        elif shared:
            beside, alone = roles["trainers"], _trainers(cfg, needs, placement, gpu_gib, size_of)
            if _work(beside) != _work(alone):
                warnings.append(
                    f"beside the generator trainers have {_work(beside)}, alone on a GPU {_work(alone)}: they compute "
                    "more slowly (a lower generator.engine.gpu_memory_utilization leaves them more)"
                )
    if placement.replicas and (size := size_of(None)) is not None:
        roles["generators"] = _engines(cfg, placement, gpu_gib * engine_share, size, _Who())
    if placement.frozen_nodes:
        procs = len(placement.frozen_nodes) * len(placement.frozen_gpus)
        sizes = [size_of(need.path) for need in needs.models.values() if not need.trained]
        roles["frozen"] = RoleMemory({"weights": sum(2 * size.num_params for size in sizes if size) / procs / GIB})
    for number, one in enumerate(cfg.served):
        if (size := size_of(one.path)) is not None:
            share, who = gpu_gib * one.engine.gpu_memory_utilization, f"an engine of {one.name}"
            whom = _Who(who, f"served.{number}", f"served.{number}.max_tokens")
            own = placement.with_served(number)
            roles[f"served {one.name}"] = _engines(served_config(cfg, one), own, share, size, whom)
    return MemoryPlan(gpu_gib, roles, tuple(warnings))


def _trainers(
    cfg: Config,
    needs: Needs,
    placement: Placement,
    room_gib: float,
    size_of: Callable[[str | None], ModelSize | None],
) -> RoleMemory:
    weights, optimizer = _state_gib(cfg, needs, placement, size_of)
    if weights + optimizer > room_gib:
        raise UserError(
            f"the trainers' weights and optimizer take {weights + optimizer:.1f} GiB of each GPU, which has "
            f"{room_gib:.1f} for them ({placement.trainer_procs} trainer processes)",
            "take more trainer nodes or GPUs, trainer.lora.enable=true, or a smaller model",
        )
    gib = {"weights": weights, "optimizer": optimizer, "other": RESERVE_BYTES / GIB}
    size, training = size_of(None), cfg.trainer.training
    if size is None or size.hf is None:
        return RoleMemory(gib, "activations unknown: the model is not on this machine")
    degrees = cfg.trainer.parallelism
    tp, replicas = degrees.tensor_parallel_degree, degrees.data_parallel_replicate_degree
    microbatch = plan_microbatch(
        size.hf,
        size.num_params,
        training.seq_len,
        max(0, int((room_gib - sum(gib.values())) * GIB)),
        num_rows=training.local_batch_size,
        mode=cfg.trainer.activation_checkpoint.mode,
        tensor_parallel=tp,
        context_parallel=degrees.context_parallel_degree,
        compiled=compiles(cfg, "cuda"),
        whole=WholeBytes.of(
            size.num_params,
            max(1, placement.trainer_procs // (replicas * tp)),
            ITEMSIZE[training.mixed_precision_param],
            tensor_parallel=tp,
            lora=cfg.trainer.lora.enable,
        ),
    )
    gib["activations"] = microbatch.activation_bytes / GIB
    if microbatch.whole_bytes:
        gib["gathered"] = microbatch.whole_bytes / GIB
    rows = f"{microbatch.num_rows} row{'s' * (microbatch.num_rows != 1)}"
    return RoleMemory(gib, f"{rows} a microbatch, checkpointing {microbatch.mode}")


def _work(trainers: RoleMemory) -> str:
    """How trainers compute, as far as memory decides it."""
    gathered = trainers.gib.get("gathered")
    return trainers.remark + (f", {gathered:.1f} GiB gathered once a step" if gathered else "")


def _state_gib(
    cfg: Config,
    needs: Needs,
    placement: Placement,
    size_of: Callable[[str | None], ModelSize | None],
    *,
    between_steps: bool = False,
) -> tuple[float, float]:
    """Weights in all copies, and gradients with moments, of each trainer (``Shape.state_bytes``)."""
    degrees, lora = cfg.trainer.parallelism, cfg.trainer.lora.enable
    itemsize, published = ITEMSIZE[cfg.trainer.training.dtype], ITEMSIZE[cfg.model.dtype]
    shards = placement.trainer_procs // degrees.data_parallel_replicate_degree
    weights = optimizer = 0.0
    for need in needs.models.values():
        size = size_of(need.path)
        apart = not need.trained and bool(placement.frozen_nodes)
        if size is None or need.offload or apart or (lora and not need.trained and need.path is None):
            continue
        copy = published if need.trained and need.path is None and needs.generators == "beside" else 0
        weights += size.num_params * ((itemsize if need.trained else 0) + 2 + copy) / shards / GIB
        moments = (1 if lora else 2 if between_steps else 3) if need.trained else 0
        optimizer += size.num_params * moments * itemsize / shards / GIB
    return weights, optimizer


def holds_a_copy(cfg: Config) -> bool:
    """Whether the GPUs of generators on other hosts hold the weights a second time, as they come."""
    return cfg.generator.weight_transport == "nccl" and cfg.cluster.nodes > 1


@dataclass(frozen=True)
class _Who:
    """Whose engines are meant, in messages."""

    name: str = "a generator"
    section: str = "generator"
    longest: str = "rollout.max_response_tokens"


def has_other_weights(engine: EngineConfig) -> bool:
    """Whether vLLM is told of another dtype for its weights than ``model.dtype``: nobody here knows what they take."""
    return bool(engine.extra.keys() & {"quantization", "dtype", "load_format"})


def _engines(cfg: Config, placement: Placement, share_gib: float, size: ModelSize, who: _Who) -> RoleMemory:
    engine, itemsize, tp = cfg.generator.engine, ITEMSIZE[cfg.model.dtype], placement.tensor_parallel_size
    if has_other_weights(engine):
        return RoleMemory({"other": _ENGINE_BYTES / GIB}, f"unknown: {who.section}.engine.extra chooses a dtype")
    weights = size.num_params * itemsize / tp / GIB
    copy = size.num_params * itemsize / GIB if holds_a_copy(cfg) else 0.0
    whole_gib, share_gib = share_gib, share_gib - copy
    if copy and (weights + copy > whole_gib >= weights or copy >= whole_gib):
        raise UserError(
            f"{who.name}'s weights take {weights:.1f} GiB of each GPU, and with generator.weight_transport=nccl all of "
            f"them come to a GPU beside its own, {copy:.1f} more, where vLLM may take {whole_gib:.1f} of it "
            f"({who.section}.engine.gpu_memory_utilization={engine.gpu_memory_utilization:g})",
            "leave out generator.weight_transport=nccl: weights go over TLS streams then, into the memory of the host",
        )
    if weights > share_gib:
        enough = 2 ** math.ceil(math.log2(tp * weights / share_gib + 1e-9))
        raise UserError(
            f"{who.name}'s weights take {weights:.1f} GiB of each GPU, and vLLM may take {share_gib:.1f} of it "
            f"({who.section}.engine.gpu_memory_utilization={engine.gpu_memory_utilization:g})",
            f"set {who.section}.engine.tensor_parallel_size={enough} or more",
        )
    if size.hf is None:
        return RoleMemory({"weights": weights}, "KV cache unknown: the model is not on this machine")
    longest = engine.max_model_len or cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens
    batched = max(_BATCHED_TOKENS, longest, engine.max_num_seqs)
    inner = size.hf.get("moe_intermediate_size") or size.hf["intermediate_size"]
    batch = 2 * batched * (2 * inner / tp + 4 * size.hf["hidden_size"])
    logits = 8 * engine.max_num_seqs * size.hf["vocab_size"] / tp
    other = (_ENGINE_BYTES + batch + logits) / GIB
    cache = max(0.0, share_gib - weights - other)
    one = longest * size.kv_bytes(itemsize, tp) / GIB
    if one > share_gib - weights:
        raise UserError(
            f"the keys and values of one sequence of {longest} tokens take {one:.1f} GiB, and {who.name} has "
            f"{share_gib - weights:.1f} beside its weights",
            f"raise {who.section}.engine.tensor_parallel_size, or lower {who.longest}",
        )
    together = int(cache / one)
    return RoleMemory(
        {"weights": weights + copy, "KV cache": cache, "other": other},
        f"holds {together} sequence{'s' * (together != 1)} of {longest} tokens",
        together,
    )

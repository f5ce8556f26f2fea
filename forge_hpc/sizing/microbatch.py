"""How many rows a microbatch has, and which activations are computed again, where the configuration leaves it open.

On a GPU a microbatch is to be large enough that launching its kernels takes no longer than running them, and not
larger: what it computes is the same for any cut. Of the ways to fit it into the memory that is left the one that
computes the least again is taken. Activations are estimated, for a dense model compiled layer by layer; measured on
Qwen3 0.6B (H100), MiB a token: 1.20 without checkpointing, 0.50 selective, 0.09 full.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config

MODES = ("none", "selective", "full")
"""From the one that keeps everything to the one that keeps least."""
BUSY_FLOPS = 1.2e14
"""Of a forward and backward pass: 0.2 to 0.3 s of an H100, and as long as it takes to launch some thousand kernels."""
RESERVE_BYTES = 3 * 2**30
"""For the head's chunks, NCCL, the context and fragments."""
SAFETY = 1.15


@dataclass(frozen=True)
class MicrobatchPlan:
    """What a microbatch is, and why."""

    num_rows: int
    mode: str
    """Of activation checkpointing."""
    activation_bytes: int
    available_bytes: int
    gathers_once: bool = True
    """Whether a step gathers sharded weights once (``training.accumulation``) and not for each microbatch."""
    sums_once: bool = True
    """And sums gradients over ranks once."""
    whole_bytes: int = 0
    """What these two take beside the activations, as far as they are done."""

    @property
    def fits(self) -> bool:
        """By the estimate; where it does not, only a try tells."""
        return self.activation_bytes <= self.available_bytes

    def __str__(self) -> str:
        what = "weights gathered and gradients summed" if self.sums_once else "weights gathered"
        whole = f"; {what} once a step: {self.whole_bytes / 2**30:.1f} GiB more" if self.whole_bytes else ""
        return (
            f"{self.num_rows} row(s) a microbatch, activation checkpointing {self.mode}: about "
            f"{self.activation_bytes / 2**30:.1f} of {self.available_bytes / 2**30:.1f} GiB{whole}"
        )


def plan_microbatch(
    hf: dict[str, Any],
    num_params: int,
    seq_len: int,
    available_bytes: int,
    *,
    num_rows: int | None = None,
    mode: str = "auto",
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    compiled: bool = True,
    whole: WholeBytes | None = None,
) -> MicrobatchPlan:
    """Choose what is open: ``num_rows`` where it is None, ``mode`` where it is ``auto``; and gather weights, and sum
    gradients, once a step where that leaves both as they are.

    Args:
        hf: the model's ``config.json``.
        num_params: of the whole model.
        seq_len: slots of a row.
        available_bytes: of a GPU, for activations: free memory less gradients, optimizer and ``RESERVE_BYTES``.
        context_parallel: GPUs that share a row.
        whole: what that takes; None: nothing.
    """
    seq_len = -(-seq_len // context_parallel)
    wanted = num_rows or max(1, round(BUSY_FLOPS / (6 * num_params * seq_len)))
    modes = MODES if mode == "auto" else (mode,)
    row = SAFETY * seq_len / tensor_parallel
    costs = {each: int(row * token_bytes(hf, each, context_parallel, compiled=compiled)) for each in modes}
    weights, gradients = whole or WholeBytes(0, 0)
    for each, cost in costs.items():
        if (spare := available_bytes - wanted * cost) >= 0:
            once = weights <= spare, weights + gradients <= spare
            taken = weights * once[0] + gradients * once[1]
            return MicrobatchPlan(wanted, each, wanted * cost, available_bytes, *once, taken)
    least = modes[-1]  # fewer rows of it, and at least one: only a try tells
    rows = num_rows or max(1, min(wanted, available_bytes // costs[least]))
    return MicrobatchPlan(rows, least, rows * costs[least], available_bytes, not weights, not weights + gradients)


class WholeBytes(NamedTuple):
    """What a rank holds more where a step gathers its weights once, and where it sums its gradients once too."""

    weights: int
    """Those of the other shards in the compute dtype."""
    gradients: int
    """Of those weights in float32; adapters have few."""

    @classmethod
    def of(
        cls, num_params: int, num_shards: int, itemsize: int, *, tensor_parallel: int = 1, lora: bool = False
    ) -> WholeBytes:
        """Of the model's size; with expert parallelism a rank gathers fewer, so that this is more than it takes.

        Args:
            num_params: of the whole model.
            num_shards: of the weights, those of tensor parallelism aside.
            itemsize: bytes of a weight in the compute dtype.
        """
        others = num_params * (num_shards - 1) // (num_shards * tensor_parallel)
        return cls(itemsize * others, 0 if lora else 4 * others)


def plan_shared(total_bytes: int, engine_share: float, kept_bytes: int, *, in_turns: bool) -> str:
    """A GPU that has a trainer and a generator, in a line.

    Args:
        engine_share: ``generator.engine.gpu_memory_utilization``.
        kept_bytes: what the trainer holds all the time, activations aside.
        in_turns: they compute one after the other, and activations have the sleeping generator's memory.

    Raises:
        UserError: that is too much together.
    """
    gib = 2**30
    engine_bytes = int(total_bytes * engine_share)
    sums = (
        f"of {total_bytes / gib:.1f} GiB of a GPU the generator takes {engine_bytes / gib:.1f} "
        f"(generator.engine.gpu_memory_utilization={engine_share:g}), the trainer keeps {kept_bytes / gib:.1f} all "
        f"the time, and {RESERVE_BYTES / gib:.1f} are for contexts, CUDA graphs and NCCL"
    )
    left = total_bytes - engine_bytes - kept_bytes - RESERVE_BYTES
    if left >= 0:
        return f"in turns: {sums}" if in_turns else f"shared: {sums}; the rest, {left / gib:.1f}, for activations"
    limit = total_bytes * trainer_share(total_bytes, engine_share)
    if not in_turns and kept_bytes < limit:  # a small model needs less than the reserve: a try tells
        return f"shared: {sums}: {-left / gib:.1f} GiB too much, and none for activations; it may run out of memory"
    fits = math.floor(100 * (total_bytes - kept_bytes - RESERVE_BYTES) / total_bytes) / 100
    more = "take more GPUs, which share the trainer's part"
    less = f"{fits:g} or less" if in_turns else f"less than {fits:g} (activations take what is left)"
    raise UserError(
        f"a trainer and a generator on one GPU: {sums}: {-left / gib:.1f} GiB too much",
        f"set generator.engine.gpu_memory_utilization to {less}, or {more}" if fits > 0 else more,
    )


def trainer_share(total_bytes: int, engine_share: float) -> float:
    """The share of a GPU that a trainer may allocate beside a generator that is awake: what is left but for the context
    and NCCL's buffers, for which half of the reserve is taken, and half of what is left at most."""
    left = 1 - engine_share
    return max(left / 2, left - RESERVE_BYTES / 2 / total_bytes)


def compiles(cfg: Config, device: str) -> bool:
    """Whether trainers on a device (``cuda``, ``cpu``) compile: where nobody has chosen those on GPUs, but not such as
    are to round as vLLM does."""
    if cfg.trainer.compile.enable is not None:
        return cfg.trainer.compile.enable
    return device == "cuda" and not cfg.model.batch_invariant


def token_bytes(hf: dict[str, Any], mode: str, context_parallel: int = 1, *, compiled: bool = True) -> int:
    """Activations of a token that a microbatch holds at its peak, in a two-byte dtype. Compiled, the SiLU is computed
    again.

    A rank of a shared row has the keys and values of other ranks' tokens too: of a document as long as the row those
    up to its own early chunk and up to its late one, C + 1/2 times its own (``data.row_shares``), and all of them, C
    times, while they are gathered.
    """
    dim, num_heads = hf["hidden_size"], hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or dim // num_heads
    queries, keys = num_heads * head_dim, 2 * (hf.get("num_key_value_heads") or num_heads) * head_dim
    hidden = hf["intermediate_size"]
    if experts := hf.get("num_local_experts") or hf.get("num_experts"):
        hidden = hf["moe_intermediate_size"] * hf["num_experts_per_tok"] + experts
    layer = 3 * dim + 2 * queries + 2 * keys + (3 if compiled else 4) * hidden
    gathered = 0.0 if context_parallel == 1 else context_parallel * keys
    if context_parallel > 1:
        layer += (context_parallel - 0.5) * keys
    kept = {"none": layer, "selective": 2 * dim + 2 * queries + hidden, "full": dim}[mode]
    return int(2 * (hf["num_hidden_layers"] * kept + (0 if mode == "none" else layer) + gathered + 8 * dim))

"""Figures of speed, ``perf/…`` of ``metrics.jsonl``: they vary from run to run as times do, and cost no time to get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WORST = ("perf/trainer_memory_peak_gib", "perf/trainer_memory_reserved_gib")
"""Of the rank that has most; others are means over ranks."""


@dataclass(slots=True)
class EngineCounts:
    """What an engine has done since it was asked last; sums over its steps."""

    num_steps: int = 0
    busy_s: float = 0.0
    """In steps, without weight loads."""
    weights_s: float = 0.0
    """In these: nothing was generated."""
    running: int = 0
    """Requests that vLLM was decoding, summed over steps."""
    waiting: int = 0
    """Requests that waited for a place, or for KV cache, summed over steps."""
    kv_cache_usage: float = 0.0
    """Highest share of the KV cache's blocks in use."""
    num_preemptions: int = 0
    num_generated_tokens: int = 0
    """Of requests that have finished, as the next two."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompts: in the prefix cache."""
    gpu_utilization: float | None = None
    gpu_memory_gib: float | None = None


def engine_figures(counts: Sequence[EngineCounts], gpus_per_replica: int = 1) -> dict[str, float]:
    """The step's figures of all replicas, by their key; none where no engine has done a step."""
    busy = [each for each in counts if each.num_steps]
    if not busy:
        return {}
    figures = {
        "perf/generator_tokens_per_s": sum(each.num_generated_tokens for each in busy)
        / (sum(each.busy_s for each in busy) * gpus_per_replica),
        "perf/generator_running": sum(each.running / each.num_steps for each in busy),
        "perf/generator_waiting": sum(each.waiting / each.num_steps for each in busy),
        "perf/generator_kv_cache_usage": max(each.kv_cache_usage for each in busy),
        "perf/generator_preemptions": float(sum(each.num_preemptions for each in busy)),
        "perf/generator_weights_s": sum(each.weights_s for each in counts) / len(counts),
    }
    if num_prompt := sum(each.num_prompt_tokens for each in busy):
        figures["perf/generator_prefix_cache_hits"] = sum(each.num_cached_tokens for each in busy) / num_prompt
    utilization = [each.gpu_utilization for each in counts if each.gpu_utilization is not None]
    if utilization:
        figures["perf/generator_gpu_utilization"] = sum(utilization) / len(utilization)
    if memory := [each.gpu_memory_gib for each in counts if each.gpu_memory_gib is not None]:
        figures["perf/generator_gpu_memory_gib"] = max(memory)
    return figures


def over_ranks(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a step, which are the same on all ranks, with the ranks' own figures of speed brought together."""
    first = dict(ranks[0])
    for key in first:
        if key.startswith("perf/"):
            values = [rank[key] for rank in ranks if key in rank]
            first[key] = max(values) if key in WORST else sum(values) / len(values)
    return first

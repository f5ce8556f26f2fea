"""Tokens a second of trainers and generators: measured in a run, or estimated from what docs/performance.md has."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

from forge_hpc.config import Config, Placement, UserError, plan, read_config
from forge_hpc.config.needs import Needs
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing.gpus import Gpu, peak_flops
from forge_hpc.sizing.model import ModelSize

_PARAMS, _GPU, _FLOPS, _BYTES = 596e6, "H200", 989e12, 4.8e12
_TRAINED, _GENERATED = 75_600.0, 96_000 / 5.69
"""The whole loop of docs/performance.md: Qwen3 0.6B, one H200 trains and another one generates."""
_SWITCH_S = 1.2
"""Of a step whose trainers and generators take turns: falling asleep and waking (docs/performance.md)."""


@dataclass(frozen=True)
class Speed:
    """What a step takes of a GPU."""

    generated_per_s: float
    """Tokens a second that a generator's GPU (CPU: a replica) writes."""
    trained_per_s: float
    """Tokens a second in the rows of a trainer's GPU (CPU: a process)."""
    generated: float
    """Tokens that a step generates."""
    trained: float
    """Tokens in its rows, counted once an epoch."""
    source: str
    """Where this is from, for a person."""
    together: bool = False
    """Both are of GPUs that did the other at the same time."""

    def step_s(self, placement: Placement, needs: Needs, *, synchronous: bool) -> tuple[float, float, float]:
        """Seconds of a step, of its generation and of its training, in a split."""
        generators = placement.replicas * placement.tensor_parallel_size if placement.replicas else 0
        generate_s = self.generated / (self.generated_per_s * generators) if needs.generators == "beside" else 0.0
        train_s = self.trained / (self.trained_per_s * placement.trainer_procs) if placement.trainer_procs else 0.0
        one_by_one = synchronous or placement.takes_turns or (placement.shared_gpus and not self.together)
        step_s = generate_s + train_s if one_by_one else max(generate_s, train_s)
        return step_s + (_SWITCH_S if placement.takes_turns else 0.0), generate_s, train_s


def measured(run_dir: RunDir, cfg: Config) -> Speed:
    """What a run has measured, for the episodes of a step of `cfg`.

    Raises:
        UserError: it has measured nothing, or its configuration is another kind of run.
    """
    if not run_dir.has_config:
        raise UserError(f"{run_dir} is no run directory", "give the directory of a run that has trained")
    records = deque(read_jsonl(run_dir.metrics), maxlen=50)
    before = read_config(run_dir.config)

    def median(key: str) -> float:
        values = [record[key] for record in records if record.get(key)]
        if not values:
            raise UserError(f"{run_dir} has measured no {key}", "give a run that has trained some steps on rollouts")
        return statistics.median(values)

    trained_per_s, generated_per_s = median("perf/trainer_tokens_per_s"), median("perf/generator_tokens_per_s")
    scale = _episodes(cfg) / _episodes(before)
    # Each rank's figure is its own rows over the step's time: on the CPU a process stands for a GPU.
    placement = plan(before, before.cluster.gpus_per_node)
    trainers = max(1, placement.trainer_procs)
    together = bool(placement.shared_gpus) and before.rollout.max_staleness > 0
    both = ", whose trainers and generators were on the same GPUs at once: apart each does more" * together
    return Speed(
        generated_per_s,
        trained_per_s,
        median("tokens/generated") * scale,
        trained_per_s * median("time/train_s") * trainers * scale * cfg.algorithm.epochs / before.algorithm.epochs,
        f"measured: the median of the last {len(records)} steps of {run_dir}{both}",
        together,
    )


def estimated(cfg: Config, size: ModelSize, gpu: Gpu) -> Speed:
    """Scaled from one measurement by parameters, and by what bounds each: arithmetic the trainers, memory the
    generators. Raises UserError: nothing is known of the GPU's arithmetic."""
    flops = peak_flops(gpu.name)
    if flops is None:
        raise UserError(f"the speed of a {gpu.name} is not known here", "measure a run: --from RUN_DIR")
    smaller = _PARAMS / size.active_params
    answer, prompt = cfg.rollout.max_response_tokens / 2, cfg.rollout.max_prompt_tokens / 2
    return Speed(
        _GENERATED * smaller * gpu.bytes_per_s / _BYTES,
        _TRAINED * smaller * flops / _FLOPS,
        _episodes(cfg) * answer,
        _episodes(cfg) * (answer + prompt) * cfg.algorithm.epochs,
        f"an estimate: docs/performance.md has {_TRAINED:,.0f} tokens/s trained and {_GENERATED:,.0f} generated on an "
        f"{_GPU} with 0.6B; scaled to {size.active_params / 1e9:.1f}B parameters and an {gpu.name} by arithmetic and "
        "memory bandwidth; prompts and answers half as long as their limits",
    )


def _episodes(cfg: Config) -> int:
    return cfg.rollout.prompts_per_step * cfg.rollout.group_size

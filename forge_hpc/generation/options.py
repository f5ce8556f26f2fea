"""What vLLM is started with: its environment variables and its engine arguments."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from forge_hpc.config.schema import Config
from forge_hpc.config.split import takes_turns
from forge_hpc.generation.adapter import adapter_arguments
from forge_hpc.sizing.memory import holds_a_copy

logger = logging.getLogger(__name__)
_GIB = 1 << 30
_MIN_BATCHED_TOKENS = 8192
_COMBO_KERNELS = {"combo_kernels": True, "benchmark_combo_kernel": False}
"""Kernels of queries and of keys are fused, as they may be with vLLM's defaults, but not compiled and timed before,
together and apart: half of what inductor takes for a model."""


def prepare_environment() -> None:
    """Set what vLLM reads from the environment. The only place that does; call it before ``import vllm``.

    The number of threads is not set here: OMP_NUM_THREADS belongs to whoever starts the process and knows what else
    runs on the node.
    """
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine runs in this process and is stepped by us
        VLLM_WORKER_MULTIPROC_METHOD="spawn",  # tensor-parallel workers: this process has threads and may hold CUDA
        VLLM_HOST_IP="127.0.0.1",  # an engine lives on one host: whatever vLLM binds, it binds to loopback
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # two engines on one node would be bound to the same cores
        VLLM_USE_FLASHINFER_SAMPLER="0",  # knows neither seeds per request nor processed log-probabilities
        VLLM_NO_USAGE_STATS="1",
        VLLM_DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",  # models are local directories
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def inspect_architecture(model_dir: str | Path) -> None:
    """Have vLLM look at the model's class in this process.

    vLLM 0.32 starts a process for it, which imports all of vLLM, the first time on a machine: one that forks must not
    have touched CUDA. Our workers are spawned. What cannot be looked at here is left to vLLM, which then says why.
    """
    from vllm import ModelRegistry

    try:
        for name in json.loads((Path(model_dir) / "config.json").read_text()).get("architectures") or ():
            if name in ModelRegistry.models:
                ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    except Exception as error:
        logger.info("vLLM looks at %s by itself: %s", model_dir, error)


def engine_arguments(model_dir: str | Path, config: Config, device: str) -> dict[str, Any]:
    """Keyword arguments of ``vllm.EngineArgs`` for a model directory; ``generator.engine.extra`` has the last word.

    ``device`` is ``cpu`` or ``cuda``.
    """
    engine = config.generator.engine
    max_model_len = engine.max_model_len
    if max_model_len is None:
        max_model_len = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    arguments: dict[str, Any] = {
        "model": str(model_dir),
        "dtype": config.model.dtype,
        "seed": config.seed,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "max_model_len": max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        # Room for the prompts of a whole batch in one step: vLLM's default of 2048 makes short prompts trickle in.
        "max_num_batched_tokens": max(_MIN_BATCHED_TOKENS, max_model_len, engine.max_num_seqs),
        "enable_prefix_caching": engine.enable_prefix_caching,
        # What was sampled from, after the temperature: the trainer divides its logits by the same one.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
    }
    if engine.tensor_parallel_size > 1:
        arguments["distributed_executor_backend"] = "mp"
    if device == "cpu":
        arguments["enforce_eager"] = True
        # vLLM 0.32.0 rewinds a request's own random generator after a part of a prompt, which a CPU generator cannot
        # do ("does not use offset"). A prompt always fits into one step here.
        arguments["enable_chunked_prefill"] = False
        arguments["kv_cache_memory_bytes"] = int(engine.kv_cache_memory_gib * _GIB)
        if config.algorithm.routing_replay:  # the routes of what is not computed are not seen
            arguments["enable_prefix_caching"] = False
    else:
        arguments["enforce_eager"] = engine.enforce_eager
        arguments["compilation_config"] = {}
        copy = _copy_share(Path(model_dir), config) if holds_a_copy(config) else 0.0
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization - copy
        arguments["enable_sleep_mode"] = takes_turns(config)
        if config.algorithm.routing_replay:
            arguments["enable_return_routed_experts"] = True
        if config.model.dtype != "float32":  # which FlashAttention does not take: vLLM chooses
            arguments["attention_backend"] = "FLASH_ATTN"
            arguments["hf_overrides"] = {"head_dtype": config.model.head_dtype}
    arguments |= adapter_arguments(config.trainer.lora) | engine.extra
    if device != "cpu" and isinstance(given := arguments["compilation_config"], dict):
        options = _COMBO_KERNELS | given.get("inductor_compile_config", {})
        alike = {"mode": 0, "cudagraph_mode": "FULL"} if config.model.batch_invariant else {}
        arguments["compilation_config"] = alike | given | {"inductor_compile_config": options}
    return arguments


def cache_arguments(kv_cache_bytes: int | None, device: str) -> dict[str, Any]:
    """Arguments of an engine whose KV cache has a size that is known, of each tensor-parallel worker: vLLM measures
    nothing then, and asks for no more than that to be free. Of one that is to measure, none."""
    if kv_cache_bytes is None:
        return {}
    arguments: dict[str, Any] = {"kv_cache_memory_bytes": kv_cache_bytes}
    if device == "cuda":
        import torch

        arguments["gpu_memory_utilization"] = kv_cache_bytes / torch.cuda.get_device_properties(0).total_memory
    return arguments


def _copy_share(model_dir: Path, config: Config) -> float:
    """The share of a GPU's memory that the weights take as they come from another host."""
    import torch

    from forge_hpc.generation.checkpoint import checkpoint_shapes

    num = sum(math.prod(shape) for shape in checkpoint_shapes(model_dir).values())
    itemsize = getattr(torch, config.model.dtype).itemsize
    return num * itemsize / torch.cuda.get_device_properties(0).total_memory

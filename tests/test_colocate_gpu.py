"""An engine that sleeps on a GPU, with CUDA graphs: what it gives up, and what it generates afterwards."""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from forge_hpc.config.schema import Config, SamplingConfig
from forge_hpc.data.builtin import write_tiny_qwen3
from forge_hpc.data.types import Prompt

GREEDY = SamplingConfig(temperature=0.0)
PROMPTS = [Prompt(i, "", [10 + (i * 7 + j) % 80 for j in range(6)], "") for i in range(4)]


def around_a_sleep(model_dir: Path, level: int, device: str) -> tuple[list[list[int]], list[list[int]], float]:
    """Tokens before and after, and the GiB that were free in between beyond those that were before."""
    from safetensors.torch import load_file

    from forge_hpc.generation import GenerationEngine

    config = Config()
    config.rollout.max_prompt_tokens = config.rollout.max_response_tokens = 64
    config.generator.engine.gpu_memory_utilization, config.generator.engine.sleep_level = 0.3, level
    config.generator.engine.kv_cache_memory_gib = 0.1
    config.cluster.colocate = True
    engine = GenerationEngine(model_dir, config, device=device)

    async def tokens() -> list[list[int]]:
        answers = await engine.generate_batch(PROMPTS, 1, seed=1, sampling=GREEDY)
        return [answer[0].token_ids for answer in answers if not isinstance(answer, ValueError)]

    def free() -> float:
        return torch.cuda.mem_get_info()[0] / 2**30 if device == "cuda" else 0.0

    async def scenario() -> tuple[list[list[int]], list[list[int]], float]:
        before, held = await tokens(), free()
        for _ in range(3):
            await engine.sleep()
            given = free() - held
            if level == 2:
                await engine.load_weights(1, load_file(model_dir / "model.safetensors").items())
            await engine.wake()
        return before, await tokens(), given

    try:
        return asyncio.run(scenario())
    finally:
        engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("level", [2, 1])
def test_an_engine_gives_up_its_memory_and_generates_the_same_afterwards(tmp_path: Path, level: int) -> None:
    model_dir = write_tiny_qwen3(tmp_path, seed=0, dim=64, hidden_dim=128, tie_word_embeddings=True)
    context = multiprocessing.get_context("spawn")  # vLLM's allocator serves one engine in a process
    with ProcessPoolExecutor(1, mp_context=context) as process:
        before, after, given = process.submit(around_a_sleep, model_dir, level, "cuda").result(timeout=300)
    assert before == after and any(len(answer) > 1 for answer in before)
    total = torch.cuda.mem_get_info()[1] / 2**30
    assert given > 0.2 * total  # most of the share that it had

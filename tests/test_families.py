"""Each family of models from the trainer to the generator: what is published is what is sampled from."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from tiny_models import VOCAB_SIZE, random_documents, write_model

from forge_hpc.config.schema import Config
from forge_hpc.data.types import Document, Prompt
from forge_hpc.generation import GenerationEngine
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine


def tiny_config() -> Config:
    cfg = Config()
    cfg.model.dtype = "float32"
    cfg.trainer.optimizer.lr = 1e-2
    cfg.trainer.training.seq_len = 64
    cfg.rollout.max_prompt_tokens = cfg.rollout.max_response_tokens = 30
    cfg.generator.engine.kv_cache_memory_gib = 0.1
    cfg.generator.engine.max_num_seqs = 8
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(("family", "lora"), [("qwen2", True), ("qwen3_moe", False), ("mistral", False)])
def test_the_generator_samples_from_the_weights_that_the_trainer_publishes(
    tmp_path: Path, family: str, lora: bool
) -> None:
    from forge_hpc.data.builtin import char_tokenizer

    write_model(tmp_path / "model", family, head_dim=32)  # one that vLLM's attention on the CPU has
    char_tokenizer().save_pretrained(tmp_path / "model")
    cfg = tiny_config()
    cfg.trainer.lora.enable = lora
    init_distributed(tmp_path / "store", rank=0, world_size=1, local_rank=0)
    try:
        trainer = TrainEngine(cfg, tmp_path / "model")
        before = trainer.logprobs(random_documents(2))
        trainer.train_step(random_documents(8))
        assert np.abs(np.concatenate(before) - np.concatenate(trainer.logprobs(random_documents(2)))).max() > 0.01
    finally:
        dist.destroy_process_group()  # vLLM makes its own
    generator = GenerationEngine(tmp_path / "model", cfg, device="cpu")
    try:
        asyncio.run(generator.load_weights(1, trainer.hf_state_dict().items()))
        prompt = Prompt(0, "", [5, 17, VOCAB_SIZE - 1, 9], "")
        completions = asyncio.run(generator.generate(prompt, 4, seed=1, max_tokens=20))
    finally:
        generator.close()
    num_prompt = len(prompt.token_ids)
    documents = [
        Document(
            np.array([*prompt.token_ids, *completion.token_ids], dtype=np.int32),
            np.arange(num_prompt + len(completion.token_ids)) >= num_prompt,
        )
        for completion in completions
    ]
    for completion, logprobs in zip(completions, trainer.logprobs(documents), strict=True):
        np.testing.assert_allclose(completion.logprobs, logprobs[num_prompt:], atol=1e-4)

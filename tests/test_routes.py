"""Routes of experts from the generator to the trainer (R3): the engine's process, then the trainer's process group."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from test_experts import routed
from test_families import tiny_config
from tiny_models import VOCAB_SIZE, write_model

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config
from forge_hpc.data.types import Completion, Document, Prompt
from forge_hpc.generation import GenerationEngine
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine

RATIO = 0.3
"""Mismatch with the generator's routes over that without them, at most."""


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, list[Document]]:
    """What a generator in bfloat16 has sampled after it got its weights by an update, with its routes."""
    directory = tmp_path_factory.mktemp("sampled")
    from forge_hpc.data.builtin import char_tokenizer

    experts = {"num_experts": 64, "num_hidden_layers": 4, "head_dim": 32}
    write_model(directory / "model", "qwen3_moe", **experts)
    write_model(directory / "stale", "qwen3_moe", seed=1, **experts)
    char_tokenizer().save_pretrained(directory / "stale")
    cfg = tiny_config()
    cfg.model.dtype = "bfloat16"
    cfg.algorithm.routing_replay = True
    generator = GenerationEngine(directory / "stale", cfg, device="cpu")
    try:
        asyncio.run(generator.load_weights(1, load_file(directory / "model/model.safetensors").items()))
        draw = np.random.default_rng(0)
        prompts = [Prompt(i, "", draw.integers(0, VOCAB_SIZE, 4 + i).tolist(), "") for i in range(8)]
        answers: Any = asyncio.run(generator.generate_batch(prompts, 4, seed=1, max_tokens=24))
    finally:
        generator.close()
    pairs = [(prompt, completion) for prompt, some in zip(prompts, answers, strict=True) for completion in some]
    return directory / "model", cfg, [document(*pair) for pair in pairs]


def document(prompt: Prompt, completion: Completion) -> Document:
    ids = np.array([*prompt.token_ids, *completion.token_ids], np.int32)
    logprobs = np.zeros(len(ids), np.float32)
    logprobs[len(prompt.token_ids) :] = completion.logprobs
    mask = np.arange(len(ids)) >= len(prompt.token_ids)
    return Document(ids, mask, logprobs, advantage=1.0, routes=completion.routes)


@pytest.mark.slow
def test_the_trainer_takes_the_experts_that_sampled_and_so_differs_less_from_the_generator(
    sampled: tuple[Path, Config, list[Document]], tmp_path: Path
) -> None:
    model_dir, cfg, documents = sampled
    init_distributed(tmp_path / "store", rank=0, world_size=1, local_rank=0)
    try:
        compare(model_dir, cfg, documents)
    finally:
        dist.destroy_process_group()


def compare(model_dir: Path, cfg: Config, documents: list[Document]) -> None:
    engine = TrainEngine(cfg, model_dir)
    for ours, document in zip(routed(engine, documents), documents, strict=True):
        assert document.routes is not None and document.routes.dtype == np.int16
        assert np.array_equal(ours, document.routes)
    own = [dataclasses.replace(document, routes=None) for document in documents]
    differing = [
        (np.sort(ours) != np.sort(document.routes)).any(-1).mean()
        for ours, document in zip(routed(engine, own), documents, strict=True)
    ]
    assert 0 < np.mean(differing) < 0.2, "rounding changes some routes, and no more"
    replayed = engine.train_step(documents, update=False)
    with pytest.raises(UserError, match="the documents have no routes"):
        engine.train_step(own)
    cfg.algorithm.routing_replay = False
    without = TrainEngine(cfg, model_dir).train_step(documents, update=False)
    assert replayed["mismatch/logprob_abs_mean"] <= RATIO * without["mismatch/logprob_abs_mean"]

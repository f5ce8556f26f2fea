"""Adapters sent to vLLM as adapters: the log-probabilities of the merged weights, at a small part of their bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from runs import REWARD, read, run_local, small_run
from test_generation import GREEDY, prompts, tiny_config
from tiny_models import random_documents

from forge_hpc.config import UserError, load_config, validate
from forge_hpc.config.schema import Config
from forge_hpc.data.builtin import write_tiny_qwen3
from forge_hpc.data.types import Completion, Document, Prompt
from forge_hpc.generation import GenerationEngine
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As everywhere, but that vLLM ends the default group with its engine."""
    init_distributed(tmp_path_factory.mktemp("store") / "store", rank=0, world_size=1, local_rank=0, timeout_s=60)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def config(publish: str) -> Config:
    cfg = tiny_config()
    cfg.recipe, cfg.seed = "sft", 3
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_response_tokens = 8, 16
    cfg.trainer.lora.enable, cfg.trainer.lora.publish = True, publish
    cfg.trainer.lora.rank, cfg.trainer.lora.alpha = 4, 12.0  # vLLM's smallest place is 8
    cfg.trainer.optimizer.lr = 1e-2
    cfg.trainer.training.seq_len = 64
    return cfg


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return write_tiny_qwen3(directory, seed=0, dim=64, hidden_dim=128, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def trainer(model_dir: Path) -> TrainEngine:
    engine = TrainEngine(config("adapters"), model_dir)
    for _ in range(3):
        engine.train_step(random_documents(9, with_logprobs=False))
    return engine


@pytest.fixture(scope="module")
def engines(model_dir: Path) -> Iterator[dict[str, GenerationEngine]]:
    engines = {name: GenerationEngine(model_dir, config(name), device="cpu") for name in ("merged", "adapters")}
    yield engines
    for engine in engines.values():
        engine.close()


def answer(engine: GenerationEngine) -> list[Completion]:
    results = asyncio.run(engine.generate_batch(prompts(3), 1, seed=1, sampling=GREEDY))
    return [completion for [completion] in results]


def document(prompt: Prompt, completion: Completion) -> Document:
    ids = np.array([*prompt.token_ids, *completion.token_ids], np.int32)
    return Document(token_ids=ids, loss_mask=np.arange(len(ids)) >= len(prompt.token_ids))


def test_an_engine_with_adapters_computes_what_one_with_merged_weights_does(
    engines: dict[str, GenerationEngine], trainer: TrainEngine
) -> None:
    merged, adapters = engines["merged"], engines["adapters"]
    before = answer(adapters)
    assert [c.token_ids for c in before] == [c.token_ids for c in answer(merged)]  # no adapter yet: the base
    asyncio.run(merged.load_weights(1, trainer.hf_state_dict().items()))
    published = trainer.published(cast=False)
    asyncio.run(adapters.load_weights(1, published.items()))
    ours, theirs = answer(adapters), answer(merged)
    assert [c.token_ids for c in ours] != [c.token_ids for c in before]
    trained = trainer.logprobs([document(p, c) for p, c in zip(prompts(3), ours, strict=True)])
    for one, other, logprobs in zip(ours, theirs, trained, strict=True):
        assert one.token_ids == other.token_ids and one.policy_versions == (1, 1)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        np.testing.assert_allclose(one.logprobs, logprobs[-len(one.token_ids) :], atol=1e-4)
    again = answer(adapters)
    assert [c.logprobs for c in again] == [c.logprobs for c in ours]  # to the last bit

    parameters = {parameter.data_ptr() for parameter in trainer.model.parameters()}
    assert {tensor.data_ptr() for tensor in published.values()} <= parameters  # no copy in the trainer

    asyncio.run(adapters.load_weights(2, {name: 0 * tensor for name, tensor in published.items()}.items()))
    assert [c.token_ids for c in answer(adapters)] == [c.token_ids for c in before]
    assert adapters.policy_version == 2


def test_adapters_that_are_not_those_of_the_model_are_refused_and_change_nothing(
    engines: dict[str, GenerationEngine], trainer: TrainEngine
) -> None:
    adapters, published = engines["adapters"], trainer.published()
    before = answer(adapters)
    first, *others = published
    extra = {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 8)}
    wrong = [published | extra, {name: published[name] for name in others}, published | {first: torch.zeros(8, 8)}]
    for tensors, what in zip(wrong, ("unknown", "missing", "of another shape"), strict=True):
        with pytest.raises(ValueError, match=f"do not match the model's checkpoint: 1 {what}"):
            asyncio.run(adapters.load_weights(9, tensors.items()))
    assert [c.logprobs for c in answer(adapters)] == [c.logprobs for c in before]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "there are no adapters"),
        (["trainer.lora.enable=true", "trainer.lora.rank=600"], "vLLM takes adapters of rank 512 at most"),
        (["trainer.lora.enable=true", "cluster.colocate=true", "cluster.gpus_per_node=1"], "with cluster.colocate"),
        (["trainer.lora.enable=true", "trainer.lora.target_modules=[lm_head]"], "target_modules is 'lm_head'"),
    ],
)
def test_what_vllm_does_not_take_as_adapters_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(load_config(None, ["trainer.lora.publish=adapters", *overrides]))


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_in_a_run_that_sends_adapters_trainer_and_generator_agree_at_every_step(tmp_path: Path) -> None:
    adapters = ["trainer.lora.enable=true", "trainer.lora.rank=4", "trainer.lora.publish=adapters"]
    result = run_local(tmp_path / "run", small_run(tmp_path, 4, REWARD, *adapters))
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = read(tmp_path / "run")
    assert [record["policy_version"] for record in metrics] == [1, 2, 3, 4]
    assert all(0 < record["mismatch/logprob_abs_mean"] < 1e-5 for record in metrics)
    assert all(record["grad_norm"] > 0 for record in metrics)

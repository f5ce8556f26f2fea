"""A config that says tied beside a file with a head of its own: the file is right, as for transformers and vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, random_documents, write_model
from transformers import AutoModelForCausalLM

from forge_hpc.config.schema import Config
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.types import Document, Prompt
from forge_hpc.generation import GenerationEngine
from forge_hpc.models.spec import shares_head
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine


def write_with_head(directory: Path, family: str, *, own: bool, head_dim: int = 16) -> Path:
    """A model whose config says tied, and whose file holds a head: one of its own, or a copy of the embedding."""
    write_model(directory, family, tied=True, head_dim=head_dim)
    weights = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in weights
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = torch.randn_like(embedding) * 0.1 if own else embedding.clone()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    char_tokenizer().save_pretrained(directory)
    return directory


def config() -> Config:
    cfg = Config()
    cfg.model.dtype = "float32"
    cfg.trainer.optimizer.lr = 1e-2
    cfg.trainer.training.seq_len = 64
    cfg.checkpoint.async_save = False
    cfg.rollout.max_prompt_tokens = cfg.rollout.max_response_tokens = 30
    cfg.generator.engine.kv_cache_memory_gib = 0.1
    cfg.generator.engine.max_num_seqs = 8
    return cfg


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    init_distributed(tmp_path / "store", rank=0, world_size=1, local_rank=0, timeout_s=60)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def logprobs_of_transformers(directory: Path, documents: list[Document]) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for document in documents:
        ids = torch.from_numpy(document.token_ids).long()
        with torch.no_grad():
            p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        found.append(p.gather(1, ids[1:, None])[:, 0].numpy())
    return found


def assert_as_in_transformers(engine: TrainEngine, directory: Path) -> None:
    documents = random_documents(4)
    theirs = logprobs_of_transformers(directory, documents)
    for document, ours, other in zip(documents, engine.logprobs(documents), theirs, strict=True):
        np.testing.assert_allclose(ours[document.loss_mask], other[document.loss_mask[1:]], atol=1e-4)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_a_head_of_its_own_in_the_file_wins_over_a_config_that_says_tied(tmp_path: Path, family: str) -> None:
    directory = write_with_head(tmp_path / "model", family, own=True)
    engine = TrainEngine(config(), directory)
    assert_as_in_transformers(engine, directory)
    published = engine.hf_state_dict()
    assert not torch.equal(published["lm_head.weight"], published["model.embed_tokens.weight"])

    engine.train_step(random_documents(8))
    engine.export(tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_as_in_transformers(engine, tmp_path / "export")
    assert_as_in_transformers(TrainEngine(config(), tmp_path / "export"), tmp_path / "export")


@pytest.mark.usefixtures("process_group")
def test_a_copy_of_the_embedding_in_the_file_is_tied(tmp_path: Path) -> None:
    directory = write_with_head(tmp_path / "model", "qwen3", own=False)
    engine = TrainEngine(config(), directory)
    engine.train_step(random_documents(8))
    published = engine.hf_state_dict()
    assert torch.equal(published["lm_head.weight"], published["model.embed_tokens.weight"])
    engine.export(tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is True
    assert_as_in_transformers(engine, tmp_path / "export")


def test_weights_in_several_files_are_compared_too(tmp_path: Path) -> None:
    directory = write_with_head(tmp_path, "qwen3", own=True)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    save_file({"lm_head.weight": weights.pop("lm_head.weight")}, directory / "model-00002-of-00002.safetensors")
    save_file(weights, directory / "model-00001-of-00002.safetensors")
    hf = json.loads((directory / "config.json").read_text())
    assert not shares_head(directory, hf)
    (directory / "model-00002-of-00002.safetensors").unlink()
    assert shares_head(directory, hf)
    assert not shares_head(directory, hf | {"tie_word_embeddings": False})


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("own", [True, False], ids=["own head", "copy"])
def test_generator_and_trainer_agree_on_the_head_before_and_after_an_update(tmp_path: Path, own: bool) -> None:
    directory = write_with_head(tmp_path / "model", "qwen3", own=own, head_dim=32)
    trainer = TrainEngine(config(), directory)
    prompt = Prompt(0, "", [5, 17, VOCAB_SIZE - 1, 9], "")

    def worst_difference() -> float:
        [completion] = asyncio.run(generator.generate(prompt, 1, seed=1, max_tokens=20))
        ids = np.array([*prompt.token_ids, *completion.token_ids], dtype=np.int32)
        [logprobs] = trainer.logprobs([Document(ids, np.arange(len(ids)) >= 4)])
        return float(np.abs(np.array(completion.logprobs) - logprobs[4:]).max())

    documents = random_documents(8)
    before = trainer.logprobs(documents)
    generator = GenerationEngine(directory, config(), device="cpu")
    try:
        assert worst_difference() < 1e-4
        trainer.train_step(documents)
        assert np.abs(np.concatenate(before) - np.concatenate(trainer.logprobs(documents))).max() > 0.01
        asyncio.run(generator.load_weights(1, trainer.hf_state_dict().items()))
        assert worst_difference() < 1e-4
    finally:
        generator.close()

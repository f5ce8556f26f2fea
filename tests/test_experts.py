"""Mixtures of experts: on several ranks, from the trainer to the generator, and with the generator's routes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_train_engine import NUM_DOCUMENTS, assert_close, assert_equal, assert_same_training, config, full, two_steps
from tiny_models import random_documents, write_model

from forge_hpc.config.errors import UserError
from forge_hpc.data.packing import pack
from forge_hpc.data.types import Document
from forge_hpc.expert_stacks import parts
from forge_hpc.models.experts import Router
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine
from forge_hpc.weights.layout import Assembly, Manifest, build_index, plan

# ---- two ranks

CASES = {
    "FSDP": {"data_parallel_shard_degree": 2},
    "EP": {"expert_parallel_degree": 2},
    "EP and TP": {"expert_parallel_degree": 2, "tensor_parallel_degree": 2},
}


def whole(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """The weights by Hugging Face name, of all ranks together."""
    named = [parts(name, full(tensor)) for name, tensor in engine.hf_state_dict().items()]
    return {name: tensor.clone() for some in named for name, tensor in some.items()}


def published(engine: TrainEngine, rank: int) -> tuple[Manifest, list[torch.Tensor]]:
    """What this rank offers to generators, and its bytes."""
    weights = engine.hf_state_dict(cast=False)
    manifest, sources = plan(weights, version=1, rank=rank, dtype=None, max_bucket_bytes=20_000)
    buckets = [torch.zeros(size, dtype=torch.uint8) for size in manifest.bucket_bytes]
    for shard, source in sources.items():
        shard.view(buckets[shard.bucket]).copy_(source)
    return manifest, buckets


def pulled(offers: list[tuple[Manifest, list[torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """What a generator makes of it."""
    index = build_index([manifest for manifest, _ in offers])
    assembly = Assembly(index)
    for rank, bucket in index.buckets():
        assembly.add(rank, bucket, offers[rank][1][bucket])
    return assembly.result()


def two_rank_worker(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(directory / "store", rank, 2, rank, timeout_s=120)
    for name, degrees in CASES.items():
        cfg = config()
        for key, value in degrees.items():
            setattr(cfg.trainer.parallelism, key, value)
        engine = TrainEngine(cfg, directory / "model")
        result = two_steps(engine) | {"weights": whole(engine)}
        engine.save(directory / name / "trainer")
        engine.export(directory / name / "export")
        result["published"] = published(engine, rank)
        resumed = TrainEngine(cfg, directory / "model")
        resumed.load(directory / name / "trainer")
        result["next"] = [e.train_step(random_documents(NUM_DOCUMENTS)) for e in (engine, resumed)]
        torch.save(result, directory / name / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two_ranks")
    write_model(directory / "model", "qwen3_moe")
    (directory / "model/tokenizer.json").write_text("{}")
    mp.spawn(two_rank_worker, (directory,), nprocs=2)
    return directory


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_experts_as_one_does_and_publish_export_and_resume_all_of_them(
    two_ranks: Path, case: str
) -> None:
    results = [torch.load(two_ranks / case / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
    one = TrainEngine(config(), two_ranks / "model")
    expected = two_steps(one)
    for result in results:
        assert_same_training(result, expected)
    trained = results[0]["weights"]
    assert trained.keys() == load_file(two_ranks / "model/model.safetensors").keys()
    assert_equal(pulled([result["published"] for result in results]), trained)
    assert_equal(load_file(two_ranks / case / "export/model.safetensors"), trained)
    assert results[0]["next"] == results[1]["next"]
    continued, resumed = results[0]["next"]
    assert continued == resumed
    engine = TrainEngine(config(), two_ranks / "model")
    engine.load(two_ranks / case / "trainer")
    assert_equal(whole(engine), trained)


# ---- replayed routes


def routed(engine: TrainEngine, documents: list[Document]) -> list[np.ndarray]:
    """The experts that the trainer takes for each document's tokens: [L - 1, layers, k]."""
    routers = [module for module in engine.model.modules() if isinstance(module, Router)]
    taken: dict[Router, list[torch.Tensor]] = {router: [] for router in routers}
    hooks = [router.register_forward_hook(lambda own, _, output: taken[own].append(output[1])) for router in routers]
    engine.logprobs(documents)
    for hook in hooks:
        hook.remove()
    rows = torch.stack([torch.cat(layer) for layer in taken.values()], 2).numpy()
    batch = engine._pack(documents)
    return [
        rows[row, start : start + len(document.token_ids) - 1]
        for document, (row, start) in zip(documents, batch.placements, strict=True)
    ]


@pytest.mark.usefixtures("process_group")
def test_routes_that_are_the_trainers_own_change_nothing_and_others_teach_the_gate(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3_moe")
    documents = random_documents(NUM_DOCUMENTS)
    engine, other = TrainEngine(config(), tmp_path), TrainEngine(config(routing_replay=True), tmp_path)
    own = routed(engine, documents)
    same = [dataclasses.replace(d, routes=routes) for d, routes in zip(documents, own, strict=True)]
    assert engine.train_step(documents)["loss"] == other.train_step(same)["loss"]
    assert_close(whole(engine), whole(other), atol=0)
    changed = [dataclasses.replace(d, routes=(routes + 1) % 4) for d, routes in zip(documents, own, strict=True)]
    assert other.train_step(changed)["loss"] != engine.train_step(documents)["loss"]
    gates = [full(p.grad) for name, p in other.model.named_parameters() if name.endswith("router.gate.weight")]
    assert all(gate.abs().max() > 0 for gate in gates)


def test_documents_with_routes_of_other_sizes_are_refused() -> None:
    first, second, *_ = random_documents(2)
    first.routes = np.zeros((len(first.token_ids) - 1, 2, 2), np.int16)
    with pytest.raises(ValueError, match="1 of 2 documents have routes"):
        pack([first, second], 64)
    second.routes = np.zeros((len(second.token_ids), 2, 2), np.int16)
    with pytest.raises(ValueError, match=r"document 1 has .* routes of shape"):
        pack([first, second], 64)


@pytest.mark.usefixtures("process_group")
def test_a_dense_model_has_no_routes_to_replay(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3")
    with pytest.raises(UserError, match="has no experts"):
        TrainEngine(config(routing_replay=True), tmp_path)

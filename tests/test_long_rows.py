"""Rows that several ranks share: who holds which slots, four ranks against one, and two with what stands beside the
policy. What two do by themselves is told in test_train_engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tiny_models import random_documents, write_model
from torch.distributed.tensor import DTensor

import forge_hpc.models.context as context
from forge_hpc.config.needs import ModelNeed
from forge_hpc.config.schema import Config
from forge_hpc.data.packing import pack
from forge_hpc.data.row_shares import pieces, row_shares
from forge_hpc.data.types import Document
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine
from forge_hpc.training.frozen import FrozenModel
from forge_hpc.training.models import Models

pytestmark = pytest.mark.usefixtures("process_group")


def rows_of(*rows: list[int]) -> np.ndarray:
    """Positions of rows of documents of these lengths."""
    return np.stack([np.concatenate([np.arange(length) for length in row]) for row in rows])


ROWS = rows_of([41, 9, 14], [64], [3, 61], [16, 16, 16, 16])


# ---- shares


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_slot_belongs_to_one_rank_and_every_rank_has_as_many_of_each_row(num_ranks: int) -> None:
    shares = row_shares(ROWS, num_ranks)
    assert sorted(shares.reshape(-1)) == list(range(ROWS.size))
    for share in shares:
        assert np.all(np.diff(share) > 0)
        assert np.all(np.bincount(share // ROWS.shape[1]) == ROWS.shape[1] // num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_keys_of_a_piece_are_its_document_up_to_its_last_slot(num_ranks: int) -> None:
    for share in row_shares(ROWS, num_ranks):
        own = pieces(ROWS, share)
        slots, keys = iter(share), iter(own.keys)
        for num_queries, num_keys in zip(own.num_queries, own.num_keys, strict=True):
            queries = [int(next(slots)) for _ in range(num_queries)]
            assert queries == list(range(queries[0], queries[-1] + 1))
            first = queries[0] - ROWS.reshape(-1)[queries[0]]
            assert [int(next(keys)) for _ in range(num_keys)] == list(range(first, queries[-1] + 1))
        assert not [*slots, *keys]
        assert np.bincount(own.keys).max() <= 2  # the sum of more gradients would depend on their order


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_the_ranks_of_a_long_document_attend_to_about_as_much(num_ranks: int) -> None:
    for lengths, most in (
        ([1024], 1.01),
        ([1024 - 128, 128], 1.35),
    ):  # in order, the last of eight has 1.7 times the mean
        positions = rows_of(lengths)
        costs = [(positions[0, share] + 1).sum() for share in row_shares(positions, num_ranks)]
        assert max(costs) < most * np.mean(costs)


# ---- attention


def by_numbers(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **options: Any) -> torch.Tensor:
    """What a varlen kernel computes: its causal mask has the last query see the last key."""
    assert options["window_size"] == (-1, 0) and (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    outputs = []
    for (q0, q1), (k0, k1) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        mask = torch.ones(q1 - q0, k1 - k0).tril(k1 - k0 - (q1 - q0)).bool()
        parts = (x[a:b].transpose(0, 1)[None].float() for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1)))
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=options["enable_gqa"])
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("varlen", [True, False], ids=["varlen", "plain"])
def test_a_rank_attends_within_documents_from_its_slots_to_all_that_stand_before(
    varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "varlen_attn", by_numbers)  # the kernel itself is CUDA's
    group = dist.group.WORLD
    assert group is not None
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*ROWS.shape, heads, 16, generator=rng).bfloat16().float() for heads in (4, 2, 2))
    places = torch.arange(ROWS.size)
    expected = []
    for slot, position in enumerate(ROWS.reshape(-1)):
        keys, values = (
            x.flatten(0, 1)[slot - position : slot + 1].repeat_interleave(2, dim=1).transpose(0, 1) for x in (k, v)
        )
        query = q.flatten(0, 1)[slot][:, None]
        expected.append(F.scaled_dot_product_attention(query[None], keys[None], values[None])[0, :, 0])
    for share in row_shares(ROWS, 4):
        shared = context.SharedRows(share, places.numpy(), (torch.from_numpy(share), places), group.group_name)
        inputs = context.context_inputs(ROWS, shared, varlen=varlen)
        own = q.flatten(0, 1)[share].unflatten(0, (len(ROWS), -1))
        attention = context.ContextAttention.Config(varlen=varlen).build()
        ours = attention(own, k, v, attention_masks=inputs, enable_gqa=True)
        torch.testing.assert_close(ours.flatten(0, 1), torch.stack(expected)[share], atol=1e-5, rtol=0)


def test_the_attention_of_shared_rows_compiles_into_one_graph() -> None:
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(0)
    attention = context.ContextAttention.Config().build()
    shared = context.shared_rows(ROWS, group, torch.device("cpu"))
    inputs = context.context_inputs(ROWS, shared, varlen=False)
    qkv = [torch.randn(*ROWS.shape, 2, 16, requires_grad=True) for _ in range(3)]

    def run(function: Any) -> list[torch.Tensor]:
        out = function(*qkv, attention_masks=inputs)
        return [out, *torch.autograd.grad(out.square().sum(), qkv)]

    compiled = torch.compile(attention.forward, backend="aot_eager", fullgraph=True)  # as TorchTitan compiles layers
    for ours, eager in zip(run(compiled), run(attention.forward), strict=True):
        torch.testing.assert_close(ours, eager)


# ---- four ranks

CASES: dict[str, tuple[str, dict[str, int], ModelNeed]] = {
    "GRPO, two rows at a time": ("qwen3", {"context_parallel_degree": 2, "data_parallel_shard_degree": 2}, ModelNeed()),
    "replicated": ("qwen3", {"context_parallel_degree": 2, "data_parallel_replicate_degree": 2}, ModelNeed()),
    "GSPO": ("llama", {"context_parallel_degree": 4}, ModelNeed(loss="gspo")),
    "DPO": ("qwen3", {"context_parallel_degree": 4}, ModelNeed(loss="forge_hpc.losses.dpo:DPOLoss")),
    "SFT": ("qwen3", {"context_parallel_degree": 4}, ModelNeed(loss="sft")),
    "critic": ("qwen3", {"context_parallel_degree": 4}, ModelNeed(head="value")),
    "TP": ("qwen3", {"context_parallel_degree": 2, "tensor_parallel_degree": 2}, ModelNeed()),
    # Rows of one rank: the tied embeddings are cut twice, and padded.
    "FSDP and TP": ("qwen3", {"data_parallel_shard_degree": 2, "tensor_parallel_degree": 2}, ModelNeed()),
    "experts": ("qwen3_moe", {"context_parallel_degree": 2, "data_parallel_shard_degree": 2}, ModelNeed()),
}
"""Name: (family, degrees, what is trained)."""


def documents() -> list[Document]:
    """Six pairs, one of them as long as a row but for a slot, and single ones."""
    rng = np.random.default_rng(1)
    found = random_documents(6, max_tokens=20) + random_documents(8, seed=1, max_tokens=32)
    long = random_documents(1, seed=2, max_tokens=32)[0]
    found[-2] = _longer(long, 46, rng)
    found[-1] = _longer(long, 18, rng)
    for index, document in enumerate(found):
        document.group = index // 2 if index > 5 else 100 + index // 2
        document.columns = {"side": 1.0 - 2 * (index % 2), "returns": document.loss_mask * rng.normal()}
    return found


def _longer(document: Document, num_tokens: int, rng: np.random.Generator) -> Document:
    mask = np.arange(num_tokens) >= 3
    logprobs = np.where(mask, rng.uniform(-5.0, -3.0, num_tokens), 0).astype(np.float32)
    ids = rng.integers(0, 60, num_tokens).astype(np.int32)
    return Document(ids, mask, generator_logprobs=logprobs, advantage=1.5, ref_logprobs=logprobs)


def steps(model_dir: Path, need: ModelNeed, **degrees: int) -> dict[str, Any]:
    """What a model says of the documents, and what two steps on them make of it."""
    cfg = Config()
    cfg.model.dtype = "float32"
    cfg.algorithm.kl_coef = 0.1
    cfg.algorithm.entropy_coef = 0.01
    cfg.trainer.optimizer.lr = 1e-3
    cfg.trainer.training.seq_len = 64
    cfg.checkpoint.async_save = False
    for name, value in degrees.items():
        setattr(cfg.trainer.parallelism, name, value)
    engine = TrainEngine(cfg, model_dir, need)
    found = documents()
    says = engine.values if need.head == "value" else engine.logprobs
    result: dict[str, Any] = {"says": says(found), "metrics": [engine.train_step(found)]}
    named = engine.model.named_parameters()
    result["gradients"] = {name: _full(p.grad) for name, p in named if p.grad is not None}
    result["metrics"].append(engine.train_step(found))
    return result


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def worker(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(directory / "store", rank, 4, rank, timeout_s=300)
    for name, (family, degrees, need) in CASES.items():
        torch.save(steps(directory / family, need, **degrees), directory / f"{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("four_ranks")
    for family in {family for family, _, _ in CASES.values()}:
        write_model(directory / family, family, tied=True)
    mp.spawn(worker, (directory,), nprocs=4)
    return directory


def test_documents_of_the_four_ranks_are_cut() -> None:
    batch = pack(documents(), 64, row_len_multiple=32)
    positions = batch.rows(0, batch.num_rows)["positions"]
    cuts = [np.count_nonzero(positions.reshape(-1)[share[0]] > 0) for share in row_shares(positions, 4)]
    assert any(cuts) and positions.max() >= 44


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_rows_train_as_one_does(four_ranks: Path, case: str) -> None:
    family, _, need = CASES[case]
    expected = steps(four_ranks / family, need)
    for rank in range(4):
        ours = torch.load(four_ranks / f"{case}-{rank}.pt", weights_only=False)
        for actual, wanted in zip(ours["metrics"], expected["metrics"], strict=True):
            assert actual.keys() == wanted.keys()
            for name in wanted.keys() - {"tokens/fill"}:
                assert actual[name] == pytest.approx(wanted[name], abs=1e-5, rel=1e-5), name
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(ours["gradients"][name], gradient, atol=1e-5, rtol=1e-5, msg=name)
        for actual, wanted in zip(ours["says"], expected["says"], strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-5, rtol=0)


# ---- two ranks: what stands beside the policy

BESIDE = ("LoRA", "frozen reference", "LoRA critic", "frozen reward model")


def beside(directory: Path, case: str, degree: int) -> dict[str, Any]:
    """What two steps make of a policy and of what stands beside it, rows being shared by so many ranks."""
    cfg = Config()
    cfg.model.dtype = "float32"
    cfg.algorithm.kl_coef = 0.5
    cfg.reference.enable = True
    cfg.trainer.optimizer.lr = 1e-2
    cfg.trainer.lora.enable = case.startswith("LoRA")
    cfg.trainer.lora.rank = 4
    cfg.trainer.training.seq_len = 64
    cfg.trainer.parallelism.context_parallel_degree = degree
    found = documents()
    if case == "frozen reward model":
        need = ModelNeed(trained=False, head="value", path=str(directory / "reward"))
        return {"says": FrozenModel(cfg, directory / "reward", need, cfg.rollout.sampling).values(found)}
    needs = {"policy": ModelNeed(), "reference": ModelNeed(trained=False), "critic": ModelNeed(head="value")}
    del needs["reference" if case == "LoRA critic" else "critic"]
    models = Models(cfg, needs, {"policy": directory / "qwen3"})
    name, result = "critic" if "critic" in needs else "policy", {"metrics": [], "says": [], "gradients": []}
    for _ in range(3):
        result["says"] += models.values("critic", found) if name == "critic" else models.logprobs("reference", found)
        result["metrics"].append(models.train_step(name, found, update=True, max_mismatch=np.inf))
        named = models.trained[name].model.named_parameters()
        result["gradients"].append({key: _full(p.grad) for key, p in named if p.grad is not None})
    result["weights"] = {key: _full(value) for key, value in models.trained[name].hf_state_dict().items()}
    return result


def worker_beside(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(directory / "store", rank, 2, rank, timeout_s=300)
    for case in BESIDE:
        torch.save(beside(directory, case, 2), directory / f"{case}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, process_group: None) -> Path:
    directory = tmp_path_factory.mktemp("two_ranks")
    write_model(directory / "qwen3", "qwen3", tied=True)
    cfg = Config()
    cfg.model.dtype, cfg.trainer.training.seq_len, cfg.trainer.optimizer.lr = "float32", 64, 1e-2
    reward = TrainEngine(cfg, directory / "qwen3", ModelNeed(head="value"))
    reward.train_step(documents())
    reward.export(directory / "reward")
    mp.spawn(worker_beside, (directory,), nprocs=2)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("case", BESIDE)
def test_what_stands_beside_the_policy_is_the_same_where_two_ranks_share_rows(two_ranks: Path, case: str) -> None:
    expected = beside(two_ranks, case, 1)
    for rank in range(2):
        ours = torch.load(two_ranks / f"{case}-{rank}.pt", weights_only=False)
        for actual, wanted in zip(ours["says"], expected["says"], strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-4, rtol=0)
        if case == "frozen reward model":
            assert any(np.abs(says).max() > 0.01 for says in ours["says"])
            continue
        for actual, wanted in zip(ours["metrics"], expected["metrics"], strict=True):
            for name in wanted.keys() - {"tokens/fill"}:
                assert actual[name] == pytest.approx(wanted[name], abs=1e-4, rel=1e-4), name
        for actual, wanted in zip(ours["gradients"], expected["gradients"], strict=True):
            assert actual.keys() == wanted.keys()
            for name, gradient in wanted.items():
                torch.testing.assert_close(actual[name], gradient, atol=1e-4, rtol=1e-3, msg=name)
        if case != "LoRA critic":
            first, second, third = (metrics["kl/mean"] for metrics in ours["metrics"])
            assert abs(first) < 1e-6 and second > 1e-3 and third > 1e-3, "the reference stays what it was"
        moved = [(value - expected["weights"][name]).abs().max() for name, value in ours["weights"].items()]
        assert max(moved) < 1e-2

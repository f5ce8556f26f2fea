"""LoRA: adapters alone are trained and saved; what leaves the trainer has them merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tiny_models import random_documents, write_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from forge_hpc.config import load_config, validate
from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine

pytestmark = pytest.mark.usefixtures("process_group")

RANK, ALPHA = 4, 12.0


def config(**parallelism: int) -> Config:
    cfg = Config(recipe="sft", seed=3)
    cfg.model.dtype = "float32"
    cfg.trainer.lora.enable = True
    cfg.trainer.lora.rank, cfg.trainer.lora.alpha = RANK, ALPHA
    cfg.trainer.optimizer.lr = 1e-2
    cfg.trainer.training.seq_len = 64
    cfg.trainer.training.local_batch_size = 2
    cfg.checkpoint.async_save = False
    for name, value in parallelism.items():
        setattr(cfg.trainer.parallelism, name, value)
    return cfg


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def adapters(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: full(p).detach().clone() for name, p in engine.model.named_parameters() if ".lora_" in name}


def documents() -> Any:
    return random_documents(9, with_logprobs=False)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases and tied embeddings: the family with the most that must stay as it is."""
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, "qwen2", tied=True)
    return directory


@pytest.fixture(scope="module")
def trained(model_dir: Path) -> dict[str, Any]:
    return three_steps(TrainEngine(config(), model_dir))


def three_steps(engine: TrainEngine) -> dict[str, Any]:
    metrics = [engine.train_step(documents()) for _ in range(3)]
    return {
        "metrics": metrics,
        "logprobs": engine.logprobs(documents()),
        "adapters": adapters(engine),
        "weights": {name: full(tensor).clone() for name, tensor in engine.hf_state_dict().items()},
    }


def test_before_the_first_step_the_model_is_the_base(model_dir: Path) -> None:
    engine = TrainEngine(config(), model_dir)
    base = load_file(model_dir / "model.safetensors")
    state = engine.hf_state_dict()
    assert state.keys() == base.keys() | {"lm_head.weight"}
    assert all(torch.equal(state[name], base[name]) for name in base)
    cfg = config()
    cfg.trainer.lora.enable = False
    for ours, theirs in zip(
        engine.logprobs(documents()), TrainEngine(cfg, model_dir).logprobs(documents()), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_adapters_alone_are_trained_and_what_is_published_is_the_base_and_they(
    model_dir: Path, trained: dict[str, Any]
) -> None:
    engine = TrainEngine(config(), model_dir)
    assert adapters(engine).keys() == {n for n, p in engine.model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for o in engine.optimizers for group in o.param_groups) == len(adapters(engine))
    base, weights = load_file(model_dir / "model.safetensors"), trained["weights"]
    names = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj"}
    names |= {"w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
    updated = set()
    for name, a in trained["adapters"].items():
        if name.endswith(".lora_a.weight"):
            prefix = name.removesuffix(".lora_a.weight")
            b = trained["adapters"][f"{prefix}.lora_b.weight"]
            hf_name = f"model.layers.{prefix.split('.')[1]}.{names[prefix.split('.')[-1]]}.weight"
            torch.testing.assert_close(weights[hf_name], base[hf_name] + ALPHA / RANK * b @ a, atol=1e-6, rtol=0)
            assert (weights[hf_name] - base[hf_name]).abs().max() > 1e-3
            updated.add(hf_name)
    assert len(updated) == 14  # two layers
    assert all(torch.equal(weights[name], base[name]) for name in base.keys() - updated)


def test_the_export_gives_the_trainers_log_probabilities_in_transformers(model_dir: Path, tmp_path: Path) -> None:
    engine = TrainEngine(config(), model_dir)
    for _ in range(3):
        engine.train_step(documents())
    engine.export(tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        for document, logprobs in zip(documents(), engine.logprobs(documents()), strict=True):
            ids = torch.from_numpy(document.token_ids).long()
            p = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            np.testing.assert_allclose(logprobs[1:], np.where(document.loss_mask[1:], p, 0), atol=1e-4)


def test_adapters_learn_and_follow_the_seed(model_dir: Path) -> None:
    cfg = config()
    cfg.trainer.lora.target_modules = ["wq", "w2"]
    engine = TrainEngine(cfg, model_dir)
    assert {name.split(".")[-3] for name in adapters(engine)} == {"wq", "w2"}
    losses = [engine.train_step(documents())["loss"] for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    first = adapters(TrainEngine(cfg, model_dir))
    assert all(torch.equal(first[name], tensor) for name, tensor in adapters(TrainEngine(cfg, model_dir)).items())
    cfg.seed += 1
    assert not any(
        torch.equal(first[name], tensor)
        for name, tensor in adapters(TrainEngine(cfg, model_dir)).items()
        if "lora_a" in name
    )


@pytest.mark.parametrize("num_steps_before", [0, 2])
def test_a_loaded_run_goes_on_bitwise_and_its_checkpoint_holds_no_frozen_weight(
    model_dir: Path, tmp_path: Path, num_steps_before: int
) -> None:
    engine = TrainEngine(config(), model_dir)
    for _ in range(num_steps_before):
        engine.train_step(documents())
    engine.save(tmp_path / "trainer")
    resumed = TrainEngine(config(), model_dir)
    resumed.load(tmp_path / "trainer")
    one, other = three_steps(engine), three_steps(resumed)
    assert one["metrics"] == other["metrics"]
    assert all(torch.equal(one["weights"][name], weight) for name, weight in other["weights"].items())
    saved = set(dist.checkpoint.FileSystemReader(tmp_path / "trainer").read_metadata().state_dict_metadata)
    assert any("lora_a" in name for name in saved)
    assert not any(name.endswith(("wq.weight", "tok_embeddings.weight", "lm_head.weight")) for name in saved)


def test_a_configuration_that_adapts_nothing_known_is_refused() -> None:
    for overrides, message in (
        (["trainer.lora.target_modules=[q_proj]"], "trainer.lora.target_modules is 'q_proj'"),
        (["trainer.lora.target_modules=[]"], "is empty"),
        (["trainer.lora.rank=0"], r"trainer\.lora\.rank must be greater than 0"),
    ):
        with pytest.raises(UserError, match=message):
            validate(load_config(None, overrides))


# ---- two ranks

CASES = {"FSDP": {"data_parallel_shard_degree": 2}, "TP": {"tensor_parallel_degree": 2}}


def two_rank_worker(rank: int, directory: Path, model_dir: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(directory / "store", rank, 2, rank, timeout_s=120)
    for name, parallelism in CASES.items():
        engine = TrainEngine(config(**parallelism), model_dir)
        result = three_steps(engine)
        other = config(**parallelism)
        other.seed, other.trainer.lora.alpha = 9, 4.0
        result["beside"] = three_steps(TrainEngine(other, model_dir, base=engine))
        engine.take_turn()
        result["afterwards"] = engine.logprobs(documents())
        result["alone"] = three_steps(TrainEngine(other, model_dir))
        engine.save(directory / name / "trainer")
        engine.export(directory / name / "export")
        torch.save(result, directory / name / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("two_ranks")
    mp.spawn(two_rank_worker, (directory, model_dir), nprocs=2)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_adapters_as_one_does(
    two_ranks: Path, model_dir: Path, trained: dict[str, Any], case: str
) -> None:
    for rank in range(2):
        result = torch.load(two_ranks / case / f"rank-{rank}.pt", weights_only=False)
        for ours, theirs in zip(result["metrics"], trained["metrics"], strict=True):
            for name in theirs.keys() - {"tokens/fill"}:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
        for ours, theirs in zip(result["logprobs"], trained["logprobs"], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-3)
        for ours, theirs in ((result["beside"], result["alone"]), ({"logprobs": result["afterwards"]}, result)):
            assert all(map(np.array_equal, ours["logprobs"], theirs["logprobs"]))
        assert result["beside"]["metrics"] == result["alone"]["metrics"]  # on one base, to the last bit
        assert all(
            torch.equal(result["beside"]["adapters"][name], a) for name, a in result["alone"]["adapters"].items()
        )
    exported = load_file(two_ranks / case / "export/model.safetensors")
    assert all(torch.equal(exported[name], result["weights"][name]) for name in exported)
    engine = TrainEngine(config(), model_dir)
    engine.load(two_ranks / case / "trainer")
    assert engine.step == 3
    for name, tensor in engine.hf_state_dict().items():
        torch.testing.assert_close(tensor, result["weights"][name], atol=1e-6, rtol=0)

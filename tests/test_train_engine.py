"""The training engine on tiny models: one rank in this process, two ranks over gloo in processes of their own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
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

from forge_hpc.checkpoint.manifest import NO_OPTIMIZER
from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, MismatchConfig
from forge_hpc.data.types import Document
from forge_hpc.losses import GRPOLoss
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine

pytestmark = pytest.mark.usefixtures("process_group")

NUM_DOCUMENTS = 13


def config(**training: Any) -> Config:
    """A small step with every term in its loss; keys of ``algorithm`` and of ``rollout.sampling`` go there, others to
    ``trainer.training``."""
    cfg = Config()
    cfg.model.dtype = "float32"
    cfg.algorithm.kl_coef = 0.1
    cfg.algorithm.entropy_coef = 0.01
    cfg.trainer.optimizer.lr = 1e-3
    cfg.trainer.lr_scheduler.warmup_steps = 5
    cfg.trainer.training.seq_len = 64
    cfg.trainer.training.local_batch_size = 2
    cfg.checkpoint.async_save = False
    for name, value in training.items():
        owners = (cfg.algorithm, cfg.rollout.sampling, cfg.trainer.training)
        setattr(next(owner for owner in owners if hasattr(owner, name)), name, value)
    return cfg


def full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def gradients(engine: TrainEngine) -> dict[str, torch.Tensor]:
    from torchtitan.components.checkpointer.utils import canonical_fqn  # forge_hpc.models must come first

    named = engine.model.named_parameters()
    return {canonical_fqn(name): full(p.grad) for name, p in named if p.grad is not None}


def weights(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: full(tensor).clone() for name, tensor in engine.hf_state_dict().items()}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert_close(actual, expected, atol=0)


@pytest.fixture(scope="module")
def model_dir(model_dir: Path) -> Path:
    """With a file that the export copies."""
    (model_dir / "tokenizer.json").write_text("{}")
    return model_dir


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> dict[str, Any]:
    """Two steps on one rank: what any other way of cutting them must repeat."""
    return two_steps(TrainEngine(config(), model_dir))


def two_steps(engine: TrainEngine) -> dict[str, Any]:
    documents = random_documents(NUM_DOCUMENTS)
    result: dict[str, Any] = {"logprobs": engine.logprobs(documents), "steps": []}
    for _ in range(2):
        metrics = engine.train_step(documents)
        result["steps"].append({"metrics": metrics, "gradients": gradients(engine)})
    return result | {"weights": weights(engine)}


def assert_same_training(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for ours, theirs in zip(actual["logprobs"], expected["logprobs"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    for ours, theirs in zip(actual["steps"], expected["steps"], strict=True):
        assert_close(ours["gradients"], theirs["gradients"])
        fill = {"tokens/fill"}  # the only thing that cutting may change
        assert ours["metrics"].keys() == theirs["metrics"].keys()
        for name in theirs["metrics"].keys() - fill:
            assert ours["metrics"][name] == pytest.approx(theirs["metrics"][name], abs=1e-5), name
    # Adam divides by the gradient's size, so a weight whose gradient is nearly zero may move by a part of the rate.
    assert_close(actual["weights"], expected["weights"], atol=1e-3)


# ---- one step


def warmed_up(engine: TrainEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Rows without an empty slot, their slots, and documents of each forward pass of its warming up."""
    rows: list[tuple[int, int, int]] = []

    def forward(self: TrainEngine, microbatch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        assert torch.is_grad_enabled()
        num_full, positions = int(microbatch["mask"].all(-1).sum()), microbatch["positions"]
        rows.append((num_full, positions.shape[1], int((positions == 0).sum())))
        return TrainEngine._forward(self, microbatch)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", forward.__get__(engine))
        engine.warm_up()
    return rows


def test_a_microbatch_that_may_not_fit_is_not_tried_before_there_is_one(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TrainEngine(config(), model_dir)
    engine.microbatch = replace(engine.microbatch, activation_bytes=engine.microbatch.available_bytes + 1)
    assert warmed_up(engine, monkeypatch) == []


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_that_has_warmed_up_and_is_ready_to_be_saved_trains_as_one_that_is_not(
    model_dir: Path, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, found = config(), []
    cfg.trainer.lora.enable = lora
    for warms_up in (False, True):
        engine = TrainEngine(cfg, model_dir)
        if warms_up:
            rows = warmed_up(engine, monkeypatch)
            assert rows == [(2, 64, 2), (2, 56, 4)]  # of 64 slots, and of as many less as lengths are rounded to
            engine._materialize_optimizer_state()  # as where saves are staged
            assert not gradients(engine)
        metrics = [engine.train_step(random_documents(NUM_DOCUMENTS, seed=seed)) for seed in range(2)]
        found.append((metrics, weights(engine)))
    (cold, cold_weights), (warm, warm_weights) = found
    assert warm == cold
    assert_equal(warm_weights, cold_weights)


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", False), ("llama", False)])
def test_loss_and_gradients_equal_those_of_transformers_on_each_document_alone(
    tmp_path: Path, family: str, tied: bool
) -> None:
    reference = write_model(tmp_path, family, tied=tied).train()
    documents = random_documents(NUM_DOCUMENTS)
    cfg = config(max_norm=1e9)
    cfg.rollout.sampling.temperature = 0.8
    engine = TrainEngine(cfg, tmp_path)
    metrics = engine.train_step(documents)
    num_trained = sum(int(d.loss_mask[1:].sum()) for d in documents)
    loss_fn = GRPOLoss(kl_coef=0.1, entropy_coef=0.01)
    total = torch.zeros(())
    for document in documents:
        ids = torch.from_numpy(document.token_ids).long()
        p = (reference(ids[None]).logits[0, :-1] / 0.8).log_softmax(-1)
        assert document.generator_logprobs is not None and document.ref_logprobs is not None
        total = (
            total
            + loss_fn(
                logprobs=p.gather(1, ids[1:, None]).T,
                old_logprobs=torch.from_numpy(document.generator_logprobs[1:])[None],
                advantages=torch.full((1, len(ids) - 1), document.advantage),
                mask=torch.from_numpy(document.loss_mask[1:])[None],
                ref_logprobs=torch.from_numpy(document.ref_logprobs[1:])[None],
                entropy=-(p.exp() * p).sum(-1)[None],
                normalizer=num_trained,
            ).loss
        )
    total.backward()
    assert metrics["loss"] == pytest.approx(total.item(), abs=1e-5)
    assert metrics["tokens/trained"] == num_trained
    ours = engine.spec.adapter.to_hf(gradients(engine))
    assert_close(ours, {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(
    "cut",
    [
        {"local_batch_size": NUM_DOCUMENTS},  # every document in a row of its own: not packed
        {"local_batch_size": 1},
        {"seq_len": 32, "local_batch_size": 3},
        {"seq_len": 250, "local_batch_size": 1},
    ],
    ids=["unpacked", "one row at a time", "short rows", "one row"],
)
def test_rows_and_microbatches_do_not_change_the_step(
    model_dir: Path, expected: dict[str, Any], cut: dict[str, int]
) -> None:
    assert_same_training(two_steps(TrainEngine(config(**cut), model_dir)), expected)


BY_SEQUENCE: dict[str, dict[str, Any]] = {
    "GSPO": {"loss": "gspo"},
    "Dr. GRPO": {"loss": "dr_grpo"},
    "corrected": {"normalization": "sequence", "mismatch": MismatchConfig(2.0, None, [0.5, 2.0])},
}
"""Options of ``algorithm`` with which what is said of a sequence, and the number of sequences, counts."""


@pytest.mark.parametrize("options", BY_SEQUENCE.values(), ids=BY_SEQUENCE)
def test_rows_and_microbatches_do_not_change_what_counts_sequences(model_dir: Path, options: dict[str, Any]) -> None:
    unpacked, packed = (
        two_steps(TrainEngine(config(**cut, **options), model_dir))
        for cut in ({"local_batch_size": NUM_DOCUMENTS}, {"seq_len": 64, "local_batch_size": 1})
    )
    assert_same_training(packed, unpacked)


def test_a_correction_takes_the_ratio_against_the_trainer_and_tells_the_effective_sample_size(model_dir: Path) -> None:
    engine = TrainEngine(config(mismatch=MismatchConfig(cap=1.5)), model_dir)
    documents = random_documents(NUM_DOCUMENTS)
    weights = [
        np.minimum(np.exp(trainer - document.generator_logprobs)[document.loss_mask], 1.5)
        for document, trainer in zip(documents, engine.logprobs(documents), strict=True)
    ]
    w = np.concatenate(weights)
    metrics = engine.train_step(documents)
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["mismatch/weight_mean"] == pytest.approx(w.mean(), abs=1e-4)
    assert metrics["mismatch/ess"] == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), abs=1e-4)
    assert 0.1 < metrics["mismatch/ess"] < 1


OWN_LOSS = """
import torch
from forge_hpc.losses import LossOutput

def loss(*, logprobs, advantages, mask, normalizer, scale, **rest):
    return LossOutput(-scale * torch.where(mask, advantages * logprobs, 0).sum() / normalizer)
"""


def test_a_loss_of_ones_own_trains_as_the_built_in_one_does(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_LOSS)
    cfg = config(loss=f"{tmp_path / 'own.py'}:loss", loss_args={"scale": 1.0}, kl_coef=0.0, entropy_coef=0.0)
    engine = TrainEngine(cfg, model_dir)
    built_in = TrainEngine(config(loss="reinforce", kl_coef=0.0, entropy_coef=0.0), model_dir)
    documents = random_documents(NUM_DOCUMENTS)
    assert engine.train_step(documents)["loss"] == built_in.train_step(documents)["loss"]
    assert_equal(weights(engine), weights(built_in))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_does_not_change_the_step(
    model_dir: Path, expected: dict[str, Any], mode: str
) -> None:
    cfg = config()
    cfg.trainer.activation_checkpoint.mode = mode
    assert_same_training(two_steps(TrainEngine(cfg, model_dir)), expected)


def test_gradients_are_clipped_to_the_norm(model_dir: Path) -> None:
    documents = random_documents(NUM_DOCUMENTS)
    free, clipped = (TrainEngine(config(max_norm=norm), model_dir) for norm in (1e9, 0.01))
    norms = [engine.train_step(documents)["grad_norm"] for engine in (free, clipped)]
    assert norms[0] == norms[1] > 0.01  # reported as it was before clipping
    total = torch.stack([g.norm() for g in gradients(clipped).values()]).norm().item()
    assert total == pytest.approx(0.01, rel=1e-3)
    scale = 0.01 / norms[0]
    assert_close(gradients(clipped), {n: g * scale for n, g in gradients(free).items()}, atol=1e-7)


def test_mismatch_is_the_distance_to_the_generator_under_the_weights_before_the_step(model_dir: Path) -> None:
    engine = TrainEngine(config(), model_dir)
    documents = random_documents(NUM_DOCUMENTS)
    for document, logprobs in zip(documents, engine.logprobs(documents), strict=True):
        document.generator_logprobs = logprobs
    metrics = engine.train_step(documents)
    assert metrics["mismatch/logprob_abs_mean"] < 1e-6
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert engine.train_step(documents)["mismatch/logprob_abs_mean"] > 1e-4


def test_repeated_steps_learn(model_dir: Path) -> None:
    cfg = config()
    cfg.recipe = "sft"
    cfg.trainer.optimizer.lr = 3e-3
    engine = TrainEngine(cfg, model_dir)
    documents = random_documents(4, with_logprobs=False)
    losses = [engine.train_step(documents)["loss"] for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]


def test_the_validation_loss_is_the_loss_that_a_step_begins_with_and_takes_none(model_dir: Path) -> None:
    cfg = config()
    cfg.recipe = "sft"
    engine = TrainEngine(cfg, model_dir)
    before = weights(engine)
    documents = random_documents(NUM_DOCUMENTS, with_logprobs=False)
    loss = engine.eval_loss(documents)
    assert_equal(weights(engine), before)
    assert engine.step == 0
    assert engine.train_step(documents)["loss"] == pytest.approx(loss, abs=1e-5)
    assert engine.eval_loss(documents) < loss


def test_the_learning_rate_follows_the_schedule(model_dir: Path) -> None:
    cfg = config(steps=4)
    cfg.trainer.lr_scheduler.warmup_steps = 2
    documents = random_documents(2)
    engine = TrainEngine(cfg, model_dir)
    rates = [engine.train_step(documents)["lr"] for _ in range(6)]  # more steps than planned: a constant rate goes on
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    cfg.trainer.lr_scheduler.decay_ratio = 0.5
    engine = TrainEngine(cfg, model_dir)
    rates = [engine.train_step(documents)["lr"] for _ in range(4)]
    assert rates[:2] == pytest.approx([5e-4, 1e-3]) and rates[3] < rates[2] <= 1e-3


def test_an_input_of_the_loss_that_is_not_finite_is_named(model_dir: Path) -> None:
    engine = TrainEngine(config(), model_dir)
    documents = random_documents(3)
    documents[1].advantage = float("nan")
    with pytest.raises(ValueError, match="document 1 has an advantage that is not finite"):
        engine.train_step(documents)
    with torch.no_grad():
        engine.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^logprobs: (\d+) of \1 trained tokens are not finite"):
        engine.train_step(random_documents(3))
    assert engine.step == 0


def test_a_loss_that_is_not_finite_is_named_and_leaves_the_weights_alone(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_LOSS)
    cfg = config(loss=f"{tmp_path / 'own.py'}:loss", loss_args={"scale": float("nan")}, kl_coef=0.0, entropy_coef=0.0)
    engine = TrainEngine(cfg, model_dir)
    before = weights(engine)
    with pytest.raises(RuntimeError, match="the loss of step 1 is nan"):
        engine.train_step(random_documents(3))
    assert_equal(weights(engine), before)
    assert engine.step == 0


def test_a_gradient_that_is_not_finite_is_named_and_leaves_the_weights_alone(model_dir: Path) -> None:
    engine = TrainEngine(config(), model_dir)
    before = weights(engine)
    engine.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(RuntimeError, match="the gradient norm of step 1 is"):
        engine.train_step(random_documents(3))
    assert_equal(weights(engine), before)


def test_documents_without_trained_tokens_are_refused(model_dir: Path) -> None:
    document = Document(token_ids=np.arange(5, dtype=np.int32), loss_mask=np.zeros(5, bool))
    with pytest.raises(ValueError, match="every loss mask is empty"):
        TrainEngine(config(), model_dir).train_step([document])


def test_degrees_that_do_not_fit_the_ranks_are_a_user_error(model_dir: Path) -> None:
    cfg = config()
    cfg.trainer.parallelism.tensor_parallel_degree = 3
    with pytest.raises(UserError, match="does not fit 1 trainer ranks"):
        TrainEngine(cfg, model_dir)


# ---- weights and checkpoints


def test_published_weights_are_views_with_the_tied_head(model_dir: Path) -> None:
    engine = TrainEngine(config(), model_dir)
    state = engine.hf_state_dict()
    assert state.keys() == load_file(model_dir / "model.safetensors").keys() | {"lm_head.weight"}
    pointers = {p.data_ptr() for p in engine.model.parameters()}
    assert all(tensor.data_ptr() in pointers and not tensor.requires_grad for tensor in state.values())
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    engine.cfg.model.dtype = "bfloat16"
    assert all(tensor.dtype == torch.bfloat16 for tensor in engine.hf_state_dict().values())


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("num_steps_before", [0, 2])
def test_a_loaded_run_goes_on_bitwise_as_the_saved_one(
    model_dir: Path, tmp_path: Path, async_save: bool, num_steps_before: int
) -> None:
    cfg = config()
    cfg.checkpoint.async_save = async_save
    documents = random_documents(NUM_DOCUMENTS)
    engine = TrainEngine(cfg, model_dir)
    for _ in range(num_steps_before):
        engine.train_step(documents)
    engine.save(tmp_path / "trainer")
    metrics = [engine.train_step(documents) for _ in range(3)]  # while an asynchronous save is still being written
    engine.wait_for_save()

    resumed = TrainEngine(cfg, model_dir)
    resumed.load(tmp_path / "trainer")
    assert resumed.step == num_steps_before
    assert [resumed.train_step(documents) for _ in range(3)] == metrics
    assert_equal(weights(resumed), weights(engine))

    untouched = TrainEngine(cfg, model_dir)
    for _ in range(num_steps_before + 3):
        untouched.train_step(documents)
    assert_equal(weights(untouched), weights(engine))  # saving left no trace


def test_a_fork_may_leave_the_optimizers_state_behind(model_dir: Path, tmp_path: Path) -> None:
    documents = random_documents(NUM_DOCUMENTS)
    engine = TrainEngine(config(), model_dir)
    for _ in range(2):
        engine.train_step(documents)
    engine.save(tmp_path / "trainer")
    (tmp_path / NO_OPTIMIZER).touch()
    forked = TrainEngine(config(), model_dir)
    forked.load(tmp_path / "trainer")
    assert forked.step == 2
    assert_equal(weights(forked), weights(engine))
    moments = [v for key, v in forked.optimizers.state_dict().items() if key.endswith(("exp_avg", "exp_avg_sq"))]
    assert moments and not any(moment.any() for moment in moments)
    ours, theirs = forked.train_step(documents), engine.train_step(documents)
    assert (ours["loss"], ours["lr"]) == (theirs["loss"], theirs["lr"])
    differing = [name for name, weight in weights(forked).items() if not torch.equal(weight, weights(engine)[name])]
    assert differing, "its moments are those of a first step"


def test_loading_a_directory_that_is_not_there_says_so(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        TrainEngine(config(), model_dir).load(tmp_path / "nothing")


def test_a_failed_save_is_told_once_and_the_next_one_works(model_dir: Path, tmp_path: Path) -> None:
    cfg = config()
    cfg.checkpoint.async_save = True
    engine = TrainEngine(cfg, model_dir)
    (tmp_path / "file").write_text("in the way")
    engine.save(tmp_path / "file" / "trainer")
    with pytest.raises(RuntimeError, match="rank 0: NotADirectoryError"):
        engine.wait_for_save()
    engine.save(tmp_path / "trainer")
    engine.wait_for_save()
    TrainEngine(cfg, model_dir).load(tmp_path / "trainer")


@pytest.mark.parametrize(
    ("had", "ends", "expected"),
    [
        (None, [5], 5),
        (3, [5], [5, 3]),
        ([3, 5], [5], [3, 5]),
        (3, [], 3),
        (3, [5, 3], [5, 3]),
    ],
)
def test_the_export_stops_at_what_was_learned_and_at_what_it_had(
    model_dir: Path, tmp_path: Path, had: Any, ends: list[int], expected: Any
) -> None:
    source = tmp_path / "model"
    shutil.copytree(model_dir, source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": had, "top_k": 7}))
    engine = TrainEngine(config(), source)
    engine.export(tmp_path / "export", ends)
    written = json.loads((tmp_path / "export/generation_config.json").read_text())
    assert written == {"eos_token_id": expected, "top_k": 7}


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 60_000])
def test_the_export_loads_in_transformers_with_the_same_log_probabilities(
    model_dir: Path, tmp_path: Path, max_shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge_hpc.training.export._MAX_SHARD_BYTES", max_shard_bytes)
    engine = TrainEngine(config(), model_dir)
    documents = random_documents(3)
    engine.train_step(documents)
    directory = tmp_path / "export"
    engine.export(directory)
    engine.export(directory)  # replaces the first
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (directory / "tokenizer.json").exists()
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float32"
    assert len(list(directory.glob("*.safetensors"))) > 1 or max_shard_bytes > 60_000
    reference = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for document, logprobs in zip(documents, engine.logprobs(documents), strict=True):
            ids = torch.from_numpy(document.token_ids).long()
            p = reference(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            expected = np.where(document.loss_mask[1:], p.numpy(), 0)
            np.testing.assert_allclose(logprobs[1:], expected, atol=1e-4)
            assert logprobs[0] == 0
    again = TrainEngine(config(), directory)
    assert_equal(weights(again), weights(engine))


# ---- two ranks

CASES: dict[str, tuple[str, bool, dict[str, int], dict[str, Any]]] = {
    "FSDP": ("qwen3", True, {"data_parallel_shard_degree": 2}, {}),
    "FSDP Qwen2": ("qwen2", False, {"data_parallel_shard_degree": 2}, {}),
    "replicated": ("qwen3", False, {"data_parallel_shard_degree": 1, "data_parallel_replicate_degree": 2}, {}),
    "TP": ("qwen3", True, {"tensor_parallel_degree": 2}, {}),
    "TP untied": ("qwen3", False, {"tensor_parallel_degree": 2}, {}),
    "TP Qwen2": ("qwen2", True, {"tensor_parallel_degree": 2}, {}),
    "TP truncated": ("qwen3", True, {"tensor_parallel_degree": 2}, {"min_p": 0.01, "top_k": 30, "top_p": 0.9}),
    "FSDP by sequence": ("qwen3", True, {"data_parallel_shard_degree": 2}, BY_SEQUENCE["corrected"]),
    "CP": ("qwen3", True, {"context_parallel_degree": 2}, {}),
    "CP by sequence": ("llama", False, {"context_parallel_degree": 2}, BY_SEQUENCE["GSPO"]),
}
"""Name: (family, tied embeddings, degrees, options of algorithm)."""


def two_rank_worker(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(directory / "store", rank, 2, rank, timeout_s=120)
    for name, (_, _, parallelism, options) in CASES.items():
        case_dir = directory / name
        cfg = config(**options)
        for key, value in parallelism.items():
            setattr(cfg.trainer.parallelism, key, value)
        engine = TrainEngine(cfg, case_dir / "model")
        result = two_steps(engine)
        engine.save(case_dir / "trainer")
        engine.export(case_dir / "export")
        resumed = TrainEngine(cfg, case_dir / "model")
        resumed.load(case_dir / "trainer")
        documents = random_documents(NUM_DOCUMENTS)
        result["loss"] = engine.eval_loss(documents)
        result["next"] = [e.train_step(documents) for e in (engine, resumed)]
        torch.save(result, case_dir / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all cases, a directory each; the processes start once, since importing takes longest."""
    directory = tmp_path_factory.mktemp("two_ranks")
    for name, (family, tied, _, _) in CASES.items():
        write_model(directory / name / "model", family, tied=tied)
    mp.spawn(two_rank_worker, (directory,), nprocs=2)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_does_and_their_checkpoint_loads_on_one(two_ranks: Path, case: str) -> None:
    model_dir, options = two_ranks / case / "model", CASES[case][3]
    results = [torch.load(two_ranks / case / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
    expected = two_steps(TrainEngine(config(**options), model_dir))
    for result in results:
        assert_same_training(result, expected)
    assert results[0]["next"] == results[1]["next"]  # every rank is told the same
    continued, resumed = results[0]["next"]
    assert continued == resumed

    engine = TrainEngine(config(**options), model_dir)
    engine.load(two_ranks / case / "trainer")
    assert engine.step == 2
    assert_equal(weights(engine), results[0]["weights"])
    exported = load_file(two_ranks / case / "export" / "model.safetensors")
    assert_equal(exported, {name: results[0]["weights"][name] for name in exported})
    documents = random_documents(NUM_DOCUMENTS)
    assert [result["loss"] for result in results] == pytest.approx([engine.eval_loss(documents)] * 2, abs=1e-5)
    assert engine.train_step(documents)["loss"] == pytest.approx(continued["loss"], abs=1e-5)

"""Several models in the trainers: what is trained, what is frozen, and what a checkpoint holds of them."""

from __future__ import annotations

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import random_documents, write_model

from forge_hpc.actors.publishing import Publishing
from forge_hpc.actors.trainer import OneBase, Trainer
from forge_hpc.config.errors import UserError
from forge_hpc.config.needs import ModelNeed, check_models
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import Config
from forge_hpc.training.build import Shape
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine
from forge_hpc.training.frozen import FrozenModel
from forge_hpc.training.models import Models
from forge_hpc.weights import Offer, Part, VersionNotFoundError, opened
from forge_hpc.weights.layout import Manifest

pytestmark = pytest.mark.usefixtures("process_group")

CRITIC = {"policy": ModelNeed(), "critic": ModelNeed(head="value", lr=2e-2)}


def config(**parallelism: int) -> Config:
    cfg = Config()
    cfg.model.dtype = "float32"
    cfg.trainer.optimizer.lr = 1e-3
    cfg.trainer.lr_scheduler.warmup_steps = 0
    cfg.trainer.training.seq_len = 64
    cfg.trainer.training.local_batch_size = 2
    cfg.checkpoint.async_save = False
    for name, value in parallelism.items():
        setattr(cfg.trainer.parallelism, name, value)
    return cfg


def with_returns(num: int = 8) -> Any:
    documents = random_documents(num)
    for document in documents:
        document.columns["returns"] = (document.token_ids % 3).astype(np.float32)
    return documents


def same(ours: list[np.ndarray], theirs: list[np.ndarray], atol: float = 0.0) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def critic_steps(models: Models, num: int = 3) -> tuple[list[float], list[np.ndarray]]:
    documents = with_returns()
    steps = [models.train_step("critic", documents, update=True, max_mismatch=1.0) for _ in range(num)]
    return [step["loss"] for step in steps], models.values("critic", documents)


def test_a_critic_gives_0_at_first_and_learns_the_returns_beside_a_policy_that_stays(model_dir: Path) -> None:
    models = Models(config(), CRITIC, {"policy": model_dir})
    documents = with_returns()
    before = models.logprobs("policy", documents)
    assert not any(values.any() for values in models.values("critic", documents))
    losses, values = critic_steps(models, 15)
    returns = np.concatenate([d.columns["returns"][d.loss_mask] for d in documents])
    assert losses[0] == pytest.approx((returns**2).mean() / 2, abs=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert all((own[~d.loss_mask] == 0).all() for own, d in zip(values, documents, strict=True))
    same(models.logprobs("policy", documents), before)
    assert models.policy.step == 0 and models.trained["critic"].step == 15


def test_a_critic_that_diverges_is_named_with_the_cause(model_dir: Path) -> None:
    needs = CRITIC | {"critic": ModelNeed(head="value", lr=1e30)}
    with pytest.raises(RuntimeError, match=r"the model 'critic' has diverged or cannot be trained: the .* of step"):
        critic_steps(Models(config(), needs, {"policy": model_dir}), 5)


def test_a_model_is_asked_for_what_its_head_gives_and_an_unknown_one_is_named(model_dir: Path) -> None:
    models = Models(config(), CRITIC, {"policy": model_dir})
    for ask, message in (
        (lambda: models.logprobs("critic", with_returns(2)), "a model with a value head has no log-probabilities"),
        (lambda: models.values("policy", with_returns(2)), "a model without a value head has no values"),
        (lambda: models.logprobs("teacher", with_returns(2)), "no model 'teacher' is in the trainers"),
    ):
        with pytest.raises(UserError, match=message):
            ask()
    with pytest.raises(UserError, match="takes the column 'returns', and the documents do not have it"):
        models.train_step("critic", random_documents(2), update=True, max_mismatch=1.0)


def test_a_frozen_model_has_the_policys_log_probabilities_and_neither_gradient_nor_optimizer(model_dir: Path) -> None:
    needs = {"policy": ModelNeed(), "reference": ModelNeed(trained=False)}
    models = Models(config(), needs, {"policy": model_dir})
    documents = random_documents(8)
    before = models.logprobs("policy", documents)
    same(models.logprobs("reference", documents), before)
    for _ in range(2):
        models.train_step("policy", documents, update=True, max_mismatch=100.0)
    same([d.ref_logprobs for d in documents], before)  # type: ignore[misc]
    same(models.logprobs("reference", documents), before)
    reference = models.frozen["reference"]
    assert isinstance(reference, FrozenModel) and not hasattr(reference, "optimizers")
    assert all(p.grad is None and not p.requires_grad for p in reference.model.parameters())
    with pytest.raises(UserError, match="no model 'reference' is trained"):
        models.train_step("reference", documents, update=True, max_mismatch=1.0)


def test_a_frozen_model_in_the_compute_dtype_computes_what_the_policy_does(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the policy is float32 and is cast for each forward pass, the frozen one was cast once."""
    usual = Shape.of
    monkeypatch.setattr(Shape, "of", lambda cfg: dataclasses.replace(usual(cfg), param_dtype=torch.bfloat16))
    needs = {"policy": ModelNeed(), "reference": ModelNeed(trained=False)}
    models = Models(config(), needs, {"policy": model_dir})
    reference = models.frozen["reference"]
    assert isinstance(reference, FrozenModel)
    assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in models.policy.model.parameters()} == {torch.float32}
    documents = random_documents(6)
    same(models.logprobs("reference", documents), models.logprobs("policy", documents))


def test_a_teacher_of_another_path_answers_with_its_own_weights(model_dir: Path, tmp_path: Path) -> None:
    write_model(tmp_path, "llama", seed=5, head_dim=8)
    needs = {"policy": ModelNeed(), "teacher": ModelNeed(trained=False, path=str(tmp_path))}
    models = Models(config(), needs, {"policy": model_dir, "teacher": tmp_path})
    documents = random_documents(5)
    same(models.logprobs("teacher", documents), TrainEngine(config(), tmp_path).logprobs(documents))


def test_with_lora_the_reference_is_the_policy_without_its_adapters_and_no_second_copy(model_dir: Path) -> None:
    cfg = config()
    cfg.trainer.lora.enable = True
    cfg.reference.enable = True
    documents = random_documents(8)
    base = TrainEngine(config(), model_dir).logprobs(documents)
    models = Models(cfg, needs_of(cfg).models, {"policy": model_dir})
    for _ in range(3):
        models.train_step("policy", documents, update=True, max_mismatch=100.0)
        same([d.ref_logprobs for d in documents], base)  # type: ignore[misc]
    moved = models.logprobs("policy", documents)
    assert max(float(np.abs(one - other).max()) for one, other in zip(moved, base, strict=True)) > 1e-3
    same(models.logprobs("reference", documents), base)
    same(models.logprobs("policy", documents), moved)  # the adapters are back
    assert not isinstance(models.frozen["reference"], FrozenModel)


def test_a_checkpoint_holds_all_trained_models_and_goes_on_bitwise(model_dir: Path, tmp_path: Path) -> None:
    models = Models(config(), CRITIC, {"policy": model_dir})
    critic_steps(models)
    models.train_step("policy", random_documents(8), update=True, max_mismatch=100.0)
    place = tmp_path / "trainer"
    models.save(place)
    assert sorted(models.wait_for_save()) == [
        "trainer/.metadata",
        "trainer/__0_0.distcp",
        "trainer/critic/.metadata",
        "trainer/critic/__0_0.distcp",
    ]
    resumed = Models(config(), CRITIC, {"policy": model_dir})
    resumed.load(place)
    assert (resumed.policy.step, resumed.trained["critic"].step) == (1, 3)
    one, other = critic_steps(models), critic_steps(resumed)
    assert one[0] == other[0]
    same(one[1], other[1])
    alone = TrainEngine(config(), model_dir)  # what the policy's part always was
    alone.load(place)
    same(alone.logprobs(random_documents(4)), models.logprobs("policy", random_documents(4)))


def test_a_checkpoint_of_other_models_is_refused_by_their_names(model_dir: Path, tmp_path: Path) -> None:
    models = Models(config(), CRITIC, {"policy": model_dir})
    models.save(tmp_path / "trainer")
    alone = Models(config(), {"policy": ModelNeed()}, {"policy": model_dir})
    with pytest.raises(UserError, match="holds the models critic, policy, and the recipe trains policy"):
        alone.load(tmp_path / "trainer")
    alone.save(tmp_path / "alone/trainer")
    with pytest.raises(UserError, match="holds the models policy, and the recipe trains critic, policy"):
        models.load(tmp_path / "alone/trainer")


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (lambda: {"critic": ModelNeed(head="value")}, "need a policy that is trained"),
        (lambda: {"policy": ModelNeed(trained=False)}, "need a policy that is trained"),
        (lambda: {"policy": ModelNeed(), "reference": ModelNeed()}, "the model 'reference' is trained"),
        (lambda: {"policy": ModelNeed(), "../x": ModelNeed()}, "a model is called '../x'"),
        (lambda: {"policy": ModelNeed(head="reward")}, "a model's head is 'reward'"),
        (lambda: {"policy": ModelNeed(offload=True)}, "a model that is trained cannot be offloaded"),
        (lambda: {"policy": ModelNeed(), "teacher": ModelNeed(trained=False, loss="sft")}, "a frozen model has no"),
    ],
)
def test_models_that_cannot_be_are_refused(needs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_models(needs())


# ---- weights that are published


class GatedStore:
    """Takes half of the weights, and the rest once it is told to."""

    def __init__(self) -> None:
        self.stored: dict[str, torch.Tensor] = {}
        self.go_on = asyncio.Event()

    async def publish(self, store: Any, version: int, state: dict[str, torch.Tensor], **options: Any) -> None:
        for number, (name, tensor) in enumerate(state.items()):
            if number == len(state) // 2:
                await self.go_on.wait()
            self.stored[name] = tensor.clone()


def trainer_on(cfg: Config, model_dir: Path, models: Models | None = None) -> Any:
    """The actor without its process: its endpoints are called as they stand."""
    trainer: Any = object.__new__(Trainer)
    trainer._config, trainer._rank, trainer._world_size, trainer._publishing = cfg, 0, 1, Publishing()
    trainer._snapshots = trainer._stored = trainer._one_base = None
    trainer._thread = ThreadPoolExecutor(1)
    trainer._models = models or Models(cfg, CRITIC, {"policy": model_dir})
    trainer._watch_gpu()
    return trainer


async def ask(endpoint: Any, trainer: Any, *args: Any) -> Any:
    nobody = SimpleNamespace(send=lambda error: None)  # where a rank tells of an error
    return await endpoint._method.__wrapped__(trainer, nobody, *args)


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("waits", [True, False])
def test_what_is_published_is_whole_though_a_recipe_trains_on_at_once(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, max_staleness: int, waits: bool
) -> None:
    """``waits``: the controller is told of the delivery (``store``) meanwhile, or nobody asks."""
    cfg = config()
    cfg.rollout.max_staleness = max_staleness

    async def scenario() -> None:
        store = GatedStore()
        monkeypatch.setattr("forge_hpc.weights.publish", store.publish)
        trainer = trainer_on(cfg, model_dir)
        trainer._snapshot = lambda *args: None  # no memory for a copy that is read in place
        policy = trainer._models.policy
        before = {name: tensor.clone() for name, tensor in policy.hf_state_dict().items()}
        await ask(Trainer.publish, trainer, "the store", 1)
        waiter = asyncio.create_task(ask(Trainer.store, trainer, "the store", 1)) if waits else None
        await asyncio.sleep(0)
        # Not the critic's step, which publishes nothing; the policy's, where the weights themselves are read.
        await ask(Trainer.train_step, trainer, with_returns(4), True, 100.0, "critic")
        stepping = asyncio.create_task(ask(Trainer.train_step, trainer, random_documents(4), True, 100.0))
        if max_staleness:
            await stepping
        else:
            await ask(Trainer.logprobs, trainer, random_documents(4), "policy")  # the thread has nothing to do
            assert policy.step == 0
        assert len(store.stored) < len(before)
        store.go_on.set()
        await stepping
        await (waiter or ask(Trainer.store, trainer, "the store", 1))
        assert policy.step == 1
        assert all(torch.equal(store.stored[name], tensor) for name, tensor in before.items())
        assert not all(torch.equal(policy.hf_state_dict()[name], tensor) for name, tensor in before.items())
        trainer._thread.shutdown()

    asyncio.run(scenario())


def test_what_is_published_of_an_adapter_is_whole_though_another_takes_its_turn_on_the_base(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    cfg.trainer.lora.enable, cfg.trainer.lora.publish, cfg.trainer.lora.rank = True, "adapters", 4
    base = Models(cfg, {"policy": ModelNeed()}, {"policy": model_dir})
    other = Models(cfg, {"policy": ModelNeed()}, {"policy": model_dir}, base)
    other.train_step("policy", random_documents(4), update=True, max_mismatch=100.0)

    async def scenario() -> None:
        store = GatedStore()
        monkeypatch.setattr("forge_hpc.weights.publish", store.publish)
        trainer = trainer_on(cfg, model_dir, base)
        trainer._one_base = OneBase()
        trainer._snapshot = lambda *args: None
        base.take_turn()
        before = {name: tensor.clone() for name, tensor in base.policy.published().items()}
        await ask(Trainer.publish, trainer, "the store", 1)
        other.take_turn()
        assert any(not torch.equal(tensor, before[name]) for name, tensor in other.policy.published().items())
        store.go_on.set()
        await ask(Trainer.store, trainer, "the store", 1)
        assert all(torch.equal(store.stored[name], tensor) for name, tensor in before.items())

    asyncio.run(scenario())


def test_what_is_offered_is_whole_though_training_goes_on_and_may_be_put_into_the_store_later(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        stored: dict[str, torch.Tensor] = {}

        async def put(store: Any, manifest: Manifest, data: torch.Tensor) -> None:
            assert manifest.checksum == brief.checksums[0] is not None  # who reads there verifies it too
            starts = manifest.bucket_starts()
            stored.update({s.name: s.view(data[starts[s.bucket] :]).clone() for s in manifest.shards})

        monkeypatch.setattr("forge_hpc.weights.MESSAGE_BYTES", 1 << 16)
        monkeypatch.setattr("forge_hpc.weights.publish_buckets", put)
        trainer = trainer_on(config(), model_dir)
        policy = trainer._models.policy
        for version in (1, 2):
            before = {name: tensor.clone() for name, tensor in policy.hf_state_dict().items()}
            brief = await ask(Trainer.publish, trainer, None, version, (), False, True)
            place = await ask(Trainer.place, trainer, version)
            assert place.key == brief.key
            offer = Offer.of([Part(version, place, brief.checksums[0])])
            assert not stored
            await ask(Trainer.train_step, trainer, random_documents(4), True, 100.0)
            with opened(offer) as weights:
                assert weights.verify() is not None
                assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in before.items())
        await ask(Trainer.store, trainer, None, 2)
        assert stored.keys() == before.keys() and all(torch.equal(stored[name], before[name]) for name in before)
        with pytest.raises(VersionNotFoundError, match="version 1"):
            await ask(Trainer.store, trainer, None, 1)
        trainer._thread.shutdown()

    asyncio.run(scenario())


def test_a_copy_that_is_published_lets_training_go_on_and_a_failure_is_told_by_done() -> None:
    async def scenario() -> None:
        async def fail() -> None:
            await go_on.wait()
            raise OSError("the store is gone")

        for reads_weights in (False, True):
            go_on, publishing = asyncio.Event(), Publishing()
            publishing.begin(fail(), reads_weights=reads_weights)
            if not reads_weights:
                await publishing.has_read()
            go_on.set()
            await publishing.has_read()
            with pytest.raises(OSError, match="the store is gone"):
                await publishing.done()
            await publishing.done()

    asyncio.run(scenario())


# ---- two ranks

CASES = {"FSDP": {"data_parallel_shard_degree": 2}, "TP": {"tensor_parallel_degree": 2}}


def two_rank_worker(rank: int, directory: Path, model_dir: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(directory / "store", rank, 2, rank, timeout_s=120)
    for name, degrees in CASES.items():
        needs = CRITIC | {"reference": ModelNeed(trained=False)}
        models = Models(config(**degrees), needs, {"policy": model_dir})
        reference = models.logprobs("reference", random_documents(5))
        losses, values = critic_steps(models)
        models.save(directory / name / "trainer")
        files = models.wait_for_save()
        again = values
        if name == "FSDP":
            resumed = Models(config(**degrees), CRITIC, {"policy": model_dir})
            resumed.load(directory / name / "trainer")
            again = resumed.values("critic", with_returns())
        torch.save((losses, values, reference, sorted(files), again), directory / name / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_a_critic_beside_a_frozen_reference_as_one_does(model_dir: Path, tmp_path: Path) -> None:
    losses, values = critic_steps(Models(config(), CRITIC, {"policy": model_dir}))
    reference = TrainEngine(config(), model_dir).logprobs(random_documents(5))
    mp.spawn(two_rank_worker, (tmp_path, model_dir), nprocs=2)
    for name in CASES:
        for rank in range(2):
            ours, own, frozen, files, again = torch.load(tmp_path / name / f"rank-{rank}.pt", weights_only=False)
            assert ours == pytest.approx(losses, abs=1e-4)
            same(own, values, atol=1e-2)  # Adam: a weight whose gradient is nearly zero may move by a part of the rate
            same(frozen, reference, atol=1e-4)
            same(again, own)
            assert f"trainer/critic/__{rank}_0.distcp" in files and f"trainer/__{rank}_0.distcp" in files

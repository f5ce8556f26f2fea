"""A step in which no group carries a signal counts, and leaves everything as it is."""

from __future__ import annotations

import asyncio
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import check_contract, read, run_local, small_run, start_local, wait_for
from test_end_to_end import check_same
from tiny_models import random_documents

from forge_hpc.config.schema import Config
from forge_hpc.controller.generators import WeightSync
from forge_hpc.data.types import Document
from forge_hpc.rollouts.buffer import EpisodeBuffer
from forge_hpc.training.engine import TrainEngine
from forge_hpc.weights import Offer, Places

pytestmark = pytest.mark.usefixtures("process_group")


def configuration(kl_coef: float = 0.0) -> Config:
    config = Config()
    config.model.dtype = "float32"
    config.algorithm.kl_coef = kl_coef
    config.trainer.optimizer.lr, config.trainer.optimizer.weight_decay = 1e-3, 0.1
    config.trainer.lr_scheduler.warmup_steps = 10
    config.trainer.training.seq_len = 64
    config.checkpoint.async_save = False
    return config


def state(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """Weights and moments."""
    moments = {
        f"{index}.{key}": value
        for optimizer in engine.optimizers
        for index, values in enumerate(optimizer.state.values())
        for key, value in values.items()
    }
    return {name: tensor.detach().clone() for name, tensor in (engine.hf_state_dict() | moments).items()}


def flat(num: int = 5, seed: int = 1) -> list[Document]:
    documents = random_documents(num, seed=seed)
    for document in documents:
        document.advantage = 0.0
    return documents


@pytest.mark.parametrize(("kl_coef", "update"), [(0.0, True), (0.0, False), (0.1, False)])
def test_weights_and_moments_stay_to_the_last_bit_and_the_schedule_goes_on(
    model_dir: Path, kl_coef: float, update: bool
) -> None:
    """Without a KL penalty the gradient is zero of itself; with one the recipe says that there is nothing to learn."""
    engine = TrainEngine(configuration(kl_coef), model_dir)
    rates = [engine.train_step(flat(), update=update)["lr"], engine.train_step(random_documents(5))["lr"]]
    before = state(engine)
    assert any(name.endswith("exp_avg") and tensor.abs().max() > 0 for name, tensor in before.items())
    metrics = engine.train_step(flat(), update=update)
    after = state(engine)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert engine.step == 3 and rates[0] < rates[1] < metrics["lr"]
    assert (metrics["grad_norm"], metrics["tokens/trained"]) == (0, 0)
    assert (
        metrics["entropy/mean"] > 0
        and metrics["kl/mean"] > 0
        and metrics["mismatch/logprob_abs_mean"] > 0
        and math.isfinite(metrics["loss"])
    )
    assert engine.train_step(random_documents(5))["lr"] > metrics["lr"]
    assert not torch.equal(state(engine)["model.norm.weight"], after["model.norm.weight"])


def test_a_run_goes_on_from_a_checkpoint_after_such_a_step_as_without_it(model_dir: Path, tmp_path: Path) -> None:
    engine = TrainEngine(configuration(), model_dir)
    engine.train_step(flat(), update=False)  # the optimizer has no state yet
    engine.save(tmp_path / "checkpoint")
    resumed = TrainEngine(configuration(), model_dir)
    resumed.load(tmp_path / "checkpoint")
    for e in (engine, resumed):
        assert e.train_step(random_documents(5))["lr"] == pytest.approx(2e-4)
    first, second = state(engine), state(resumed)
    assert engine.step == resumed.step == 2 and all(torch.equal(first[name], second[name]) for name in first)


class Parts:
    """Trainers, store and generators in one, which write down what they are asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.timeout_s, self.spec = 60.0, None
        self.load = SimpleNamespace(fanout=lambda spec, version, offer: self.note("load", version))
        self.relabel = SimpleNamespace(fanout=lambda version: self.note("relabel", version))

    async def publish(self, spec: Any, version: int, in_use: Any, **options: bool) -> Offer:
        self.calls.append(("publish", version))
        return Offer(version, Places.of([]), ())

    async def note(self, what: str, version: int) -> list[str]:
        self.calls.append((what, version))
        return ["shared memory"]


def test_weights_that_no_step_has_changed_are_not_moved_and_generation_goes_on() -> None:
    async def scenario() -> None:
        parts: Any = Parts()
        buffer = EpisodeBuffer(2, 0, 0, 0, last_step=9)
        weights = WeightSync(parts, parts, parts, buffer)
        for step, is_changed in ((1, False), (2, True), (3, False), (4, False)):
            weights.is_changed |= is_changed
            await weights.publish(step)
            await weights.delivered()
            assert buffer._room() == 2 * (step + 1)
        assert parts.calls == [("relabel", 1), ("publish", 2), ("load", 2), ("relabel", 3), ("relabel", 4)]
        assert (weights.version, weights.label) == (2, 4)  # a replacement takes the one, and calls it the other

    asyncio.run(scenario())


# One prompt a step, and half of the prompts have nothing to compare.
HALF = """
def length(prompt, response, target, **fields):
    return len(response) / 6 if int(target) % 2 else 0.0
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_such_steps_keeps_its_staleness_and_goes_on_exactly(tmp_path: Path) -> None:
    steps = 10
    options = ["rollout.prompts_per_step=1", "evaluation.num_prompts=0", "checkpoint.interval=1"]
    overrides = small_run(tmp_path, steps, HALF, *options)
    whole = run_local(tmp_path / "whole", overrides)
    assert whole.returncode == 0, whole.stderr
    run = start_local(tmp_path / "run", overrides)
    try:
        wait_for(lambda: len(read(tmp_path / "run")) >= 3 or run.poll() is not None, "three steps")
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=120)
    finally:
        run.kill()
    again = run_local(tmp_path / "run", overrides)
    assert again.returncode == 0, again.stderr
    for run_dir in (tmp_path / "whole", tmp_path / "run"):
        check_contract(run_dir, steps)
        metrics = read(run_dir)
        without = [record["groups/zero_signal"] == 1 for record in metrics]
        assert 0 < sum(without) < steps
        assert [record["steps/without_signal"] for record in metrics] == [sum(without[: i + 1]) for i in range(steps)]
        assert [record["tokens/trained"] == 0 for record in metrics] == without
        assert all(record["staleness/max"] == 0 and record["mismatch/logprob_abs_mean"] < 1e-5 for record in metrics)
        assert [record["policy_versions"] for record in read(run_dir, "rollouts.jsonl")] == [
            [i, i] for i in range(steps)
        ]
    check_same(tmp_path / "whole", tmp_path / "run")

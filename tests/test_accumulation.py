"""Sharded weights are gathered once a step, and gradients summed over ranks once: two ranks over gloo."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_train_engine import assert_close, assert_equal, config, gradients, weights
from tiny_models import random_documents, write_model
from torch.utils._python_dispatch import TorchDispatchMode

from forge_hpc.losses.base import LossOutput
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine

DEGREES = {
    "sharded": {"data_parallel_shard_degree": 2},
    "replicated": {"data_parallel_shard_degree": 1, "data_parallel_replicate_degree": 2},
}

WAYS = ("once", "weights once", "each")


def built(directory: Path, degrees: dict[str, int], way: str) -> TrainEngine:
    cfg = config(local_batch_size=1, seq_len=48)
    for key, value in degrees.items():
        setattr(cfg.trainer.parallelism, key, value)
    engine = TrainEngine(cfg, directory / "model")
    engine.microbatch = replace(engine.microbatch, gathers_once=way != "each", sums_once=way == "once")
    return engine


class Collectives(TorchDispatchMode):
    """Counts those of torch.distributed by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace == "c10d":
            self.counts[operation.__name__.partition(".")[0]] += 1
        return operation(*args, **(kwargs or {}))


def counted(engine: TrainEngine, num_documents: int) -> dict[str, Any]:
    """A step, after one that has made what is made once: its microbatches, and what travelled."""
    documents = random_documents(num_documents)
    engine.train_step(documents)
    with Collectives() as mode:
        metrics = engine.train_step(documents)
    with Collectives() as measuring:
        logprobs = engine.logprobs(documents)
    return {
        "microbatches": len(engine._row_starts(engine._pack(documents))),
        "gathers": mode.counts["_allgather_base_"],
        "sums": mode.counts["_reduce_scatter_base_"],
        "metrics": metrics,
        "gradients": gradients(engine),
        "logprobs": logprobs,
        "gathers beside": measuring.counts["_allgather_base_"],
        "weights": weights(engine),
    }


class FailsAtCall:
    """A loss that raises at the last of two microbatches: itself, or half-way through its backward pass."""

    def __init__(self, engine: TrainEngine, *, backwards: bool) -> None:
        self.engine, self.loss, self.backwards, self.num_calls = engine, engine.loss_fn, backwards, 0

    def __call__(self, **given: Any) -> LossOutput:
        self.num_calls += 1
        if self.num_calls == 2 and not self.backwards:
            raise ValueError("of no use")
        if self.num_calls == 2:
            first = next(iter(self.engine.model.layers.values()))
            handle = first.attention.wo.register_full_backward_hook(self.fail)
            self.remove = handle.remove
        return self.loss(**given)  # type: ignore[no-any-return]

    def fail(self, *args: Any) -> None:
        self.remove()
        raise ValueError("of no use")


def after_an_error(engine: TrainEngine, *, backwards: bool) -> dict[str, Any]:
    documents = random_documents(13)
    engine.train_step(documents)
    good, engine.loss_fn = engine.loss_fn, FailsAtCall(engine, backwards=backwards)
    try:
        engine.train_step(documents)
    except ValueError as error:
        told = str(error)
    engine.loss_fn = good
    engine.train_step(documents)
    return {"told": told, "gradients": gradients(engine), "weights": weights(engine)}


def worker(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(directory / "store", rank, 2, rank, timeout_s=120)
    found: dict[Any, Any] = {}
    for name, degrees in DEGREES.items():
        for way in WAYS:
            for num_documents in (2, 13):
                engine = built(directory, degrees, way)
                found[name, way, num_documents] = counted(engine, num_documents)
        for backwards in (False, True):
            failing = built(directory, degrees, "once")
            found[name, "error", backwards] = after_an_error(failing, backwards=backwards)
        engine = built(directory, degrees, "once")
        for _ in range(2):
            engine.train_step(random_documents(13))
        found[name, "no error"] = {"gradients": gradients(engine), "weights": weights(engine)}
    torch.save(found, directory / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    directory = tmp_path_factory.mktemp("ranks")
    write_model(directory / "model", "qwen3", tied=True)
    mp.spawn(worker, (directory,), nprocs=2)
    return torch.load(directory / "0.pt", weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_however_many_microbatches_a_step_has_weights_travel_once(found: dict[Any, Any]) -> None:
    few, many = found["sharded", "once", 2], found["sharded", "once", 13]
    assert few["microbatches"] == 1 < many["microbatches"]
    assert many["gathers"] == few["gathers"] > 0
    # FSDP ends the backward pass of the tied embeddings twice, the first time with what earlier microbatches gave.
    assert 0 < few["sums"] <= many["sums"] <= few["sums"] + 1
    left = found["sharded", "each", 13]  # to FSDP itself
    assert left["gathers"] == left["microbatches"] * found["sharded", "each", 2]["gathers"] > many["gathers"]
    assert left["sums"] == left["microbatches"] * few["sums"]
    between = found["sharded", "weights once", 13]
    assert (between["gathers"], between["sums"]) == (many["gathers"], left["sums"])


@pytest.mark.slow
@pytest.mark.parametrize("name", DEGREES)
@pytest.mark.parametrize("way", ["once", "weights once"])
def test_the_step_is_the_same(found: dict[Any, Any], name: str, way: str) -> None:
    once, each = found[name, way, 13], found[name, "each", 13]
    assert once["metrics"] == pytest.approx(each["metrics"], abs=1e-5)
    assert_close(once["gradients"], each["gradients"])
    assert_close(once["weights"], each["weights"], atol=1e-3)
    for ours, theirs in zip(once["logprobs"], each["logprobs"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-2)  # under the new weights, not those that were gathered


@pytest.mark.slow
@pytest.mark.parametrize("name", DEGREES)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_step_that_fails_part_way_leaves_no_gradients(found: dict[Any, Any], name: str, backwards: bool) -> None:
    failed = found[name, "error", backwards]
    assert failed["told"] == "of no use"
    assert_equal(failed["gradients"], found[name, "no error"]["gradients"])
    assert_equal(failed["weights"], found[name, "no error"]["weights"])


@pytest.mark.slow
def test_passes_without_gradients_gather_as_they_would_without_it(found: dict[Any, Any]) -> None:
    ways = {found["sharded", way, 13]["gathers beside"] for way in WAYS}
    assert len(ways) == 1 and 0 not in ways

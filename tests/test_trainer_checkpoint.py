"""Saving and loading by several ranks: failures of one, and other numbers of ranks.

All ranks are processes of their own, forked from one that has imported torch already: importing takes longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import random_documents
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from forge_hpc.checkpoint import CheckpointError, CheckpointStore, verify
from forge_hpc.config.schema import Config
from forge_hpc.run_dir import RunDir
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine

NUM_DOCUMENTS = 6


def engine_on(model_dir: Path) -> TrainEngine:
    cfg = Config()
    cfg.recipe = "sft"
    cfg.model.dtype = "float32"
    cfg.trainer.optimizer.lr = 1e-3
    cfg.trainer.training.seq_len = 64
    cfg.checkpoint.async_save = True
    return TrainEngine(cfg, model_dir)


def train(engine: TrainEngine) -> float:
    return engine.train_step(random_documents(NUM_DOCUMENTS, with_logprobs=False))["loss"]


def weights(engine: TrainEngine) -> dict[str, torch.Tensor]:
    state = engine.hf_state_dict()
    return {name: getattr(tensor, "full_tensor", tensor.clone)() for name, tensor in state.items()}


def start(rank: int, num_ranks: int, work: Callable[..., Any], directory: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    init_distributed(directory / "store", rank, num_ranks, rank, timeout_s=120)
    torch.save(work(rank, *arguments), directory / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(num_ranks: int, directory: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(rank, *arguments)`` returns on each of so many ranks."""
    directory.mkdir()
    torch.multiprocessing.start_processes(
        start, (num_ranks, work, directory, arguments), nprocs=num_ranks, start_method="spawn"
    )
    return [torch.load(directory / f"rank-{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def fill_disk_of_second_rank(directory: Path) -> None:
    directory.mkdir()
    (directory / "__1_0.distcp").symlink_to("/dev/full")


def block_metadata(directory: Path) -> None:
    (directory / ".metadata.tmp").mkdir(parents=True)


def block_directory(directory: Path) -> None:
    directory.touch()


def no_memory(state: object) -> None:
    raise MemoryError("no memory for the copy")


FAILURES = {
    "a full disk": (fill_disk_of_second_rank, "rank 1: OSError: [Errno 28] No space left on device"),
    "no metadata": (block_metadata, "rank 0: IsADirectoryError: [Errno 21] Is a directory"),
    "no directory": (block_directory, "FileExistsError: [Errno 17] File exists"),
    "no memory": (Path.mkdir, "rank 1: MemoryError: no memory for the copy"),
}


def save_on_two_ranks(rank: int, model_dir: Path, directory: Path, step_dir: Path) -> dict[str, Any]:
    engine = engine_on(model_dir)
    result: dict[str, Any] = {"none yet": engine.wait_for_save(), "errors": {}, "plans": 0}
    plan = DefaultSavePlanner._create_global_plan

    def counted(planner: DefaultSavePlanner, plans: Any) -> Any:
        result["plans"] += 1
        return plan(planner, plans)

    DefaultSavePlanner._create_global_plan = counted  # type: ignore[method-assign]  # of this process
    train(engine)
    for name, (block, _) in FAILURES.items():
        if rank == 0:
            (directory / name).mkdir()
            block(directory / name / "trainer")
        dist.barrier()
        with pytest.MonkeyPatch.context() as patch:
            if name == "no memory" and rank == 1:
                patch.setattr(engine._checkpointer._staging, "copy", no_memory)
            engine.save(directory / name / "trainer")
        began = time.monotonic()
        with pytest.raises(CheckpointError) as raised:
            engine.wait_for_save()
        result["errors"][name] = str(raised.value), time.monotonic() - began
        assert engine.wait_for_save() == {}  # told once
        train(engine)
    engine.save(step_dir / "trainer")
    saved = weights(engine)
    losses = [train(engine) for _ in range(2)]  # while it is being written, from the same buffers each time
    files = engine.wait_for_save()
    assert engine.wait_for_save() == files
    return result | {"files": files, "weights": saved, "losses": losses, "step": engine.step}


def load_on_ranks(rank: int, model_dir: Path, directory: Path) -> dict[str, Any]:
    engine = engine_on(model_dir)
    engine.load(directory)
    return {"weights": weights(engine), "losses": [train(engine) for _ in range(2)], "step": engine.step}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[list[dict[str, Any]], Path]:
    """What two ranks say, and the checkpoint that they made."""
    directory = tmp_path_factory.mktemp("saved")
    store = CheckpointStore(RunDir(directory / "run").create(), keep=1)
    results = on_ranks(2, directory / "two", save_on_two_ranks, model_dir, directory, store.begin(5))
    files = {name: record for result in results for name, record in result["files"].items()}
    return results, store.commit(5, {"step": 5}, files)


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_what_one_rank_cannot_write_all_are_told_at_once_and_can_save_again(
    saved: tuple[list[dict[str, Any]], Path], failure: str
) -> None:
    for result in saved[0]:
        message, seconds = result["errors"][failure]
        assert FAILURES[failure][1] in message and f"{failure}/trainer" in message
        assert seconds < 60  # no rank waits for a collective call that never comes


@pytest.mark.slow
def test_each_rank_says_what_it_wrote_and_together_that_is_the_checkpoint(
    saved: tuple[list[dict[str, Any]], Path],
) -> None:
    results, path = saved
    assert [sorted(result["files"]) for result in results] == [
        ["trainer/.metadata", "trainer/__0_0.distcp"],
        ["trainer/__1_0.distcp"],
    ]
    assert all(result["none yet"] == {} for result in results)
    assert verify(path) is None


@pytest.mark.slow
def test_the_first_rank_plans_for_all_once(saved: tuple[list[dict[str, Any]], Path]) -> None:
    assert [result["plans"] for result in saved[0]] == [1, 0]  # of five saves, of which four failed


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_checkpoint_of_two_ranks_loads_on_another_number(
    saved: tuple[list[dict[str, Any]], Path], model_dir: Path, tmp_path: Path, num_ranks: int
) -> None:
    (two, _), path = saved
    for result in on_ranks(num_ranks, tmp_path / "loaded", load_on_ranks, model_dir, path / "trainer"):
        for name, tensor in two["weights"].items():
            assert torch.equal(result["weights"][name], tensor), name
        assert result["losses"] == pytest.approx(two["losses"], abs=1e-5)  # the second: with the optimizer's state
        assert result["step"] == two["step"]

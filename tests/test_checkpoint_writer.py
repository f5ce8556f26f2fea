"""One rank's part of a checkpoint, in several files that are hashed while they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from forge_hpc.checkpoint import describe
from forge_hpc.training import checkpoint_writer
from forge_hpc.training.checkpoint_writer import CheckpointWriter, threads_for

STATE = {f"w{i}": torch.arange(1000.0 * (i + 1)) for i in range(7)}


def test_what_several_threads_write_is_hashed_as_it_lies_on_the_disk_and_loads(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "trainer", None, 3, per_thread_copy_ahead=0)
    dcp.save(STATE, storage_writer=writer, no_dist=True)
    files = sorted((tmp_path / "trainer").iterdir())
    assert [file.name for file in files] == [".metadata", "__0_0.distcp", "__0_1.distcp", "__0_2.distcp"]
    assert writer.records == {file: describe(file) for file in files}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "trainer", no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STATE.items())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("file", ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp"])
def test_a_disk_that_is_full_for_one_thread_fails_the_save(tmp_path: Path, file: str) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / file).symlink_to("/dev/full")
    with pytest.raises(CheckpointException) as raised:
        dcp.save(STATE, storage_writer=CheckpointWriter(tmp_path / "trainer", None, 3), no_dist=True)
    [(cause, _)] = raised.value.failures.values()
    assert isinstance(cause, OSError) and cause.errno == errno.ENOSPC
    assert not (tmp_path / "trainer" / ".metadata").exists()


def test_a_rank_takes_its_share_of_the_cores_and_one_thread_for_a_small_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    unit = checkpoint_writer.BYTES_A_THREAD
    assert [threads_for(num) for num in (0, unit, 3 * unit, 100 * unit)] == [1, 1, 3, 4]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert threads_for(100 * unit) == checkpoint_writer.MAX_THREADS

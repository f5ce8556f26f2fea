"""A checkpoint is complete if and only if its manifest verifies; what is complete is never lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_hpc.checkpoint import CheckpointStore, verify
from forge_hpc.run_dir import RunDir


def save(store: CheckpointStore, step: int, content: bytes = b"weights") -> Path:
    directory = store.begin(step)
    (directory / "trainer").mkdir()
    (directory / "trainer" / "shard").write_bytes(content)
    return store.commit(step, {"step": step, "recipe": {}})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(RunDir(tmp_path / "run").create(), keep=2)


def test_the_newest_checkpoints_are_kept(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        save(store, step)
    assert store.steps() == [2, 3]
    path, state = store.newest() or (None, None)
    assert path is not None and path.name == "step-00000003" and state == {"step": 3, "recipe": {}}


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda shard: shard.write_bytes(b"weigh"), "5 bytes instead of 7"),
        (lambda shard: shard.write_bytes(b"weightz"), "checksum"),
        (lambda shard: shard.unlink(), "shard is missing"),
        (lambda shard: (shard.parent.parent / "manifest.json").write_text("{"), "cannot be read"),
        (lambda shard: (shard.parent.parent / "manifest.json").unlink(), "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, damage: object, problem: str
) -> None:
    good, bad = save(store, 1), save(store, 2)
    damage(bad / "trainer" / "shard")  # type: ignore[operator]
    assert problem in (verify(bad) or "")
    assert (store.newest() or (None,))[0] == good
    assert problem in caplog.text


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_removed(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 1)
    (store.begin(2) / "shard").write_bytes(b"half")
    again = CheckpointStore(RunDir(tmp_path / "run"), keep=2)
    assert again.steps() == [1]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


def test_a_step_that_is_reached_again_replaces_its_checkpoint(store: CheckpointStore) -> None:
    save(store, 1)
    path = save(store, 1, b"other weights")
    assert verify(path) is None
    assert (path / "trainer/shard").read_bytes() == b"other weights"

"""A checkpoint is complete if and only if its manifest verifies; what is complete is never lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from disks import set_read_only, small_disk

from forge_hpc.checkpoint import CheckpointError, CheckpointStore, FileRecord, describe, load_extra, verify
from forge_hpc.config.errors import UserError
from forge_hpc.run_dir import RunDir


def write_shard(directory: Path, rank: int = 0, content: bytes = b"weights") -> dict[str, FileRecord]:
    """What a trainer rank does."""
    (directory / "trainer").mkdir(exist_ok=True)
    path = directory / "trainer" / f"__{rank}_0.distcp"
    path.write_bytes(content)
    return {f"trainer/{path.name}": describe(path)}


def save(
    store: CheckpointStore, step: int, content: bytes = b"weights", extra: Mapping[str, bytes] | None = None
) -> Path:
    files = write_shard(store.begin(step), content=content)
    return store.commit(step, {"step": step, "recipe": {}}, files, extra)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run").create()


@pytest.fixture
def store(run_dir: RunDir) -> CheckpointStore:
    return CheckpointStore(run_dir, keep=2)


SHARD = Path("trainer/__0_0.distcp")


# ---- what is complete


def test_the_newest_checkpoints_are_kept(store: CheckpointStore, run_dir: RunDir) -> None:
    for step in (1, 2, 3):
        save(store, step)
    assert names(run_dir.checkpoints) == ["step-00000002", "step-00000003"]
    path, state = store.newest() or (None, None)
    assert path is not None and path.name == "step-00000003" and state == {"step": 3, "recipe": {}}


def test_the_best_checkpoint_stays_until_a_better_one_is_marked(store: CheckpointStore, run_dir: RunDir) -> None:
    assert store.best() is None
    save(store, 1)
    store.mark_best(1, "accuracy", 0.5)
    for step in (2, 3, 4, 5):
        save(store, step)
    assert names(run_dir.checkpoints) == ["best.json", "step-00000001", "step-00000004", "step-00000005"]
    again = CheckpointStore(run_dir, keep=2)
    assert again.best() == {"step": 1, "figure": "accuracy", "value": 0.5}
    again.mark_best(5, "accuracy", 0.75)
    save(again, 6)
    assert names(run_dir.checkpoints) == ["best.json", "step-00000005", "step-00000006"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: os.truncate(path / SHARD, 5), "5 bytes instead of 7"),
        (lambda path: (path / SHARD).write_bytes(b"weightz"), "checksum"),
        (lambda path: (path / SHARD).unlink(), "__0_0.distcp is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("{}"), "lists no files"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"controller.json": 1}}'), "cannot be read"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "controller.json").unlink(), "controller.json is missing"),
        (lambda path: (shutil.rmtree(path), path.touch()), "Not a directory"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], problem: str
) -> None:
    good, bad = save(store, 1), save(store, 2)
    damage(bad)
    assert problem in (verify(bad) or "")
    assert (store.newest() or (None,))[0] == good
    assert problem in caplog.text and str(bad) in caplog.text


def test_a_checkpoint_that_vanishes_while_it_is_looked_for_is_passed_over(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(store, 1)
    monkeypatch.setattr(store, "steps", lambda: [1, 2])
    assert (store.newest() or (None,))[0] == good
    assert "step-00000002: manifest.json is missing" in caplog.text


def test_one_damaged_byte_among_many_files_is_found(store: CheckpointStore) -> None:
    directory, files = store.begin(1), {}
    for rank in range(40):
        files |= write_shard(directory, rank, os.urandom(100_000))
    path = store.commit(1, {}, files)
    assert verify(path) is None
    with (path / "trainer/__23_0.distcp").open("r+b") as shard:
        shard.seek(50_000)
        byte = shard.read(1)
        shard.seek(50_000)
        shard.write(bytes([byte[0] ^ 1]))
    assert verify(path) == "trainer/__23_0.distcp is damaged: its checksum differs"


def test_the_controller_does_not_read_what_the_ranks_have_hashed(store: CheckpointStore) -> None:
    files = write_shard(store.begin(1))
    files["trainer/__0_0.distcp"]["sha256"] = "of other bytes"
    path = store.commit(1, {"step": 1}, files)
    assert "checksum differs" in (verify(path) or "")


def test_without_the_ranks_sums_the_controller_hashes_all(store: CheckpointStore) -> None:
    write_shard(store.begin(1))
    path = store.commit(1, {"step": 1})
    assert verify(path) is None
    assert json.loads((path / "manifest.json").read_text())["files"].keys() == {str(SHARD), "controller.json"}


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda directory, files: files.popitem(), "is of no trainer rank"),
        (lambda directory, files: os.truncate(directory / SHARD, 3), "has 3 bytes, its rank wrote 7"),
        (lambda directory, files: (directory / SHARD).unlink(), "is missing, a rank wrote it"),
        (lambda directory, files: shutil.rmtree(directory), "No such file"),
    ],
)
def test_what_is_not_what_the_ranks_say_is_no_checkpoint(
    store: CheckpointStore, run_dir: RunDir, spoil: Callable[[Path, dict[str, FileRecord]], object], problem: str
) -> None:
    save(store, 1)
    directory = store.begin(2)
    files = write_shard(directory)
    spoil(directory, files)
    with pytest.raises(CheckpointError, match=f"cannot save step 2: .*{problem}") as raised:
        store.commit(2, {"step": 2}, files)
    assert str(run_dir.checkpoints) in str(raised.value)
    assert names(run_dir.checkpoints) == ["step-00000001"]
    assert verify(save(store, 2)) is None


def test_files_of_the_recipe_come_back(store: CheckpointStore) -> None:
    save(store, 1, extra={"episodes.npz": b"\x00\xff", "notes.txt": b""})
    path, _ = store.newest() or (Path(), {})
    assert load_extra(path, "episodes.npz") == b"\x00\xff"
    assert load_extra(path, "notes.txt") == b""
    assert load_extra(path, "other") is None
    assert (path / "episodes.npz").stat().st_mode & 0o777 == 0o600
    (path / "notes.txt").write_bytes(b"!")
    assert "notes.txt has 1 bytes" in (verify(path) or "")


# ---- formats


def test_a_checkpoint_of_a_newer_version_is_refused_not_passed_over(store: CheckpointStore) -> None:
    for step in (1, 2):
        path = save(store, step)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == json.loads((path / "controller.json").read_text())["format"] == 1
    for name in ("manifest.json", "controller.json"):
        old = (path / name).read_text()
        value = json.loads(old) | {"format": 2}
        (path / name).write_text(json.dumps(value))
        if name == "controller.json":
            records = manifest["files"] | {name: describe(path / name)}
            (path / "manifest.json").write_text(json.dumps(manifest | {"files": records}))
        with pytest.raises(UserError, match=rf"{name} was written by a newer forge_hpc \(format 2") as raised:
            store.newest()
        assert "--run-dir" in (raised.value.hint or "")
        (path / name).write_text(old)


def test_a_checkpoint_from_before_there_were_formats_is_read(store: CheckpointStore) -> None:
    path = save(store, 1)
    (path / "controller.json").write_text(json.dumps({"step": 1}))
    files = {str(SHARD): describe(path / SHARD), "controller.json": describe(path / "controller.json")}
    (path / "manifest.json").write_text(json.dumps({"step": 1, "files": files}))
    assert store.newest() == (path, {"step": 1})


# ---- what is deleted, and when


def test_what_killed_writers_left_is_removed(store: CheckpointStore, run_dir: RunDir) -> None:
    save(store, 1)
    (store.begin(2) / "shard").write_bytes(b"half")
    (run_dir.checkpoints / ".gone-00000000.1234").mkdir()
    (run_dir.checkpoints / ".step-00000002").mkdir()  # as earlier versions named it
    assert CheckpointStore(run_dir, keep=2).steps() == [1]
    assert names(run_dir.checkpoints) == ["step-00000001"]


def test_a_step_that_is_reached_again_replaces_its_checkpoint(store: CheckpointStore, run_dir: RunDir) -> None:
    save(store, 1)
    path = save(store, 1, b"other weights")
    assert verify(path) is None
    assert (path / SHARD).read_bytes() == b"other weights"
    assert names(run_dir.checkpoints) == ["step-00000001"]


@pytest.mark.parametrize("successor_is_there", [False, True])
def test_a_replacement_that_was_cut_short_loses_neither(
    store: CheckpointStore, run_dir: RunDir, successor_is_there: bool
) -> None:
    path = save(store, 1)
    path.rename(run_dir.checkpoints / ".old-00000001")
    if successor_is_there:
        save(store, 1, b"successor")
        path.rename(run_dir.checkpoints / "aside")
        save(store, 1).rename(run_dir.checkpoints / ".old-00000001")
        (run_dir.checkpoints / "aside").rename(path)
    again = CheckpointStore(run_dir, keep=1)
    assert (again.newest() or (None,))[0] == path
    assert (path / SHARD).read_bytes() == (b"successor" if successor_is_there else b"weights")
    assert names(run_dir.checkpoints) == ["step-00000001"]


def test_with_one_to_keep_the_old_one_stays_until_the_new_one_is_there(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(run_dir, keep=1)
    save(store, 1)
    deleted: list[str] = []
    real = shutil.rmtree

    def rmtree(path: Path, *args: Any) -> None:
        deleted.append(path.name)
        assert verify(run_dir.checkpoint(2)) is None
        real(path, *args)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save(store, 2)
    assert len(deleted) == 1 and deleted[0].startswith(".gone-00000001")
    assert store.steps() == [2]


def test_damaged_checkpoints_do_not_count_and_go_when_something_newer_is_good(run_dir: RunDir) -> None:
    store = CheckpointStore(run_dir, keep=9)
    for step in (1, 2, 3, 4, 6):
        save(store, step)
    for step in (3, 4, 6):
        os.truncate(run_dir.checkpoint(step) / SHARD, 1)

    store = CheckpointStore(run_dir, keep=2)
    path, _ = store.newest() or (Path(), {})
    assert path == run_dir.checkpoint(2)
    assert store.steps() == [1, 2, 3, 4, 6]  # finding them damaged deletes nothing
    save(store, 5)
    assert store.steps() == [2, 5, 6]  # the damaged of step 6 may still be mended
    save(store, 6)
    assert store.steps() == [5, 6] and verify(run_dir.checkpoint(6)) is None
    save(store, 7)
    assert store.steps() == [6, 7]


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(
    store: CheckpointStore, run_dir: RunDir, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    real = save(store, 1)
    real.rename(tmp_path / "moved by its owner")
    real.symlink_to(tmp_path / "moved by its owner")
    save(store, 2)
    assert (store.newest() or (None,))[0] == run_dir.checkpoint(2)
    save(store, 3)
    assert names(run_dir.checkpoints) == ["step-00000002", "step-00000003"]
    assert verify(tmp_path / "moved by its owner") is None  # the link is gone, what it led to is not ours


def test_two_starts_at_once_lose_nothing(run_dir: RunDir) -> None:
    """A start that was cut off goes on writing while the one that replaced it works."""
    cut_off = CheckpointStore(run_dir, keep=1)
    save(cut_off, 10)
    late = cut_off.begin(20)
    late_files = write_shard(late, content=b"of the one that was cut off")

    store = CheckpointStore(run_dir, keep=1)
    assert (store.newest() or (None,))[0] == run_dir.checkpoint(10)
    files = write_shard(store.begin(20), content=b"of the new one")
    late.mkdir(exist_ok=True)
    write_shard(late, content=b"later still")  # into its own directory, whose name no one else uses
    with pytest.raises(CheckpointError):
        cut_off.commit(20, {"step": 20}, late_files)
    path = store.commit(20, {"step": 20}, files)
    assert verify(path) is None and (path / SHARD).read_bytes() == b"of the new one"

    save(cut_off, 30)  # deletes step 20, and leaves something newer
    save(store, 25)
    assert verify(run_dir.checkpoint(30)) is None
    assert (CheckpointStore(run_dir, keep=1).newest() or (None,))[0] == run_dir.checkpoint(30)


WRITER = textwrap.dedent("""
    import sys
    from forge_hpc.checkpoint import CheckpointStore
    from forge_hpc.run_dir import RunDir
    store = CheckpointStore(RunDir(sys.argv[1]), keep=1)
    found = store.newest()
    step = found[1]["step"] if found else 0
    while True:
        step += 1
        (store.begin(step) / "shard").write_bytes(bytes([step]) * 3_000_000)
        store.commit(step, {"step": step}, extra={"episodes": b"e" * 1_000_000})
        print(step, flush=True)
""")


def test_a_writer_that_is_killed_at_any_moment_leaves_its_last_checkpoint(run_dir: RunDir) -> None:
    told = 0
    for num_saves, seconds in ((1, 0.0), (3, 0.004), (5, 0.012), (2, 0.02)):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run_dir)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(num_saves):
                told = int(writer.stdout.readline())
            time.sleep(seconds)  # somewhere in the next save
            writer.kill()
            told = max([told, *map(int, writer.stdout.read().split())])
        store = CheckpointStore(run_dir, keep=1)
        path, state = store.newest() or (Path(), {})
        assert state["step"] >= told >= num_saves  # what it said was saved is there
        assert (path / "shard").read_bytes()[:1] == bytes([state["step"]])
        assert not [name for name in names(run_dir.checkpoints) if name.startswith(".")]


# ---- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Four megabytes."""
    with small_disk(tmp_path / "disk", 4 << 20) as path:
        yield path


def test_a_full_disk_costs_the_new_checkpoint_alone_and_gets_its_space_back(disk: Path) -> None:
    run_dir = RunDir(disk / "run").create()
    store = CheckpointStore(run_dir, keep=2)
    save(store, 1, b"x" * 1_000_000)

    directory = store.begin(2)  # full while a rank writes
    with pytest.raises(OSError, match="No space left"):
        write_shard(directory, content=b"x" * 5_000_000)
    store.abandon(2)
    store.abandon(2)
    assert names(run_dir.checkpoints) == ["step-00000001"]

    files = write_shard(store.begin(2), content=b"x" * 1_000_000)  # full while the controller writes
    with pytest.raises(CheckpointError, match=r"cannot save step 2: No space left on device: .*/run/checkpoints"):
        store.commit(2, {"step": 2}, files, {"episodes.npz": b"x" * 5_000_000})
    assert names(run_dir.checkpoints) == ["step-00000001"]
    assert verify(run_dir.checkpoint(1)) is None

    save(store, 2, b"x" * 1_700_000)
    with pytest.raises(CheckpointError, match=r"has .* GB \(\d+ bytes\) free, the last checkpoint took 0.0017 GB"):
        store.begin(3)
    assert store.steps() == [1, 2]
    shutil.rmtree(run_dir.checkpoint(1))
    save(store, 3, b"x" * 1_700_000)
    assert (CheckpointStore(run_dir, keep=2).newest() or (None,))[0] == run_dir.checkpoint(3)


def test_a_start_that_finds_a_full_disk_frees_what_a_killed_writer_left(disk: Path) -> None:
    run_dir = RunDir(disk / "run").create()
    store = CheckpointStore(run_dir, keep=1)
    save(store, 1, b"x" * 1_000_000)
    with pytest.raises(OSError, match="No space left"):
        write_shard(store.begin(2), content=b"x" * 5_000_000)
    assert shutil.disk_usage(disk).free == 0
    store = CheckpointStore(run_dir, keep=1)
    assert (store.newest() or (None,))[0] == run_dir.checkpoint(1)
    save(store, 2, b"x" * 1_000_000)


def test_a_read_only_file_system_is_a_user_error_at_the_start_and_a_failed_save_later(disk: Path) -> None:
    run_dir = RunDir(disk / "run").create()
    store = CheckpointStore(run_dir, keep=1)
    save(store, 1)
    files = write_shard(store.begin(2))
    set_read_only(disk)
    with pytest.raises(CheckpointError, match="cannot save step 2: Read-only file system"):
        store.commit(2, {"step": 2}, files)
    with pytest.raises(CheckpointError, match="cannot save step 3: Read-only file system"):
        store.begin(3)
    assert (store.newest() or (None,))[0] == run_dir.checkpoint(1)
    with pytest.raises(UserError, match=r"cannot write checkpoints into .*/checkpoints: Read-only") as raised:
        CheckpointStore(run_dir, keep=1)
    assert raised.value.hint
    set_read_only(disk, False)
    store = CheckpointStore(run_dir, keep=1)
    save(store, 2)
    assert names(run_dir.checkpoints) == ["step-00000002"]


def test_checkpoints_may_be_a_link_to_another_file_system(disk: Path, run_dir: RunDir) -> None:
    (disk / "checkpoints").mkdir()
    run_dir.checkpoints.symlink_to(disk / "checkpoints")
    store = CheckpointStore(run_dir, keep=1)
    for step in (1, 2, 2):
        save(store, step, extra={"episodes.npz": b"e"})
    assert names(disk / "checkpoints") == ["step-00000002"]
    assert (CheckpointStore(run_dir, keep=1).newest() or (None,))[0] == run_dir.checkpoint(2)
    assert run_dir.checkpoints.is_symlink()


def test_a_link_that_leads_nowhere_is_a_user_error(run_dir: RunDir, tmp_path: Path) -> None:
    run_dir.checkpoints.symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"is a link to {tmp_path}/nothing, which does not exist"):
        CheckpointStore(run_dir, keep=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_what_permissions_forbid_is_a_user_error() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        run_dir = RunDir(Path(name) / "run").create()
        run_dir.path.chmod(0o755)
        store = CheckpointStore(run_dir, keep=1)
        path = save(store, 1)
        for directory in (run_dir.checkpoints, path):
            directory.chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r"cannot write checkpoints into .*: Permission denied"):
                CheckpointStore(run_dir, keep=1)
            with pytest.raises(UserError, match=rf"no permission to read {path}/manifest.json"):
                store.newest()
        finally:
            os.seteuid(0)

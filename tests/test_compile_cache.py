"""What was compiled outlives a start, in a folder that nobody else can write."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from forge_hpc.supervisor.compile_cache import UNUSED_S, compile_cache


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"forge-hpc-cache-{os.getuid()}"


def test_two_starts_share_a_private_folder_and_what_the_user_has_set_stays(root: Path) -> None:
    first = compile_cache({})
    assert first == compile_cache({}) and set(first) == {
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "VLLM_CACHE_ROOT",
    }
    assert all(Path(folder).parent.parent == root for folder in first.values())
    assert root.stat().st_mode & 0o777 == 0o700
    assert "TRITON_CACHE_DIR" not in compile_cache({"TRITON_CACHE_DIR": "/elsewhere"})


def test_a_folder_that_somebody_else_could_have_written_is_not_taken(root: Path, tmp_path: Path) -> None:
    root.mkdir(mode=0o700)
    root.chmod(0o770)
    assert compile_cache({}) == {}
    root.rmdir()
    (tmp_path / "theirs").mkdir(mode=0o700)
    root.symlink_to(tmp_path / "theirs")
    assert compile_cache({}) == {}
    root.unlink()
    if os.getuid() == 0:
        root.mkdir(mode=0o700)
        os.chown(root, 12345, -1)
        assert compile_cache({}) == {}


def test_folders_of_versions_that_no_start_has_used_for_a_month_go(root: Path) -> None:
    compile_cache({})
    old, recent = root / "torch1-vllm1", root / "torch2-vllm2"
    for folder, age_s in ((old, UNUSED_S + 60), (recent, UNUSED_S - 3600)):
        folder.mkdir()
        os.utime(folder, (time.time() - age_s,) * 2)
    compile_cache({})
    assert not old.exists() and recent.exists()


def test_where_it_cannot_be_made_each_start_compiles_anew(root: Path) -> None:
    root.write_text("in the way")
    assert compile_cache({}) == {}

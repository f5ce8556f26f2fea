"""What processes import, and how."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_hpc.data.builtin import write_tiny_qwen3
from forge_hpc.imports import importing

BUILD = """
import sys
from pathlib import Path
import forge_hpc.training.models  # as a trainer does
import torch
from torchtitan.config import ParallelismConfig
from forge_hpc.models.attention import inner_attention_config
from forge_hpc.models.spec import load_spec
attention = inner_attention_config(torch.float32, 1)
load_spec(Path(sys.argv[1]), max_positions=128, inner_attention=attention, parallelism=ParallelismConfig())
assert not {"torchtitan.trainer", "datasets", "pandas", "pyarrow"} & sys.modules.keys()
import torchtitan.trainer
assert torchtitan.trainer.Trainer.Config.__dataclass_fields__, "the stand-in has stayed"
"""


LEAVE = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count()))  # after what is registered later
from forge_hpc.imports import importing
with importing():
    import colorsys
print(gc.get_freeze_count())
"""


@pytest.fixture
def new_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes 100,000 objects."""
    (tmp_path / "only_here.py").write_text("made = [[number] for number in range(100_000)]")
    monkeypatch.syspath_prepend(tmp_path)
    yield "only_here"
    sys.modules.pop("only_here", None)
    gc.unfreeze()


def test_no_garbage_is_looked_for_while_modules_are_imported_nor_among_them_later(new_module: str) -> None:
    frozen, collections = gc.get_freeze_count(), []
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    try:
        with importing():
            importlib.import_module(new_module)
            assert not gc.isenabled()
        assert collections == []
    finally:
        gc.callbacks.pop()
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + 100_000


def test_where_no_module_is_new_nothing_is_kept(new_module: str) -> None:
    importlib.import_module(new_module)
    frozen = gc.get_freeze_count()
    with importing():
        importlib.import_module(new_module)
    assert gc.get_freeze_count() == frozen


def test_the_collector_is_as_it_was_when_the_last_of_several_has_imported() -> None:
    first, second = importing(), importing()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as threads may
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_at_the_end_of_a_process_nothing_is_left_out() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=120, check=True)
    meanwhile, at_the_end = map(int, done.stdout.split())
    assert meanwhile > 0 and at_the_end == 0


def test_a_trainer_imports_no_data_sets_with_its_model(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model", seed=0)
    done = subprocess.run([sys.executable, "-c", BUILD, str(model)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

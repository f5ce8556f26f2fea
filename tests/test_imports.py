"""What processes import, and how."""

from __future__ import annotations

import gc
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


@pytest.fixture
def _objects_as_before() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_objects_as_before")
def test_no_garbage_is_looked_for_while_modules_are_imported_nor_among_them_later() -> None:
    frozen, collections = gc.get_freeze_count(), []
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    try:
        with importing():
            made = [[number] for number in range(100_000)]
            assert not gc.isenabled()
        assert collections == []
    finally:
        gc.callbacks.pop()
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(made)


@pytest.mark.usefixtures("_objects_as_before")
def test_a_module_that_is_missing_leaves_the_collector_as_it_was() -> None:
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


def test_a_trainer_imports_no_data_sets_with_its_model(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model", seed=0)
    done = subprocess.run([sys.executable, "-c", BUILD, str(model)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

"""Models from checkpoints: the run's own weights to the last bit, beside a run that goes on, and adapters for PEFT."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_documents, write_model
from transformers import AutoModelForCausalLM

from forge_hpc.checkpoint import CheckpointStore, verify
from forge_hpc.checkpoint.borrow import borrowed
from forge_hpc.config import UserError, config_text, load_config
from forge_hpc.config.schema import Config
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.export import export
from forge_hpc.run_dir import RunDir
from forge_hpc.training.engine import TrainEngine
from forge_hpc.training.export import export_hf

pytestmark = pytest.mark.usefixtures("process_group")


def configure(model_dir: Path, *overrides: str) -> Config:
    small = ["trainer.training.seq_len=64", "trainer.training.local_batch_size=2", "trainer.optimizer.lr=1e-2"]
    return load_config(None, ["recipe=grpo", f"model.path={model_dir}", *small, *overrides])


def trained(cfg: Config, run_dir: RunDir) -> TrainEngine:
    """An engine after two steps, saved in the run directory as its controller does; ``export/`` is its own export."""
    engine = TrainEngine(cfg, Path(cfg.model.path))
    for _ in range(2):
        engine.train_step(random_documents(9, with_logprobs=True))
    save(engine, cfg, CheckpointStore(run_dir, 1), 2)
    engine.export(run_dir.export)
    return engine


def save(engine: TrainEngine, cfg: Config, store: CheckpointStore, step: int) -> None:
    directory = store.begin(step)
    engine.save(directory / "trainer")
    extra = {"config.yaml": config_text(cfg).encode()}
    store.commit(step, {"step": step, "recipe": {}}, engine.wait_for_save(), extra)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def new_run(tmp_path: Path, cfg: Config) -> RunDir:
    run_dir = RunDir(tmp_path / "run").create()
    run_dir.config.write_text(config_text(cfg))
    return run_dir


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen3", ["model.dtype=bfloat16"]),
        ("qwen3_moe", ["model.dtype=float32"]),
        ("qwen2", ["trainer.lora.enable=true", "trainer.lora.rank=4", "model.dtype=float32"]),
    ],
)
def test_the_model_of_a_checkpoint_is_the_runs_own_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, overrides: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_model(tmp_path / "model", family, tied=family == "qwen2")
    char_tokenizer().save_pretrained(tmp_path / "model")
    cfg = configure(tmp_path / "model", *overrides)
    run_dir = new_run(tmp_path, cfg)
    trained(cfg, run_dir)
    written = export(run_dir)
    assert written == run_dir.export_of(2)
    assert contents(written) == contents(run_dir.export)
    assert not list(run_dir.checkpoints.glob(".*")) and not list(run_dir.exports.glob(".*"))


def test_what_is_read_stays_readable_though_the_run_deletes_it(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    store = CheckpointStore(run_dir, 1)

    def commit(step: int) -> None:
        (store.begin(step) / "trainer").mkdir()
        (store._staged[step] / "trainer/weights").write_bytes(b"weights of %d" % step)
        store.commit(step, {"step": step})

    commit(1)
    with borrowed(run_dir) as (step, checkpoint):
        commit(2)
        CheckpointStore(run_dir, 1)  # another start of the run, which tidies
        assert step == 1 and store.steps() == [2]
        assert verify(checkpoint) is None and (checkpoint / "trainer/weights").read_bytes() == b"weights of 1"
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step-00000002"]


def test_what_a_killed_reader_left_goes_after_a_day_and_not_before(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    CheckpointStore(run_dir, 1)
    old, young = run_dir.checkpoints / ".read-step-00000001.a", run_dir.checkpoints / ".read-step-00000001.b"
    old.mkdir()
    young.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    CheckpointStore(run_dir, 1)
    assert young.exists() and not old.exists()


def test_a_damaged_checkpoint_is_passed_over_unless_it_is_named(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    store = CheckpointStore(run_dir, 2)
    for step in (1, 2):
        (store.begin(step) / "weights").write_bytes(b"weights")
        store.commit(step, {"step": step})
    (run_dir.checkpoint(2) / "weights").write_bytes(b"WEIGHTS")
    with borrowed(run_dir) as (step, _):
        assert step == 1
    with pytest.raises(UserError, match=r"step 2: weights is damaged") as error, borrowed(run_dir, 2):
        pass
    assert "1, 2" in error.value.hint
    with pytest.raises(UserError, match="no checkpoint of step 7"), borrowed(run_dir, 7):
        pass


def test_an_output_that_exists_is_not_touched(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("…")
    with pytest.raises(UserError, match="exists"):
        export(run_dir, output=tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").exists()


def test_adapters_are_exported_for_peft_and_give_the_merged_models_logits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    write_model(tmp_path / "model", "qwen2", tied=True)
    lora = ["trainer.lora.enable=true", "trainer.lora.rank=4", "trainer.lora.alpha=12", "model.dtype=float32"]
    cfg = configure(tmp_path / "model", *lora)
    engine = TrainEngine(cfg, tmp_path / "model")
    for _ in range(3):
        engine.train_step(random_documents(9, with_logprobs=True))
    engine.export(tmp_path / "export")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export")(ids).logits
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "export/adapter")
        found = adapted(ids).logits
    assert (merged - plain).abs().max() > 0.1
    torch.testing.assert_close(found, merged, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "export/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model") and config["lora_alpha"] == 12
    weights = load_file(tmp_path / "export/adapter/adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7  # A and B, two layers, seven linear layers each
    # By itself, too: it names its base.
    assert peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export/adapter") is not None


def test_a_full_disk_at_an_export_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", "qwen3")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("forge_hpc.training.export.save_file", full)
    state = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(OSError, match="No space"):
        export_hf(state, tmp_path / "model", tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

"""A rule stands at its field, a name in one table: who reads them, and that something new touches no more."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import PROJECT

from forge_hpc.config import Config, UserError, all_keys, load_config, read_config, safe_changes, save_config, validate
from forge_hpc.config.fields import FIXED, FREE, ROUNDING, rule_of, walk
from forge_hpc.config.page import docstrings, page
from forge_hpc.config.schema import EvaluationConfig, RewardConfig, SourceConfig


def changes(*overrides: str) -> list[str]:
    return safe_changes(load_config(None), load_config(None, overrides), 0, "another", "hint")


def test_the_page_of_all_keys_is_what_the_schema_says():
    assert (PROJECT / "docs" / "configuration.md").read_text(encoding="utf-8") == page(), "run: make configuration"
    text = page()
    shown_elsewhere = re.compile(
        r"(sources\.0\.(data|environment|reward)|served\.0\.engine|evaluation\.sets\.0\.reward|algorithm\.sft\.sources\.0)\."
    )
    assert all(f"| `{key}` |" in text for key in all_keys() if not shown_elsewhere.match(key))
    assert "| `sources.0.environment` | `environment` | as `environment` | |" in text
    about = "pass@k for each of these, each at most `samples`; above 1 maj@k and best@k too."
    assert docstrings(EvaluationConfig)["k"] == about


def test_each_key_has_one_rule_however_it_is_reached():
    sets = "evaluation.sets=[{label: a, reward: [{name: exact}]}]"
    lists = [
        "data.sources=[{path: a}]",
        "sources=[{name: a}]",
        "algorithm.sft.sources=[{path: a}]",
        sets,
        "served=[{name: a}]",
    ]
    cfg = load_config(None, lists)
    by_walk = {key: rule for key, _, rule in walk(cfg)}
    assert set(by_walk) == set(all_keys())
    assert all(rule_of(Config, key) == rule for key, rule in by_walk.items())
    assert [rule_of(Config, key).resume for key in ("seed", "slurm.extra.gres", "reward.3.workers", "reward.3")] == [
        FIXED,
        FREE,
        FREE,
        FIXED,
    ]
    assert rule_of(Config, "evaluation").resume == FREE and rule_of(Config, "cluster.gpus_per_node").resume == ROUNDING


def test_the_defaults_of_the_schema_are_among_the_values_that_it_allows():
    cfg = Config()
    cfg.data.sources = [SourceConfig(path="openai/gsm8k")]
    validate(cfg)


@pytest.mark.parametrize(
    "override",
    [
        "generator.engine.gpu_memory_utilization=0.5",
        "generator.engine.max_num_seqs=32",
        "generator.engine.kv_cache_memory_gib=0.5",
        "trainer.training.local_batch_size=1",
        "trainer.activation_checkpoint.mode=full",
        "trainer.compile.enable=false",
        "trainer.parallelism.tensor_parallel_degree=2",
        "trainer.parallelism.data_parallel_shard_degree=4",
        "generator.engine.tensor_parallel_size=2",
        "cluster.gpus_per_node=4",
        "trainer.processes_per_node=4",
    ],
)
def test_a_run_that_died_of_memory_goes_on_with_less_of_it_or_on_other_nodes_and_says_that_bits_may_move(override):
    [line] = changes(override)
    key, _, value = override.partition("=")
    assert line.startswith(f"{key}: ") and line.endswith(f" -> {value} (may change the last bit)")


@pytest.mark.parametrize(
    "override",
    [
        "generator.timeout_s=60",
        "trainer.timeout_s=60",
        "environment.timeout_s=5",
        "environment.max_open_episodes=2",
        "reward.0.timeout_s=5",
        "reward.0.workers=2",
        "cluster.max_restarts=9",
        "sandbox.parallel=2",
        "checkpoint.async_save=false",
        "algorithm.max_steps_without_signal=40",
    ],
)
def test_timeouts_restarts_and_workers_may_change_and_move_nothing(override):
    [line] = changes(override)
    assert "bit" not in line


@pytest.mark.parametrize(
    "override",
    ["rollout.max_staleness=1", "trainer.optimizer.lr=1e-3", "reward.0.weight=2", "trainer.lora.rank=4", "seed=1"],
)
def test_what_is_learned_may_not_change(override):
    with pytest.raises(UserError, match=f"another: {override.partition('=')[0]} "):
        changes(override)
    with pytest.raises(UserError, match=r"another: reward\.1\.name"):
        changes("reward=[{name: exact}, {name: math, workers: 2}]")


def test_a_rule_of_a_list_holds_for_each_item_and_of_a_section_in_a_list_for_each_section():
    cfg = Config()
    cfg.reward.append(RewardConfig("math", workers=0))
    with pytest.raises(UserError, match=r"reward\.1\.workers must be greater than 0, it is 0"):
        validate(cfg)
    with pytest.raises(UserError, match=r"stop_token_ids must be token ids, 0 or more, it is -1"):
        validate(load_config(None, ["rollout.sampling.stop_token_ids=[3, -1]"]))
    with pytest.raises(UserError, match="target_modules is 'w4', which is not known"):
        validate(load_config(None, ["trainer.lora.target_modules=[w1, w4]"]))
    with pytest.raises(UserError, match=r"data\.sources\.1\.weight must be greater than 0, it is 0"):
        validate(load_config(None, ["data.sources=[{path: a/b}, {path: c/d, weight: 0}]"]))


def test_a_directory_that_is_called_like_a_reward_does_not_take_its_place(tmp_path, monkeypatch):
    for name in ("math", "code"):
        (tmp_path / name).mkdir()
    (tmp_path / "r.py").write_text("def f(prompt, response, target, **fields): return 1.0\n")
    monkeypatch.chdir(tmp_path)
    cfg = load_config(None, ["reward=[{name: math}, {name: 'r.py:f'}]", "environment.name=code"])
    assert [reward.name for reward in cfg.reward] == ["math", f"{tmp_path / 'r.py'}:f"]
    assert cfg.environment.name == "code"


def test_a_saved_hub_name_stays_one_also_with_overrides(tmp_path, monkeypatch):
    save_config(load_config(None, ["model.path=Qwen/Qwen3-0.6B"]), tmp_path / "config.yaml")
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    cfg = read_config(tmp_path / "config.yaml", ["cluster.nodes=3"])
    assert (cfg.model.path, cfg.cluster.nodes) == ("Qwen/Qwen3-0.6B", 3)


# ---- something new


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the project's code, to add something to."""
    for name in ("forge_hpc", "launchers", "configs"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(house: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(house)}
    command_line = [sys.executable, *command]
    return subprocess.run(command_line, cwd=house, env=env, text=True, capture_output=True, timeout=120, check=False)


def insert(file: Path, before: str, text: str) -> None:
    content = file.read_text(encoding="utf-8")
    assert content.count(before) == 1
    file.write_text(content.replace(before, text + before), encoding="utf-8")


def test_a_new_bounded_option_touches_the_schema_alone(house: Path):
    option = '    patience: int = setting(3, POSITIVE, resume=FREE)\n    """How long to wait."""\n'
    insert(house / "forge_hpc/config/schema.py", "    dynamic_sampling: bool", option)
    submit = ("-m", "forge_hpc.cli", "submit", "--dry-run", "--cluster", "local", "--run-dir", "r")
    refused = run(house, *submit, "algorithm.patience=0")
    assert refused.returncode == 2
    assert "error: algorithm.patience must be greater than 0, it is 0" in refused.stderr
    (house / "r").mkdir()
    (house / "r" / "config.yaml").write_text("seed: 42\n")  # of the build before
    allowed = run(house, *submit, "algorithm.patience=7")
    assert allowed.returncode == 0, allowed.stderr
    assert "algorithm.patience: 3 -> 7" in allowed.stderr
    row = "| `algorithm.patience` | `3` | whole number, greater than 0. How long to wait. | yes |"
    assert row in run(house, "-m", "forge_hpc.config.page").stdout


LOSS = """
from dataclasses import dataclass
from typing import ClassVar

from forge_hpc.losses.ppo import PPOLoss


@dataclass(frozen=True)
class NewLoss(PPOLoss):
    advantage: ClassVar[str] = "group_mean"
    scale: float = 2.0

    def term(self, x):
        term, metrics = super().term(x)
        return self.scale * term, metrics
"""
USE = """
import sys
from forge_hpc.config import load_config, validate
from forge_hpc.config.algorithm import loss_facts, resolve_advantage
cfg = load_config(None, ["algorithm.loss=new", "algorithm.loss_args={scale: 3}", "algorithm.clip_low=0.1"])
validate(cfg)
assert resolve_advantage(cfg.algorithm) == "group_mean"
assert loss_facts("new").options == ("clip_low", "clip_high", "dual_clip", "scale")
assert "torch" not in sys.modules
from forge_hpc.losses import build_loss
loss = build_loss("new", cfg.algorithm)
assert (type(loss).__name__, loss.scale, loss.clip_low) == ("NewLoss", 3, 0.1)
"""


def test_a_new_loss_touches_its_own_file_and_one_table(house: Path):
    (house / "forge_hpc/losses/new.py").write_text(LOSS)
    insert(house / "forge_hpc/config/registry.py", '    "dr_grpo": ', '    "new": "forge_hpc.losses.new:NewLoss",\n')
    used = run(house, "-c", USE)
    assert used.returncode == 0, used.stderr
    misspelt = run(house, "-m", "forge_hpc.cli", "submit", "--dry-run", "algorithm.loss=nwe")
    assert "hint: did you mean new?" in misspelt.stderr
    foreign = run(house, "-m", "forge_hpc.cli", "submit", "--dry-run", "algorithm.loss_args={scale: 3}")
    assert "is not used by algorithm.loss=grpo" in foreign.stderr and "losses that do: new" in foreign.stderr
    assert "`new`" in run(house, "-m", "forge_hpc.config.page").stdout

"""Every shipped configuration fits the GPUs that the README promises for it, by the plan that `submit` makes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT

from forge_hpc import before_queue
from forge_hpc.before_queue import Outlook, look_ahead
from forge_hpc.config import Config, UserError, load_config
from forge_hpc.config.hub_cache import repo_folder
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing.model import model_size
from forge_hpc.slurm.partitions import Kind, Partition

CONFIGS = PROJECT / "configs"
README = (PROJECT / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\S+\.yaml)` \| .+ \| (\d+) nodes? of (\d+), (\d+) GB each \|$", re.MULTILINE)
PROMISED = {file: tuple(map(int, promise)) for file, *promise in ROW.findall(README)}
"""Nodes, GPUs of each, GB of a GPU, by configuration."""
LEAST = {24: "l4", 40: "a100_40gb", 80: "a100_80gb"}
"""Of the GPUs of so many GB one on which CUDA shows the least, as Slurm names it."""

QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
QWEN3_1_7B = QWEN3 | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "Qwen/Qwen3-0.6B": (596_049_920, QWEN3_1_7B | {"hidden_size": 1024, "intermediate_size": 3072}),
    "Qwen/Qwen3-1.7B": (1_720_574_976, QWEN3_1_7B),
    "Qwen/Qwen3-1.7B-Base": (1_720_574_976, QWEN3_1_7B),
    "Qwen/Qwen3-8B": (8_190_735_360, QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    }),
    "Qwen/Qwen3-32B": (32_762_123_264, QWEN3 | {
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "tie_word_embeddings": False,
    }),
    "Qwen/Qwen2.5-7B-Instruct": (7_615_616_512, {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    }),
    "meta-llama/Llama-3.1-8B-Instruct": (8_030_261_248, LLAMA_8B),
    "meta-llama/Meta-Llama-3-8B-Instruct": (8_030_261_248, LLAMA_8B),
}  # fmt: skip
"""Published parameters, tied ones once, and dimensions."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hugging Face cache that has the shapes of these models, and disks that all nodes see."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(before_queue, "_own_disks", set)
    for name, (_, dimensions) in MODELS.items():
        folder = repo_folder(name)
        (folder / "snapshots/abc").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("abc")
        (folder / "snapshots/abc/config.json").write_text(json.dumps(dimensions))


@pytest.mark.usefixtures("hub")
def test_the_models_have_as_many_parameters_as_their_makers_say() -> None:
    for name, (num_params, _) in MODELS.items():
        size = model_size(name)
        assert size is not None and (size.num_params, size.hf is not None) == (num_params, True), name


def test_the_table_has_every_configuration_that_names_its_gpus() -> None:
    shipped = {str(path.relative_to(CONFIGS)): load_config(path) for path in CONFIGS.rglob("*.yaml")}
    assert {file for file, cfg in shipped.items() if cfg.cluster.gpus_per_node} == PROMISED.keys()
    assert {cfg.model.path for cfg in shipped.values() if "/" in cfg.model.path} == MODELS.keys()


def outlook(cfg: Config, gpu: str, tmp_path: Path) -> Outlook:
    known = Partition("gpu", True, True, 1e9, (Kind(cfg.cluster.nodes, 8, gpu=gpu),))
    return look_ahead(cfg, RunDir(tmp_path / "run"), (known,), for_slurm=True)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("file", PROMISED)
def test_a_shipped_configuration_fits_the_gpus_that_the_table_promises(file: str, tmp_path: Path) -> None:
    nodes, gpus, gb = PROMISED[file]
    cfg = load_config(CONFIGS / file)
    assert (cfg.cluster.nodes, cfg.cluster.gpus_per_node) == (nodes, gpus)
    assert f"{gb} GB" in (CONFIGS / file).read_text(encoding="utf-8"), "the file says another size"
    found = outlook(cfg, LEAST[gb], tmp_path)
    assert found.warnings == ()
    assert found.memory is not None and 0.9 * gb < found.memory.gpu_gib < gb
    for name, role in found.memory.roles.items():
        assert "unknown" not in role.remark and role.total_gib < found.memory.gpu_gib, name


@pytest.mark.usefixtures("hub")
def test_on_less_than_the_table_promises_there_is_a_warning_or_a_refusal(tmp_path: Path) -> None:
    assert "may run out of memory" in str(outlook(load_config(CONFIGS / "grpo/qwen3_8b.yaml"), LEAST[40], tmp_path))
    few = load_config(CONFIGS / "grpo/qwen3_32b.yaml", ["cluster.trainer_nodes=1", "cluster.rollout_nodes=15"])
    assert "may run out of memory" in str(outlook(few, LEAST[80], tmp_path).warnings)
    with pytest.raises(UserError, match="weights and optimizer take"):
        outlook(few, LEAST[40], tmp_path)

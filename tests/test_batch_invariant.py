"""``model.batch_invariant``: vLLM's operations as the trainer has them, and who may have it.

Kernels of GPUs are compared there (`make gpu-check`, mismatch); here the operations that any device has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT

from forge_hpc.cluster.meshes import Cluster
from forge_hpc.config import Config, UserError, load_config
from forge_hpc.config.models import check_invariant
from forge_hpc.config.served import served_config
from forge_hpc.config.split import plan
from forge_hpc.config.validate import validate
from forge_hpc.generation.options import engine_arguments
from forge_hpc.invariance import prepare_invariance
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing.microbatch import compiles
from forge_hpc.supervisor.fit import Fit, look_at_fit

ROTATIONS = """
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import Llama3RotaryEmbedding, RotaryEmbedding

from forge_hpc.generation.invariant import replace_operations
import forge_hpc.models
from torchtitan.models.common import CosSinRoPE
from forge_hpc.models.spec import LlamaRoPE

replace_operations()
replace_operations()  # once more changes nothing
torch.manual_seed(0)
positions = torch.randint(0, 4096, (97,))
q, k = torch.randn(97, 4, 64).bfloat16(), torch.randn(97, 2, 64).bfloat16()
llama = dict(scaling="llama", scaling_factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=1024)
with set_current_vllm_config(VllmConfig()):
    theirs = {
        "none": RotaryEmbedding(64, 64, 4096, 1e6, True, torch.bfloat16),
        "llama": Llama3RotaryEmbedding(64, 64, 4096, 5e5, True, torch.bfloat16, 8.0, 1.0, 4.0, 1024),
    }
for (kind, rotation), theta, scaling in zip(theirs.items(), (1e6, 5e5), ({}, llama)):
    rope = LlamaRoPE if scaling else CosSinRoPE
    ours = rope(rope.Config(dim=64, max_seq_len=4096, theta=theta, **scaling))
    expected = ours(q[None], k[None], positions[None])
    found = rotation(positions, q.flatten(1), k.flatten(1))
    print(kind, *(int((a.view(-1) != b.view(-1)).sum()) for a, b in zip(found, expected)))
"""


PRODUCTS = ("queries, keys, values", "output projection", "gate and up", "down")
HAS_AMX = "amx_bf16" in Path("/proc/cpuinfo").read_text()
"""With it vLLM multiplies by kernels of its own, and a sum's order depends on the number of rows."""


def run(*arguments: str) -> str:
    """What a process of its own prints: vLLM's registries are changed for good."""
    done = subprocess.run([sys.executable, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("family", "num_operations"), [("qwen3", 9), ("qwen2", 8)])  # norms of queries; biases
def test_operations_of_both_sides_come_to_the_same_bits(family: str, num_operations: int) -> None:
    out = run("benchmarks/operations.py", "--invariant", "--prompts", "5", "--layers", "2", "--family", family)
    rows = [json.loads(line.removeprefix("row: ")) for line in out.splitlines() if line.startswith("row: ")]
    differ = {row["what"].partition(":")[0]: (row["ours"], float(row["note"].split()[-1])) for row in rows}
    assert min(differ.pop("attention")) > 0  # which on the CPU is another kernel
    products = {name: differ.pop(name) for name in PRODUCTS}
    assert len(differ) + len(products) == num_operations
    assert not any(map(any, differ.values())), differ
    assert max(map(max, products.values())) <= (0.001 if HAS_AMX else 0), products


def test_rotations_are_the_trainers_own_also_with_scaled_frequencies() -> None:
    assert run("-c", ROTATIONS).splitlines() == ["none 0 0", "llama 0 0"]


def config(*overrides: str) -> Config:
    return load_config(PROJECT / "configs/grpo/qwen3_0_6b.yaml", ["model.batch_invariant=true", *overrides])


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["cluster.gpus_per_node=0"], "it is for GPUs"),
        (["model.dtype=float32"], "it is for bfloat16, which model.dtype is not"),
        (["trainer.training.mixed_precision_param=float32"], "mixed_precision_param is not"),
        (["trainer.compile.enable=true"], "compiled trainers round elsewhere"),
        (["trainer.lora.enable=true"], "trainer.lora"),
        (["generator.engine.tensor_parallel_size=2"], "generator.engine.tensor_parallel_size adds up parts"),
        (["trainer.parallelism.tensor_parallel_degree=2"], "trainer.parallelism.tensor_parallel_degree adds up"),
        (["trainer.parallelism.context_parallel_degree=2"], "trainer.parallelism.context_parallel_degree adds up"),
        (["recipe=sft"], "recipe=sft compares no log-probabilities of what generators sampled"),
        (["rollout.sampling.top_p=0.9"], "rollout.sampling.top_p cuts the distribution"),
        (["rollout.sampling.top_k=50", "rollout.sampling.min_p=0.1"], "rollout.sampling.top_k, min_p cuts"),
        (["generator.engine.extra={quantization: fp8}"], "generator.engine.extra.quantization would have vLLM"),
        (["generator.engine.extra={compilation_config: {mode: 3}}"], "generator.engine.extra.compilation_config"),
    ],
)
def test_what_cannot_be_alike_is_refused(overrides: Sequence[str], why: str) -> None:
    with pytest.raises(UserError, match=r"model\.batch_invariant") as refused:
        validate(config(*overrides), check_paths=False)
    assert why in str(refused.value)


def test_what_can_be_is_taken_and_trainers_do_not_compile_then() -> None:
    taken = config()
    validate(taken, check_paths=False)
    assert not compiles(taken, "cuda") and compiles(config("model.batch_invariant=false"), "cuda")
    options = engine_arguments("model", taken, "cuda")["compilation_config"]
    assert (options["mode"], options["cudagraph_mode"]) == (0, "FULL")
    beside = config("generator.engine.extra={compilation_config: {cudagraph_capture_sizes: [1, 2]}}")
    validate(beside, check_paths=False)
    options = engine_arguments("model", beside, "cuda")["compilation_config"]
    assert (options["mode"], options["cudagraph_mode"], options["cudagraph_capture_sizes"]) == (0, "FULL", [1, 2])


@pytest.mark.parametrize(
    ("model", "why"),
    [({"num_experts": 8}, "has experts"), ({"head_dim": 96}, r"heads of 96 values; it is for \(64, 128\)")],
)
def test_models_whose_kernels_are_others_are_refused(model: dict[str, int], why: str) -> None:
    known = {"hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128}
    check_invariant(known, "it")
    check_invariant({"hidden_size": 1024, "num_attention_heads": 16}, "it")
    with pytest.raises(UserError, match=why):
        check_invariant(known | model, "it")


def test_processes_that_were_set_to_compute_otherwise_are_not_kept() -> None:
    cfg = config("cluster.gpus_per_node=2")
    nodes: dict[str, Any] = dict(hosts=None, cpus=8, gpu_names=[["0", "1"]], log_dir=Path(), faults=None)
    alike, others = (Cluster(placement=plan(cfg, 2), **nodes, batch_invariant=value) for value in (True, False))
    for role in ("trainer", "generator0"):
        assert alike.layout(role) != others.layout(role)
        assert alike.layout(role) == replace(alike).layout(role)
    assert alike.layout("volume") == others.layout("volume")


def test_nodes_with_other_gpus_are_left_out_and_where_all_have_such_nothing_starts(tmp_path: Path) -> None:
    def fit(*capabilities: tuple[int, int] | None) -> Fit:
        reports = {}
        for node, capability in enumerate(capabilities):
            kind = {"name": "NVIDIA A100-SXM4-80GB", "memory_bytes": 80 << 30}
            kinds = [kind | ({} if capability is None else {"capability": [*capability]})] * 8
            report = {"gpus": 8, "gpu_names": [*"01234567"], "cpu_build": None, "gpu_kinds": kinds}
            limit = {"num_bytes": 1 << 40, "is_cgroups": False}
            reports[node] = report | {"memory_bytes": 1 << 40, "memory_limit": limit}
        cfg = config(f"cluster.nodes={len(capabilities)}")
        return look_at_fit(cfg, RunDir(tmp_path), reports, 0, lambda node: f"node {node} (n{node})")

    assert fit((9, 0), (9, 0)) == fit((9, 0), None) == Fit()  # a driver may not tell
    has = "has a NVIDIA A100-SXM4-80GB, of compute capability 8.0"
    assert fit((9, 0), (8, 0)) == Fit(None, {1: f"it {has}, which model.batch_invariant is not for"})
    refused = fit((8, 0), (8, 0)).refused
    assert refused is not None
    assert (
        refused.message == f"model.batch_invariant is for GPUs of compute capability 9 (H100, H200): node 0 (n0) {has}"
    )


def test_served_models_are_computed_as_they_always_are() -> None:
    cfg = config("served=[{name: judge, path: other, replicas: 1}]")
    assert not served_config(cfg, cfg.served[0]).model.batch_invariant


def test_a_process_without_such_a_gpu_says_what_it_has() -> None:
    with pytest.raises(UserError, match=r"compute capability 9 \(H100, H200\): a trainer on .* computes on the CPU"):
        prepare_invariance("a trainer")

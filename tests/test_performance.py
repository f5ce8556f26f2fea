"""Figures of speed: what they count, and that those of the GPU are right where there is none to ask."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_generation import prompts, tiny_config
from tiny_models import write_model

from forge_hpc.config.schema import SamplingConfig
from forge_hpc.config.split import Placement
from forge_hpc.data.builtin import write_tiny_qwen3
from forge_hpc.generation import GenerationEngine
from forge_hpc.observability.gpu import GpuMonitor
from forge_hpc.observability.performance import EngineCounts, engine_figures, over_ranks
from forge_hpc.sizing.gpus import peak_flops
from forge_hpc.training.flops import step_flops

HF = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=67,
)  # fmt: skip


def test_the_flops_of_a_step_are_those_that_torch_counts_in_the_model(tmp_path: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model, length = write_model(tmp_path, "qwen3"), 24
    model.config._attn_implementation = "eager"  # whose products are counted
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.zeros(1, length, dtype=torch.long)).logits
        logits.sum().backward()
    # torch counts attention whole, also what the mask hides: 4 * layers * queries * length**2 forward
    hidden = 3 * 4 * 2 * 64 * (length**2 - length * (length + 1) / 2)
    ours = step_flops(HF, [length], num_trained=length) + hidden
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_grow_with_the_square_of_a_document_and_not_of_a_row_and_a_frozen_model_has_fewer() -> None:
    one, two = step_flops(HF, [200], 100), step_flops(HF, [100, 100], 100)
    assert one - two == 3 * 4 * 2 * 64 * (200 * 201 / 2 - 2 * 100 * 101 / 2)
    assert step_flops(HF, [200], 0) == one - 3 * 2 * 64 * 67 * 100
    assert 0.6 < step_flops(HF, [20], 10, lora=True) / step_flops(HF, [20], 10) < 0.75
    moe = HF | dict(num_experts=8, num_experts_per_tok=1, moe_intermediate_size=96)
    assert step_flops(moe, [10], 0) - step_flops(HF, [10], 0) == 3 * 2 * 2 * 64 * 8 * 10  # its router


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_gpu_follows_from_its_name(name: str, flops: float | None) -> None:
    assert peak_flops(name) == flops


def test_utilisation_is_the_mean_of_the_samples_since_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    samples = {"a": [(1, 100), (2, 50), (3, 0)], "1": [(1, 30)]}

    def get_samples(handle: str, kind: int, since: int) -> tuple[int, list[Any]]:
        new = [(stamp, value) for stamp, value in samples[handle] if stamp > since]
        if not new:
            raise NVMLError("not found")
        return 1, [SimpleNamespace(timeStamp=s, sampleValue=SimpleNamespace(uiVal=v)) for s, v in new]

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        NVMLError=NVMLError,
        NVML_GPU_UTILIZATION_SAMPLES=1,
        nvmlDeviceGetHandleByIndex=str,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid.removeprefix("GPU-"),
        nvmlDeviceGetSamples=get_samples,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=70),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used={"a": 3 * 2**30, "1": 5 * 2**30}[handle]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monitor = GpuMonitor(["GPU-a", "1"])
    assert monitor.utilization() == pytest.approx((0.5 + 0.3) / 2)
    samples["a"].append((4, 90))
    assert monitor.utilization() == pytest.approx((0.9 + 0.7) / 2)  # GPU 1 has no new sample: what it is now
    assert monitor.memory_gib() == 5.0  # of the fuller one


def test_without_nvml_there_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GpuMonitor([]).utilization() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMonitor(["0"]).utilization() is GpuMonitor(["0"]).memory_gib() is None


def test_replicas_are_summed_and_their_speed_is_that_of_a_gpu() -> None:
    one = EngineCounts(10, 2.0, running=80, waiting=20, kv_cache_usage=0.5, num_generated_tokens=100,
                       num_prompt_tokens=40, num_cached_tokens=10)  # fmt: skip
    two = EngineCounts(5, 2.0, running=10, kv_cache_usage=0.9, num_preemptions=3, num_generated_tokens=300,
                       weights_s=0.3, gpu_memory_gib=70.0)  # fmt: skip
    idle = EngineCounts(weights_s=0.6, gpu_memory_gib=71.5)  # it has taken weights too
    assert engine_figures([one, two, idle], gpus_per_replica=2) == {
        "perf/generator_weights_s": pytest.approx(0.3),
        "perf/generator_gpu_memory_gib": 71.5,
        "perf/generator_tokens_per_s": 50.0,
        "perf/generator_running": 10.0,
        "perf/generator_waiting": 2.0,
        "perf/generator_kv_cache_usage": 0.9,
        "perf/generator_preemptions": 3.0,
        "perf/generator_prefix_cache_hits": 0.25,
    }
    assert engine_figures([EngineCounts()]) == {}


def test_of_ranks_the_fullest_memory_counts_and_the_mean_speed() -> None:
    ranks = [
        {"loss": 1.0, "perf/trainer_memory_peak_gib": 3.0, "perf/mfu": 0.2},
        {"loss": 1.0, "perf/trainer_memory_peak_gib": 5.0, "perf/mfu": 0.4},
    ]
    assert over_ranks(ranks) == {"loss": 1.0, "perf/trainer_memory_peak_gib": 5.0, "perf/mfu": pytest.approx(0.3)}


def test_devices_are_counted_once_where_roles_share_them() -> None:
    def devices(trainers: Any, replicas: Any, nodes: tuple[range, range], gpus: int) -> int:
        return Placement(nodes[0], nodes[1], range(0), gpus, trainers, replicas).num_devices

    assert devices(((0,), (1,)), ((2, 3),), (range(1), range(1)), 4) == 4
    assert devices(((0,), (1,)), ((0,), (1,)), (range(1), range(1)), 2) == 2
    assert devices(((0,), (1,)), ((0,), (1,)), (range(2), range(2, 5)), 2) == 10
    assert devices(((), ()), ((),), (range(1), range(1)), 0) == 3


def test_an_engine_counts_requests_tokens_and_preemptions(tmp_path: Path) -> None:
    config = tiny_config()
    config.generator.engine.extra = {"num_gpu_blocks_override": 4}  # of 128 tokens: three at work
    model_dir = write_tiny_qwen3(tmp_path, seed=0, dim=64, hidden_dim=128)
    engine = GenerationEngine(model_dir, config, device="cpu")
    try:
        [first, second] = prompts(2, length=110)  # a block each, and soon two
        greedy = SamplingConfig(temperature=0.0, stop_token_ids=[])
        batch = asyncio.run(engine.generate_batch([first, second], 1, seed=0, sampling=greedy))
        counts = engine.take_counts()
        assert counts.num_generated_tokens == sum(len(done.token_ids) for [done] in batch)  # type: ignore[union-attr]
        assert counts.num_prompt_tokens == 220
        assert 0 < counts.running <= 2 * counts.num_steps
        assert 0.6 < counts.kv_cache_usage <= 1
        assert counts.num_preemptions >= 1
        assert counts.waiting > 0  # the one that was thrown out
        assert counts.num_cached_tokens == 0
        assert counts.busy_s > 0
        assert engine.take_counts() == EngineCounts()
    finally:
        engine.close()

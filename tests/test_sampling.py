"""Sampling options: vLLM draws from what the trainer computes, and what either does not take is refused early."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from one_group import documents_of

from forge_hpc.config import Config, UserError, load_config, validate
from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.builtin import char_tokenizer, write_tiny_qwen3
from forge_hpc.data.types import Completion, Episode, Group, Prompt
from forge_hpc.generation import GenerationEngine
from forge_hpc.rollouts.figures import measure
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine

TOKENIZER = char_tokenizer()


def configuration(**sampling: Any) -> Config:
    config = Config()
    config.model.dtype = "float32"
    config.rollout.sampling = SamplingConfig(**sampling)
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 16, 24
    config.generator.engine.kv_cache_memory_gib = 0.1
    config.trainer.training.seq_len = 256
    return config


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=0, dim=64, hidden_dim=128)


@pytest.fixture(scope="module")
def generator(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GenerationEngine]:
    """In the process group of the trainers, which ends with it."""
    init_distributed(tmp_path_factory.mktemp("store") / "store", rank=0, world_size=1, local_rank=0, timeout_s=60)
    engine = GenerationEngine(model_dir, configuration(), device="cpu")
    yield engine
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def prompts(num: int) -> list[Prompt]:
    return [Prompt(i, f"{i}+1=", TOKENIZER(f"{i}+1=")["input_ids"], "") for i in range(num)]


def sample(generator: GenerationEngine, sampling: SamplingConfig, num_prompts: int = 6) -> list[list[Completion]]:
    results = asyncio.run(generator.generate_batch(prompts(num_prompts), 6, seed=3, sampling=sampling))
    assert not any(isinstance(result, ValueError) for result in results), results
    return results  # type: ignore[return-value]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(temperature=0.7),
        SamplingConfig(top_p=0.8),
        SamplingConfig(top_k=7),
        SamplingConfig(min_p=0.2),
        SamplingConfig(temperature=1.4, top_p=0.7, top_k=30, min_p=0.02),
        SamplingConfig(stop=["1", "ab"], stop_token_ids=TOKENIZER("7")["input_ids"]),
    ],
)
def test_the_trainer_computes_the_distribution_that_vllm_samples_from(
    generator: GenerationEngine, model_dir: Path, sampling: SamplingConfig
) -> None:
    config = configuration()
    config.rollout.sampling = sampling
    groups = [
        Group(prompt, [Episode(prompt, completion, float(completion.sample_index)) for completion in completions])
        for prompt, completions in zip(prompts(6), sample(generator, sampling), strict=True)
    ]
    metrics = TrainEngine(config, model_dir).train_step(documents_of(groups, config))
    assert metrics["mismatch/logprob_abs_mean"] < 1e-5
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-5)
    plain = TrainEngine(configuration(), model_dir).train_step(documents_of(groups, config))
    if sampling.temperature != 1 or sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0:
        assert plain["mismatch/logprob_abs_mean"] > 0.05  # it would have been another distribution


def test_a_response_ends_with_its_stop_string_in_the_text_or_its_stop_token_and_both_are_trained(
    generator: GenerationEngine,
) -> None:
    [seven] = TOKENIZER("7")["input_ids"]
    free = [c for group in sample(generator, SamplingConfig()) for c in group]
    stopped = [
        c for group in sample(generator, SamplingConfig(stop=["1", "b:"], stop_token_ids=[seven])) for c in group
    ]
    num_stopped = 0
    for whole, completion in zip(free, stopped, strict=True):
        # Some of the model's tokens have no text.
        texts = [TOKENIZER.decode(whole.token_ids[:length]) for length in range(len(whole.token_ids) + 1)]
        ends = [length for length, text in enumerate(texts) if any(stop in text for stop in ("1", "b:", "7"))]
        length = min(ends, default=len(whole.token_ids))
        assert completion.token_ids == whole.token_ids[:length]
        assert completion.logprobs == pytest.approx(whole.logprobs[:length], abs=1e-4)
        if ends:
            num_stopped += 1
            assert completion.finish_reason == "stop"
            if (
                completion.token_ids[-1] == seven
            ):  # as the token that ends a turn it is trained, and no part of the text
                assert completion.text == TOKENIZER.decode(completion.token_ids[:-1])
            else:
                assert completion.text.endswith(("1", "b:"))
    assert num_stopped > 3


def test_a_repetition_penalty_changes_what_is_sampled(generator: GenerationEngine) -> None:
    greedy = SamplingConfig(temperature=0.0)
    first, second = (sample(generator, replace(greedy, repetition_penalty=x), 2)[0][0] for x in (1.0, 5.0))
    assert len(set(second.token_ids)) > len(set(first.token_ids))


def test_a_request_that_vllm_refuses_costs_its_prompt_and_not_the_engine(
    generator: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its VLLMValidationError is no ValueError. It comes when parameters are made, or when a request is added."""

    async def run(sampling: SamplingConfig) -> list[Any]:
        good = asyncio.create_task(generator.generate(prompts(1)[0], 2, seed=0))
        refused = await generator.generate_batch(prompts(2), 2, seed=0, sampling=sampling)
        return [*refused, await good]

    for sampling, reason in (
        (SamplingConfig(temperature=3.0), r"prompt \d: vLLM refuses the request: temperature must be in"),
        (SamplingConfig(stop_token_ids=[10**6]), r"prompt \d: vLLM refuses the request: .*10+"),
    ):
        first, second, good = asyncio.run(run(sampling))
        for error in (first, second):
            with pytest.raises(ValueError, match=reason):
                raise error
        assert len(good) == 2
    with pytest.raises(RuntimeError, match=r"all completions of step 1 failed, at last with: .*too long"):
        measure([Group(prompts(1)[0], [], 2, [("refused", "too long")] * 2)], 1)


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        validate(load_config(None, overrides), check_paths=False)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("key", ["rollout.sampling.temperature", "evaluation.temperature"])
@pytest.mark.parametrize("value", ["0.009", "2.01", "-1"])
def test_temperatures_that_vllm_changes_or_refuses_are_refused_before_the_queue(key: str, value: str) -> None:
    options = ["evaluation.num_prompts=5", "evaluation.samples=2"]
    assert f"{key} must be from 0.01 to 2, or 0 (greedy)" in refused(*options, f"{key}={value}")


def test_sampling_options_that_cannot_work_are_refused_before_the_queue(tmp_path: Path) -> None:
    key = "rollout.sampling"
    assert "min_p must be from 0 to 1" in refused(f"{key}.min_p=1.5")
    assert "stop has an empty string" in refused(f'{key}.stop=["a",""]')
    assert "stop_token_ids must be token ids" in refused(f"{key}.stop_token_ids=[-1]")
    assert "repetition_penalty must be greater than 0" in refused(f"{key}.repetition_penalty=0", "recipe=eval")
    assert "every ratio would be wrong" in refused(f"{key}.repetition_penalty=1.2")
    fine = [f"{key}.temperature=0.01", f"{key}.min_p=0.05", f"{key}.stop=[a]", f"{key}.top_k=5", f"{key}.top_p=0.9"]
    validate(load_config(None, fine), check_paths=False)
    evaluation = ["recipe=eval", f"{key}.repetition_penalty=1.2", f"{key}.temperature=0", "evaluation.num_prompts=5"]
    validate(load_config(None, evaluation), check_paths=False)


def test_a_stop_token_that_the_model_does_not_have_is_refused_before_the_queue(model_dir: Path) -> None:
    size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    options = [f"model.path={model_dir}", "trainer.training.seq_len=512", "rollout.max_prompt_tokens=100"]
    options += ["rollout.max_response_tokens=100"]
    validate(load_config(None, [*options, f"rollout.sampling.stop_token_ids=[{size - 1}]"]))
    with pytest.raises(UserError, match=f"stop_token_ids has {size}, and the model in .* has {size} tokens"):
        validate(load_config(None, [*options, f"rollout.sampling.stop_token_ids=[{size}]"]))

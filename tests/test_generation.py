"""The generation engine: real vLLM on a tiny Qwen3, compared with transformers."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import PROJECT

from forge_hpc.actors.generator import Generator
from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, SamplingConfig
from forge_hpc.data.builtin import write_tiny_qwen3
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.generation import GenerationEngine, GenerationError, sample_seed
from forge_hpc.generation.checkpoint import checkpoint_shapes, complete_weights
from forge_hpc.generation.engine import cache_bytes
from forge_hpc.generation.options import engine_arguments

GREEDY = SamplingConfig(temperature=0.0)


def tiny_config() -> Config:
    config = Config()
    config.model.dtype = "float32"
    config.rollout.max_prompt_tokens = 150
    config.rollout.max_response_tokens = 40
    config.generator.timeout_s = 120.0
    config.generator.engine.kv_cache_memory_gib = 0.1
    config.generator.engine.max_num_seqs = 16
    return config


def reference_model(model_dir: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def reference_logprobs(
    model: torch.nn.Module, prompt: Prompt, completion: Completion, temperature: float = 1.0
) -> torch.Tensor:
    """[R] log-probabilities of the sampled tokens by transformers."""
    ids = torch.tensor([prompt.token_ids + completion.token_ids])
    logprobs = (model(ids).logits[0, len(prompt.token_ids) - 1 : -1] / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def assert_agrees(model: torch.nn.Module, prompt: Prompt, completion: Completion, temperature: float = 1.0) -> None:
    expected = reference_logprobs(model, prompt, completion, temperature)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def assert_changed_weights_between(
    old: torch.nn.Module, new: torch.nn.Module, prompt: Prompt, completion: Completion
) -> None:
    """Each log-probability is that of the weights which sampled the token, on the KV cache that was there."""
    given = torch.tensor(completion.logprobs)
    is_old = (reference_logprobs(old, prompt, completion) - given).abs() < 1e-4
    num_old = is_old.tolist().index(False)
    assert num_old > 0
    tokens = torch.tensor([prompt.token_ids + completion.token_ids])
    num_cached = len(prompt.token_ids) + num_old - 1
    cache = old(tokens[:, :num_cached], use_cache=True).past_key_values
    logits = new(tokens[:, num_cached:], past_key_values=cache, use_cache=True).logits[0, :-1].float()
    expected = logits.log_softmax(-1).gather(-1, tokens[0, num_cached + 1 :, None])[:, 0]
    torch.testing.assert_close(given[num_old:], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def perturbed(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Change the model's weights in place; returns them by name, a tied head left out."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def prompts(num: int, length: int = 6) -> list[Prompt]:
    return [Prompt(i, "", [10 + (i * 7 + j) % 80 for j in range(length)], "") for i in range(num)]


async def until(condition, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings: the harder case for an update of the weights."""
    return write_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=0, dim=64, hidden_dim=128, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[GenerationEngine]:
    engine = GenerationEngine(model_dir, tiny_config(), device="cpu")
    yield engine
    engine.close()


def restore(engine: GenerationEngine, model_dir: Path, version: int = 0) -> None:
    asyncio.run(engine.load_weights(version, dict(reference_model(model_dir).named_parameters()).items()))


def test_seeds_of_neighbouring_samples_are_unrelated_and_fit_vllm() -> None:
    seeds = {sample_seed(run, position, j) for run in range(4) for position in range(16) for j in range(16)}
    assert len(seeds) == 4 * 16 * 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 23, 4) == sample_seed(1, 23, 4) != sample_seed(12, 3, 4)


def test_weights_that_do_not_match_the_checkpoint_are_named(model_dir: Path) -> None:
    expected = checkpoint_shapes(model_dir)
    weights = {name: torch.zeros(shape) for name, shape in expected.items()}
    assert len(complete_weights(weights.items(), expected, tied_head=True)) == len(expected) + 1
    lost = weights.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"1 missing \(model.norm.weight\)"):
        complete_weights(weights.items(), expected, tied_head=True)
    with pytest.raises(ValueError, match=r"1 unknown \(model.extra\), 1 of another shape \(model.norm.weight\)"):
        bad = weights | {"model.norm.weight": lost[1:], "model.extra": lost}
        complete_weights(bad.items(), expected, tied_head=True)


def test_a_group_has_log_probabilities_that_agree_with_transformers(engine: GenerationEngine, model_dir: Path) -> None:
    [prompt] = prompts(1)
    hot = SamplingConfig(temperature=0.7)
    group = asyncio.run(engine.generate(prompt, 6, seed=1, max_tokens=12))
    hot_group = asyncio.run(engine.generate(prompt, 2, seed=1, sampling=hot, max_tokens=12))
    model = reference_model(model_dir)
    for completion in group:
        assert_agrees(model, prompt, completion)
    for completion in hot_group:
        assert_agrees(model, prompt, completion, temperature=0.7)
    assert [completion.sample_index for completion in group] == list(range(6))
    assert len({tuple(completion.token_ids) for completion in group}) == 6
    assert all(completion.policy_versions == (engine.policy_version,) * 2 for completion in group)
    assert all(completion.finish_reason in ("stop", "length") for completion in group)


def test_a_prompt_longer_than_a_cache_block_is_shared_by_its_group(engine: GenerationEngine, model_dir: Path) -> None:
    [prompt] = prompts(1, length=140)  # a block on the CPU has 128 tokens
    model = reference_model(model_dir)
    for completion in asyncio.run(engine.generate(prompt, 3, seed=1, max_tokens=4)):
        assert_agrees(model, prompt, completion)


def test_greedy_samples_take_the_most_likely_tokens(engine: GenerationEngine, model_dir: Path) -> None:
    [prompt] = prompts(1)
    first, second = asyncio.run(engine.generate(prompt, 2, seed=1, sampling=GREEDY, max_tokens=8))
    assert first.token_ids == second.token_ids
    ids = list(prompt.token_ids)
    model = reference_model(model_dir)
    for token in first.token_ids:
        assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
        ids.append(token)
    assert_agrees(model, prompt, first)


def test_the_end_of_sequence_is_kept_in_the_tokens_and_not_in_the_text(
    engine: GenerationEngine, model_dir: Path
) -> None:
    model = reference_model(model_dir)
    eos = model.config.eos_token_id
    weights = perturbed(model, 0)
    weights["model.embed_tokens.weight"][eos] = 0  # then its logit is 0, and all others are made negative
    others = [i for i in range(len(weights["model.embed_tokens.weight"])) if i != eos]
    [prompt] = prompts(1)
    with torch.no_grad():
        model.model.embed_tokens.weight[eos] = 0
        hidden = model.model(torch.tensor([prompt.token_ids])).last_hidden_state[0, -1]
        outside = [i for i in others if i not in prompt.token_ids]
        weights["model.embed_tokens.weight"][outside] = -hidden
        logits = weights["model.embed_tokens.weight"] @ hidden
        weights["model.embed_tokens.weight"][eos] = hidden * (logits.max().abs() + 50) / hidden.norm() ** 2

    async def run() -> list[Completion]:
        await engine.load_weights(1, weights.items())
        return await engine.generate(prompt, 1, seed=0, sampling=GREEDY)

    [completion] = asyncio.run(run())
    restore(engine, model_dir)
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([eos], "", "stop")
    assert len(completion.logprobs) == 1


def test_new_weights_change_the_log_probabilities_of_a_tied_model(engine: GenerationEngine, model_dir: Path) -> None:
    model = reference_model(model_dir)
    [prompt] = prompts(1)

    async def run() -> None:
        for version in (1, 2):
            before = await engine.generate(prompt, 2, seed=3, max_tokens=8)
            await engine.load_weights(version, perturbed(model, version).items())
            after = await engine.generate(prompt, 2, seed=3, max_tokens=8)
            for completion in after:
                assert_agrees(model, prompt, completion)
                assert completion.policy_versions == (version, version)
            stale = torch.tensor(before[0].logprobs) - reference_logprobs(model, prompt, before[0])
            assert stale.abs().max() > 0.01

    asyncio.run(run())
    restore(engine, model_dir)


def test_incomplete_weights_are_refused_and_nothing_changes(engine: GenerationEngine, model_dir: Path) -> None:
    model = reference_model(model_dir)
    weights = dict(model.named_parameters())
    del weights["model.norm.weight"]
    version = engine.policy_version
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        asyncio.run(engine.load_weights(7, weights.items()))
    assert engine.policy_version == version
    [prompt] = prompts(1)
    [completion] = asyncio.run(engine.generate(prompt, 1, seed=0, max_tokens=4))
    assert_agrees(model, prompt, completion)


def test_requests_join_while_others_decode_and_weights_change_between_their_tokens(
    engine: GenerationEngine, model_dir: Path
) -> None:
    model = reference_model(model_dir)
    model.generation_config = None
    weights = perturbed(model, 5)
    slow, fast = prompts(2)

    async def run() -> tuple[list[Completion], list[Completion]]:
        await engine.load_weights(10, dict(reference_model(model_dir).named_parameters()).items())
        steps = engine.stats().num_steps
        long = asyncio.create_task(engine.generate(slow, 8, seed=1, max_tokens=40))
        await until(lambda: engine.stats().num_steps > steps)
        short = await engine.generate(fast, 2, seed=1, max_tokens=2)
        assert not long.done()
        await engine.load_weights(11, weights.items())
        assert not long.done()
        late = await engine.generate(slow, 2, seed=2, max_tokens=4)
        for completion in late:  # no prefix that the old weights computed
            assert completion.policy_versions == (11, 11)
            assert_agrees(model, slow, completion)
        return await long, short

    long, short = asyncio.run(run())
    restore(engine, model_dir)
    assert all(completion.policy_versions == (10, 10) for completion in short)
    whole = [completion for completion in long if completion.finish_reason == "length"]
    assert whole and all(completion.policy_versions == (10, 11) for completion in whole)
    for completion in whole:
        assert_changed_weights_between(reference_model(model_dir), model, slow, completion)


def test_requests_wait_while_the_engine_sleeps_and_it_does_not_wake_without_weights(
    engine: GenerationEngine, model_dir: Path
) -> None:
    async def scenario() -> None:
        before = await engine.generate_batch(prompts(3), 2, seed=1)
        await engine.sleep()
        waiting = asyncio.create_task(engine.generate_batch(prompts(3), 2, seed=1))
        with pytest.raises(ValueError, match="load"):
            await engine.wake()
        await engine.load_weights(0, dict(reference_model(model_dir).named_parameters()).items())
        assert not waiting.done() and engine.stats().num_running == 0
        await engine.wake()
        assert await waiting == before
        left = asyncio.create_task(engine.generate_batch(prompts(16), 1, seed=1))
        await until(lambda: engine.stats().num_running)
        await engine.sleep()  # who is still waited for is told
        with pytest.raises(GenerationError, match="put to sleep"):
            await left
        await engine.load_weights(0, dict(reference_model(model_dir).named_parameters()).items())
        await engine.wake()
        assert await engine.generate_batch(prompts(3), 2, seed=1) == before

    asyncio.run(scenario())


def test_bad_prompts_fail_alone(engine: GenerationEngine) -> None:
    good, _ = prompts(2)
    empty, long = Prompt(1, "", [], ""), Prompt(2, "", [5] * 190, "")
    foreign = Prompt(3, "", [5, 100_000], "")
    batch = [good, empty, long, foreign]
    results = asyncio.run(engine.generate_batch(batch, 2, seed=0, max_tokens=3))
    assert len(results[0]) == 2
    assert [str(result).split(" ")[:2] for result in results[1:]] == [["prompt", "1"], ["prompt", "2"], ["prompt", "3"]]
    assert all(isinstance(result, ValueError) for result in results[1:])
    with pytest.raises(ValueError, match="empty"):
        asyncio.run(engine.generate(empty, 1, seed=0))


def test_completions_are_handed_over_while_the_rest_of_the_batch_is_generated(
    engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [*prompts(6), Prompt(6, "", [], ""), *prompts(13)[7:]]  # 48 requests, of which 16 run at once

    def sample(**options: Any) -> list[Any]:
        return asyncio.run(engine.generate_batch(batch, 4, seed=3, max_tokens=30, **options))

    expected = sample()
    handed: list[tuple[tuple[int, int], Completion]] = []
    one_is_handed_over, was_in_time = threading.Event(), []
    step, num_before = engine._engine.step, engine.stats().num_finished

    def watched_step() -> list[Any]:
        if engine.stats().num_finished > num_before:  # the first is complete, and others are not
            was_in_time.append(one_is_handed_over.wait(60))
        return step()

    def hand_over(pair: tuple[tuple[int, int], Completion]) -> None:
        handed.append(pair)
        one_is_handed_over.set()

    monkeypatch.setattr(engine._engine, "step", watched_step)
    results = sample(hand_over=hand_over)
    assert was_in_time and all(was_in_time)
    assert isinstance(results[6], ValueError)
    good = [index for index in range(13) if index != 6]
    assert len(handed) == 48
    assert dict(handed) == {(index, number): results[index][number] for index in good for number in range(4)}
    assert [results[index] for index in good] == [expected[index] for index in good]


def test_a_generator_sends_each_completion_and_the_error_of_a_prompt_to_a_port(
    engine: GenerationEngine,
) -> None:
    class Port:
        def __init__(self) -> None:
            self.sent: list[tuple[tuple[int, int], Any]] = []
            self.send = self.sent.extend

    generator, port = object.__new__(Generator), Port()
    generator._engine, batch = engine, [*prompts(1), Prompt(1, "", [], "")]
    num = asyncio.run(generator._sample(batch, 2, GREEDY, 0, port, 0))  # type: ignore[arg-type]
    assert num == len(port.sent) == len(dict(port.sent)) == 4
    assert {place: type(result) for place, result in port.sent} == {
        (index, sample): [Completion, ValueError][index] for index in range(2) for sample in range(2)
    }


def test_cuda_has_flash_attention_where_it_takes_the_dtype() -> None:
    config = tiny_config()
    config.model.dtype = "bfloat16"
    assert engine_arguments("model", config, "cuda")["attention_backend"] == "FLASH_ATTN"
    assert engine_arguments("model", config, "cuda")["hf_overrides"] == {"head_dtype": "float32"}
    config.model.dtype = "float32"
    assert "attention_backend" not in engine_arguments("model", config, "cuda")


@pytest.mark.parametrize("given", [{}, {"cudagraph_mode": "FULL"}, {"inductor_compile_config": {"max_autotune": True}}])
def test_kernels_are_not_timed_before_they_are_fused_whatever_else_is_asked_for(given: dict[str, Any]) -> None:
    config = tiny_config()
    config.generator.engine.extra = {"compilation_config": given} if given else {}
    options = engine_arguments("model", config, "cuda")["compilation_config"]
    assert options["inductor_compile_config"]["benchmark_combo_kernel"] is False
    assert {**options, **given} | {"inductor_compile_config": options["inductor_compile_config"]} == options
    config.generator.engine.extra = {
        "compilation_config": {"inductor_compile_config": {"benchmark_combo_kernel": True}}
    }
    options = engine_arguments("model", config, "cuda")["compilation_config"]
    assert options["inductor_compile_config"]["benchmark_combo_kernel"] is True


LOOK = """
import sys
from forge_hpc.generation.options import inspect_architecture, prepare_environment

started = []
prepare_environment()
from vllm import EngineArgs

def note(event, arguments):
    if event == "subprocess.Popen" and "vllm.model_executor.models.registry" in arguments[1]:
        started.append(arguments[1])

sys.addaudithook(note)
model_dir, looks_here = sys.argv[1:]
if looks_here == "True":
    inspect_architecture(model_dir)
inspect_architecture(model_dir + "/that is not there")  # vLLM says so by itself
EngineArgs(model=model_dir, dtype="float32").create_model_config()
print("started", len(started))
"""


@pytest.mark.slow
@pytest.mark.parametrize("looks_here", [True, False])
def test_vllm_starts_no_process_to_look_at_a_model(model_dir: Path, tmp_path: Path, looks_here: bool) -> None:
    environ = {**os.environ, "VLLM_CACHE_ROOT": str(tmp_path)}  # where it would find what it has found before
    command = [sys.executable, "-c", LOOK, str(model_dir), str(looks_here)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ, cwd=PROJECT)
    assert result.stdout.split()[-2:] == ["started", "0" if looks_here else "1"], result.stdout + result.stderr


def test_a_cancelled_call_leaves_the_engine_to_others(engine: GenerationEngine) -> None:
    first, second = prompts(2)

    async def run() -> list[Completion]:
        cancelled = asyncio.create_task(engine.generate(first, 40, seed=0))
        await until(lambda: engine.stats().num_running > 0 and engine.stats().num_waiting > 0)
        cancelled.cancel()
        completions = await engine.generate(second, 1, seed=0, max_tokens=2)
        await until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
        return completions

    assert len(asyncio.run(run())) == 1


def sampled_batch(engine: GenerationEngine) -> list[list[dict]]:
    batch = asyncio.run(engine.generate_batch(prompts(8), 4, seed=9, max_tokens=10))
    return [[asdict(completion) for completion in group] for group in batch]


FRESH_PROCESS = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
from test_generation import GenerationEngine, sampled_batch, tiny_config
from pathlib import Path
if __name__ == "__main__":
    engine = GenerationEngine(sys.argv[2], tiny_config(), device="cpu")
    Path(sys.argv[3]).write_text(json.dumps(sampled_batch(engine)))
    engine.close()
"""


@pytest.mark.slow
def test_a_batch_repeats_bitwise_in_a_fresh_process_and_after_updates(
    engine: GenerationEngine, model_dir: Path, tmp_path: Path
) -> None:
    script, out = tmp_path / "fresh.py", tmp_path / "fresh.json"
    script.write_text(FRESH_PROCESS)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(model_dir), str(out)]
    fresh = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    try:
        model = reference_model(model_dir)
        for version in (1, 2, 3):
            asyncio.run(engine.load_weights(version, perturbed(model, version).items()))
            sampled_batch(engine)
        restore(engine, model_dir)
        batch = json.loads(json.dumps(sampled_batch(engine)))
        assert json.loads(json.dumps(sampled_batch(engine))) == batch
        assert fresh.wait(120) == 0
    finally:
        fresh.kill()
        fresh.wait()
    assert json.loads(out.read_text()) == batch


def test_the_tensors_of_a_kv_cache_lie_in_one_allocation(engine: GenerationEngine) -> None:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

    assert 0.09 < engine.kv_cache_bytes / 2**30 <= 0.1
    tensor: dict[str, Any] = {"layers": ["0"], "layer_stride": 0, "block_stride": 1024}
    tensors = [KVCacheTensor(size=4096, **tensor), KVCacheTensor(size=4096, offset=2048, **tensor)]
    assert cache_bytes(KVCacheConfig(num_blocks=4, kv_cache_tensors=tensors, kv_cache_groups=[])) == 4096
    assert cache_bytes(KVCacheConfig(num_blocks=0, kv_cache_tensors=[], kv_cache_groups=[])) == 0


def test_a_crash_while_stepping_reaches_every_caller(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = GenerationEngine(model_dir, tiny_config(), device="cpu", kv_cache_bytes=60 << 20)
    assert 59 << 20 < engine.kv_cache_bytes <= 60 << 20  # whole blocks
    step = engine._engine.step

    def failing_step() -> list:
        if engine.stats().num_steps == 2:
            raise RuntimeError("the kernel is on strike")
        return step()

    monkeypatch.setattr(engine._engine, "step", failing_step)
    first, second = prompts(2)

    async def run() -> list:
        calls = engine.generate(first, 40, seed=0), engine.generate_batch([second], 2, seed=0)
        return await asyncio.gather(*calls, return_exceptions=True)

    for error in asyncio.run(run()):
        assert isinstance(error, GenerationError)
        assert "the kernel is on strike" in str(error)
    with pytest.raises(GenerationError, match="the kernel is on strike"):
        asyncio.run(engine.generate(first, 1, seed=0))
    engine.close()
    engine.close()


@pytest.mark.slow
def test_tensor_parallel_workers_take_new_weights(model_dir: Path) -> None:
    config = tiny_config()
    config.generator.engine.tensor_parallel_size = 2
    engine = GenerationEngine(model_dir, config, device="cpu")
    try:
        model = reference_model(model_dir)
        [prompt] = prompts(1)

        async def run() -> list[Completion]:
            await engine.load_weights(1, perturbed(model, 1).items())
            return await engine.generate(prompt, 2, seed=0, max_tokens=6)

        for completion in asyncio.run(run()):
            assert_agrees(model, prompt, completion)
            assert completion.policy_versions == (1, 1)
    finally:
        engine.close()
    assert not list(Path("/dev/shm").glob("forge-hpc-weights-*"))


def test_weights_that_a_killed_process_has_staged_go_with_its_node(tmp_path: Path) -> None:
    script = """if True:
        import subprocess, sys
        from pathlib import Path
        from forge_hpc.cluster.allocation import Allocation
        from forge_hpc.run_dir import RunDir
        from forge_hpc.supervisor.node import Node

        stage = "import os, torch; from forge_hpc.generation.staging import staged_checkpoint as staged\\n" \\
                "with staged([('a', torch.ones(3))], torch.float32) as d: print(d, flush=True); os.kill(os.getpid(), 9)"
        node = Node(RunDir(Path(sys.argv[1])).create(), Allocation("7", 0, 1, 0))
        env = node.environment(Path(sys.argv[1]))
        killed = subprocess.run([sys.executable, "-c", stage], env=env, stdout=subprocess.PIPE, text=True)
        staged = Path(killed.stdout.strip())
        print(killed.returncode, staged.parts[:3], len(list(staged.iterdir())))
        node.close()
        print(staged.parent.exists())
    """
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=PROJECT)
    assert done.stdout.splitlines() == ["-9 ('/', 'dev', 'shm') 1", "False"], done.stderr


def test_what_vllm_refuses_of_its_options_reaches_another_process(tmp_path: Path) -> None:
    """Its own error cannot be sent: the controller would learn nothing but that."""
    write_tiny_qwen3(tmp_path, 0, max_position_embeddings=64)
    config = tiny_config()  # 190 tokens
    with pytest.raises(UserError, match=r"vLLM refuses the options of its engine: .*max_model_len \(190\)") as refused:
        GenerationEngine(tmp_path, config, device="cpu")
    arrived = pickle.loads(pickle.dumps(refused.value))
    assert (arrived.message, arrived.hint) == (refused.value.message, "see generator.engine")

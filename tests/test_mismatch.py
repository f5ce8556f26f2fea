"""Generator and trainer compute one policy, or no step is taken: real engines, of which one holds other weights."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_group import documents_of
from runs import read, run_local, small_run, status
from test_resume import make_session

from forge_hpc.config import Config
from forge_hpc.data.builtin import char_tokenizer, write_tiny_qwen3
from forge_hpc.data.types import Document, Episode, Group, Prompt
from forge_hpc.generation import GenerationEngine
from forge_hpc.rollouts.mismatch import MismatchWatch
from forge_hpc.run_dir import RunDir
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """For trainer and generator, whose end in this process is the group's end."""
    init_distributed(tmp_path / "store", rank=0, world_size=1, local_rank=0, timeout_s=60)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def configuration() -> Config:
    config = Config()
    config.model.dtype = "bfloat16"
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 8, 12
    config.generator.engine.kv_cache_memory_gib = 0.1
    config.trainer.optimizer.lr = 5e-3
    config.trainer.training.seq_len = 256
    return config


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one shape, with different weights."""
    return [write_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=seed, dim=64, hidden_dim=128) for seed in (0, 1)]


@pytest.fixture
def generator(models: list[Path], process_group: None) -> Iterator[GenerationEngine]:
    engine = GenerationEngine(models[0], configuration(), device="cpu")
    yield engine
    engine.close()


def sampled(generator: GenerationEngine, step: int) -> list[Document]:
    """Documents of a step, longer answers the better."""
    tokenizer = char_tokenizer()
    prompts = [Prompt(8 * step + i, f"{i}+1=", tokenizer(f"{i}+1=")["input_ids"], "") for i in range(8)]
    batch = asyncio.run(generator.generate_batch(prompts, 8, seed=0))
    groups = [
        Group(prompt, [Episode(prompt, c, float(len(c.token_ids) + c.sample_index % 2)) for c in completions])
        for prompt, completions in zip(prompts, batch, strict=True)
        if not isinstance(completions, ValueError)
    ]
    return documents_of(groups, configuration())


def test_in_bfloat16_other_weights_end_the_run_before_a_step_is_taken(
    models: list[Path], generator: GenerationEngine
) -> None:
    warnings: list[str] = []
    watch = MismatchWatch(configuration(), on_cuda=False, warn=warnings.append)
    trainer = TrainEngine(configuration(), models[0])
    for step in range(1, 4):  # as it should be
        documents = sampled(generator, step)
        bounds = watch.bounds(step, documents)
        metrics = trainer.train_step(documents, max_mismatch=bounds.largest)
        watch.check(step, metrics, bounds)
        assert 1e-5 < metrics["mismatch/logprob_abs_mean"] < bounds.explained < bounds.largest
        asyncio.run(generator.load_weights(step, trainer.hf_state_dict().items()))
    assert not warnings

    other = TrainEngine(configuration(), models[1])
    documents = sampled(generator, 4)
    before = {name: tensor.clone() for name, tensor in other.hf_state_dict().items()}
    with pytest.raises(RuntimeError, match=r"step 1: generator and trainer differ by \d.* stale or wrong"):
        other.train_step(documents, max_mismatch=watch.bounds(4, documents).largest)
    assert other.step == 0 and not any(optimizer.state for optimizer in other.optimizers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.hf_state_dict().items())


def test_weights_that_are_never_published_end_the_run_also_in_bfloat16(
    models: list[Path], generator: GenerationEngine
) -> None:
    watch = MismatchWatch(configuration(), on_cuda=False, warn=lambda text: None)
    trainer = TrainEngine(configuration(), models[0])
    with pytest.raises(RuntimeError, match="stale or wrong"):
        for step in range(1, 30):
            documents = sampled(generator, step)
            assert all(document.policy_version == step - 1 for document in documents)
            trainer.train_step(documents, max_mismatch=watch.bounds(step, documents).largest)
            asyncio.run(generator.relabel(step))  # the version of weights that it did not get
    assert 1 <= trainer.step < 20


def bounds(
    dtype: str, age: int = 0, temperature: float = 1.0, on_cuda: bool = False, **extra: str
) -> tuple[float, float]:
    config = configuration()
    config.model.dtype, config.rollout.sampling.temperature = dtype, temperature
    config.generator.engine.extra = dict(extra)
    document = Document(torch.zeros(2).numpy(), torch.ones(2).numpy(), policy_version=9 - age)
    return MismatchWatch(config, on_cuda, lambda text: None).bounds(10, [document])


def test_what_is_explained_follows_from_the_dtypes_the_age_of_the_samples_and_the_temperature() -> None:
    assert bounds("float32") == pytest.approx((1e-4, 1e-3))
    assert bounds("bfloat16") == bounds("float32", kv_cache_dtype="fp8") == pytest.approx((0.05, 0.5))
    assert bounds("float32", on_cuda=True) == bounds("bfloat16")  # where the trainer computes in bfloat16
    assert bounds("bfloat16", age=4) == pytest.approx((1.05, 2.5))
    assert bounds("bfloat16", temperature=0.25) == pytest.approx((0.1, 1.0))
    assert bounds("bfloat16", temperature=1.5) == bounds("bfloat16")
    config = configuration()
    config.rollout.max_staleness = 4
    unknown = Document(torch.zeros(2).numpy(), torch.ones(2).numpy())
    watch = MismatchWatch(config, False, lambda text: None)
    assert watch.bounds(10, [unknown]) == pytest.approx((1.05, 2.5))
    assert watch.bounds(10, [])[1] < 1


def test_a_mismatch_that_is_not_explained_is_warned_of_now_and_then() -> None:
    warnings: list[str] = []
    watch = MismatchWatch(configuration(), False, warnings.append)
    for step in range(1, 101):
        watch.check(step, {"mismatch/logprob_abs_mean": 0.1}, watch.bounds(step, []))
        watch.check(step, {"mismatch/logprob_abs_mean": 0.01}, watch.bounds(step, []))
        watch.check(step, {}, watch.bounds(step, []))
    assert [int(line.partition(":")[0].removeprefix("step ")) for line in warnings] == [1, 2, 4, 8, 16, 32, 64]
    assert "differ by 0.1 nats" in warnings[0] and "(64 such steps)" in warnings[-1] and math.isfinite(watch.num_steps)


def test_kernels_that_are_alike_explain_nothing_but_the_age_of_samples() -> None:
    config = configuration()
    config.model.batch_invariant = True
    new, old = (Document(torch.zeros(2).numpy(), torch.ones(2).numpy(), policy_version=9 - age) for age in (0, 1))
    watch = MismatchWatch(config, True, lambda text: None)
    assert watch.bounds(10, [new]) == (1e-6, 0.5)
    assert watch.bounds(10, [old]) == pytest.approx((0.5, 1.5), rel=1e-3)
    config.generator.engine.extra = {"kv_cache_dtype": "fp8"}
    assert MismatchWatch(config, True, lambda text: None).bounds(10, [new])[0] == 0.05


def test_the_warning_is_seen_on_the_terminal_and_in_the_status_and_the_bound_is_the_trainers(
    tmp_path: Path,
) -> None:
    asked: list[tuple[bool, float]] = []

    class Trainers:
        async def with_reference(self, documents: list[Document]) -> list[Document]:
            assert session.is_between_steps  # what a reference costs that is lost costs no step
            return [new]

        async def train_step(self, documents: list[Document], update: bool, max_mismatch: float) -> dict[str, float]:
            assert documents == [new] and not session.is_between_steps
            asked.append((update, max_mismatch))
            return {"mismatch/logprob_abs_mean": 0.2, "tokens/trained": 1}

    new = Document(torch.zeros(2).numpy(), torch.ones(2).numpy(), policy_version=0)
    session: Any = None

    async def scenario() -> None:
        nonlocal session
        run_dir = RunDir(tmp_path / "run").create()
        run_dir.write_status(state="running")
        session = make_session(run_dir, configuration())
        session._trainers = Trainers()  # type: ignore[assignment]
        session._mismatch = MismatchWatch(configuration(), False, session.warn)
        with session.open_records(stream):
            await session.train_step(1, [], update=False)
        session._status.flush(60)

    stream = io.StringIO()
    asyncio.run(scenario())
    assert stream.getvalue().startswith("warning: step 1: generator and trainer differ by 0.2 nats")
    assert status(tmp_path / "run")["message"].startswith("step 1: generator and trainer differ")
    assert asked == [(False, pytest.approx(0.5))]


@pytest.mark.timeout(900)
def test_a_run_whose_engine_computes_another_model_fails_at_once_and_leaves_nothing_wrong(tmp_path: Path) -> None:
    """vLLM is told another epsilon of the norms, by an argument that it takes as it takes all."""
    options = ["model.dtype=bfloat16", "generator.engine.extra={hf_overrides: {rms_norm_eps: 3.0}}"]
    options += ["evaluation.num_prompts=0", "checkpoint.interval=1", "rollout.max_staleness=2"]
    result = run_local(tmp_path / "run", [*small_run(tmp_path, 4), *options])
    assert result.returncode == 1, result.stdout + result.stderr
    assert "step 1: generator and trainer differ by" in result.stderr.splitlines()[-1]
    assert status(tmp_path / "run")["state"] == "failed"
    assert not read(tmp_path / "run") and not list((tmp_path / "run/checkpoints").glob("step-*"))
    assert not (tmp_path / "run/export").exists()

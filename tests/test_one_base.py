"""Several adapters at once on one base: each learns what a run of it alone learns, to the last bit."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import DEMO, REWARD, read, run_local, small_run, start_local, status, wait_for
from safetensors.torch import load_file
from test_generation import GREEDY, prompts, tiny_config
from tiny_models import random_documents

from forge_hpc.cancel import cancel_runs
from forge_hpc.cli import main
from forge_hpc.config import UserError, load_config, read_config, safe_changes, save_config, validate
from forge_hpc.config.adapters import adapter_configs, total_steps
from forge_hpc.config.load import override_of, with_overrides
from forge_hpc.config.schema import Config
from forge_hpc.controller.adapters import AdapterSessions
from forge_hpc.controller.recovery import Leave, Recoveries
from forge_hpc.controller.service import Service
from forge_hpc.controller.session import Session
from forge_hpc.data.builtin import write_tiny_qwen3
from forge_hpc.data.types import Completion
from forge_hpc.generation import GenerationEngine
from forge_hpc.hub.pins import Pins
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter
from forge_hpc.submission import _is_complete, _refuse_busy
from forge_hpc.sweep_dir import SweepDir
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine

VARIED = ["seed=3 trainer.optimizer.lr=1e-2", "seed=4 trainer.optimizer.lr=3e-2 trainer.lora.alpha=4"]
ADAPTERS = ["trainer.lora.enable=true", "trainer.lora.rank=4", "trainer.lora.publish=adapters"]
TIMES = ("wall_time", "time/", "perf/", "time_s")
"""What no two runs have in common."""


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As everywhere, but that vLLM ends the default group with its engine."""
    init_distributed(tmp_path_factory.mktemp("store") / "store", rank=0, world_size=1, local_rank=0, timeout_s=60)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return write_tiny_qwen3(directory, seed=0, dim=64, hidden_dim=128, tie_word_embeddings=True)


def config() -> Config:
    cfg = tiny_config()
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_response_tokens = 8, 16
    cfg.trainer.lora.enable, cfg.trainer.lora.publish, cfg.trainer.lora.rank = True, "adapters", 4
    cfg.trainer.lora.sweep = list(VARIED)
    cfg.trainer.training.seq_len = 64
    cfg.checkpoint.async_save = False
    return cfg


def trained(engine: TrainEngine) -> dict[str, torch.Tensor]:
    engine.take_turn()
    return {name: tensor.clone() for name, tensor in engine.published(cast=False).items()}


def step(engine: TrainEngine, number: int) -> dict[str, float]:
    engine.take_turn()
    return engine.train_step(random_documents(9, seed=number))


# ---- trainers


def test_adapters_that_take_turns_on_one_base_learn_what_each_learns_alone(
    process_group: None, model_dir: Path, tmp_path: Path
) -> None:
    configs = adapter_configs(config())
    alone = []
    for cfg in configs:
        engine = TrainEngine(cfg, model_dir)
        alone.append(([step(engine, n) for n in range(4)], trained(engine)))
    first = TrainEngine(configs[0], model_dir)
    second = TrainEngine(configs[1], model_dir, base=first)
    assert second.model is first.model  # no second copy of anything
    together: list[list[dict[str, float]]] = [[], []]
    for number in range(2):
        together[0].append(step(first, number))
        together[1].append(step(second, number))
    for name, engine in (("first", first), ("second", second)):
        engine.take_turn()
        engine.save(tmp_path / name / "trainer")
    for number in (2, 3):  # the other way round
        together[1].append(step(second, number))
        together[0].append(step(first, number))
    for engine, metrics, (own_metrics, own) in zip((first, second), together, alone, strict=True):
        assert metrics == own_metrics  # to the last bit
        found = trained(engine)
        assert all(torch.equal(found[name], own[name]) for name in own)
    for name, engine in (("first", first), ("second", second)):
        engine.take_turn()
        engine.load(tmp_path / name / "trainer")
    for engine, (own_metrics, own) in zip((second, first), reversed(alone), strict=True):
        assert [step(engine, number) for number in (2, 3)] == own_metrics[2:]
        assert all(torch.equal(tensor, own[name]) for name, tensor in trained(engine).items())


# ---- generators


def answer(engine: GenerationEngine, adapter: int = 0, seed: int = 1) -> list[Completion]:
    call = engine.generate_batch(prompts(3), 2, seed=seed, sampling=None if seed > 1 else GREEDY, adapter=adapter)
    return [completion for group in asyncio.run(call) for completion in group]  # type: ignore[union-attr]


def test_an_engine_of_several_adapters_answers_with_the_one_that_is_asked(process_group: None, model_dir: Path) -> None:
    configs = adapter_configs(config())
    published = []
    for cfg in configs:
        trainer = TrainEngine(cfg, model_dir)
        for number in range(3):
            step(trainer, number)
        published.append(trained(trainer))
    engine = GenerationEngine(model_dir, config(), device="cpu")
    try:
        base = answer(engine)
        assert [c.token_ids for c in answer(engine, 1)] == [c.token_ids for c in base]
        asyncio.run(engine.load_weights(7, published[1].items(), 1))
        assert [c.policy_versions for c in answer(engine, 1)] == [(7, 7)] * 6
        assert [c.token_ids for c in answer(engine, 0)] == [c.token_ids for c in base]  # the other is as it was
        assert [c.policy_versions for c in answer(engine, 0)] == [(0, 0)] * 6

        def mixed() -> list[list[list[int]]]:
            """What both answer where they are asked at once."""

            async def ask() -> list[Any]:
                calls = (engine.generate_batch(prompts(3), 2, seed=1, sampling=GREEDY, adapter=n) for n in (0, 1))
                return await asyncio.gather(*calls)

            return [[c.token_ids for group in groups for c in group] for groups in asyncio.run(ask())]

        assert mixed() == [[c.token_ids for c in base], [c.token_ids for c in answer(engine, 1)]]
        asyncio.run(engine.load_weights(3, published[0].items(), 0))
        together = [answer(engine, adapter, seed) for adapter in (0, 1) for seed in (1, 2)]
        assert mixed() == [[c.token_ids for c in together[number]] for number in (0, 2)]
        asyncio.run(engine.relabel(4, 0))
        assert {c.policy_versions for c in answer(engine, 0)} == {(4, 4)}
        diverged = {name: 1e30 * tensor for name, tensor in published[1].items()}
        asyncio.run(engine.load_weights(8, diverged.items(), 1))
        assert not all(math.isfinite(value) for c in answer(engine, 1) for value in c.logprobs)
        assert [c.logprobs for c in answer(engine, 0)] == [c.logprobs for c in together[0]]  # not touched by it
    finally:
        engine.close()
    for number, cfg in enumerate(configs):
        engine = GenerationEngine(model_dir, cfg, device="cpu")
        try:
            asyncio.run(engine.load_weights(1, published[number].items()))
            for seed in (1, 2):
                ours, theirs = together[2 * number + seed - 1], answer(engine, 0, seed)
                assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
                assert [c.logprobs for c in ours] == [c.logprobs for c in theirs]  # to the last bit
        finally:
            engine.close()


# ---- configuration


def test_the_configuration_of_an_adapter_is_that_of_a_run_of_it_alone() -> None:
    cfg = load_config(DEMO, [*ADAPTERS, override_of("trainer.lora.sweep", VARIED)])
    for item, own in zip(VARIED, adapter_configs(cfg), strict=True):
        assert own == load_config(DEMO, [*ADAPTERS, *item.split()])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.lora.publish=merged"], "generators hold several adapters, and they get merged weights"),
        (["trainer.lora.sweep=['trainer.lora.rank=8']"], "cannot differ in trainer.lora.rank"),
        (["trainer.lora.sweep=['data.split=test']"], "cannot differ in data.split"),
        (["trainer.lora.sweep=['sede=1']"], "unknown key sede"),
        (["trainer.lora.sweep=['rollout.group_size=1']"], "rollout.group_size is 1"),
        (["generator.weight_transport=nccl"], "weight_transport=nccl"),
        (["recipe=ppo"], "it has 'critic' beside the policy"),
        (['served=[{name: judge, path: "builtin:qwen3-tiny"}]'], "served models stand beside one run"),
        (["recipe=sft"], "it does not generate beside its training"),
    ],
)
def test_what_adapters_on_one_base_cannot_do_is_refused(overrides: list[str], words: str) -> None:
    sweep = override_of("trainer.lora.sweep", VARIED)
    with pytest.raises(UserError, match=words):
        validate(load_config(DEMO, [*ADAPTERS, sweep, *overrides]), check_paths=False)


def test_a_sweep_with_one_base_is_one_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["submit", "--cluster", "local", "--config", str(DEMO), "--dry-run", "--run-dir", str(tmp_path / "run")]
    sweep = ["--sweep", "seed=0,1", "trainer.optimizer.lr=1e-3,1e-4", "--one-base"]
    assert main([*command, *ADAPTERS, *sweep]) == 0
    assert main([*command, *sweep]) == 2
    assert "set trainer.lora.enable=true and trainer.lora.publish=adapters" in capsys.readouterr().err
    assert main([*command, *ADAPTERS, "--one-base"]) == 2
    assert "--one-base is for the adapters of a --sweep" in capsys.readouterr().err


# ---- what is told of a run


def attempt(config: Config, run_dir: RunDir, status: StatusWriter) -> AdapterSessions:
    nothing: Any = None  # no process is asked for anything
    leave, recoveries = Leave(), Recoveries(0)
    return AdapterSessions(config, run_dir, run_dir.logs, nothing, nothing, recoveries, leave, 0, status)


def test_the_step_of_a_run_is_of_the_slowest_that_still_trains_and_in_the_end_its_last(tmp_path: Path) -> None:
    sweep = ["trainer.training.steps=4", "trainer.training.steps=8", "seed=1"]  # of 6
    cfg = load_config(DEMO, [*ADAPTERS, override_of("trainer.lora.sweep", sweep), "trainer.training.steps=6"])
    run_dir = RunDir(tmp_path / "run").create()
    for number in range(3):
        RunDir(run_dir.adapters / str(number)).create()

    async def scenario() -> None:
        status = StatusWriter(run_dir)
        status.update(state="running", step=0)
        sessions = attempt(cfg, run_dir, status)

        def step_after(number: int, **told: Any) -> int:
            sessions._statuses[number].update(**told)
            status.flush(30)
            found = run_dir.read_status()
            assert found is not None
            return found.step

        for number in range(3):
            assert step_after(number, state="running", step=0) == 0
        assert [step_after(number, step=number + 2) for number in range(3)] == [0, 0, 2]
        assert step_after(0, step=4) == 3  # it has done all of its steps: the others go on
        assert step_after(1, step=7) == 4
        sessions._failed[2] = RuntimeError("a loss that is not finite")
        assert step_after(2, state="failed") == 7
        assert step_after(1, step=8) == 8 == total_steps(cfg)

    asyncio.run(scenario())
    assert not _is_complete(cfg, run_dir.read_status())
    done = run_dir.write_status(state="completed")
    assert _is_complete(cfg, done)
    assert safe_changes(cfg, cfg, done.step, "it", "no") == []  # 8 steps are what one of them was asked for


def test_one_adapter_is_no_run_of_its_own_while_all_of_them_are_at_work(tmp_path: Path) -> None:
    cfg = load_config(DEMO, [*ADAPTERS, override_of("trainer.lora.sweep", VARIED)])
    run_dir = RunDir(tmp_path / "run").create()
    adapter = RunDir(run_dir.adapters / "1").create()
    for place in (run_dir, adapter):
        save_config(cfg, place.config)
        place.write_status(state="running")
    with run_dir.lock():
        with pytest.raises(UserError, match=f"works on {run_dir} already"):
            _refuse_busy(adapter)
        with pytest.raises(UserError, match=f"{adapter} is one of the adapters of {run_dir}") as refused:
            cancel_runs([adapter], now=False)
        assert refused.value.hint == f"forge-hpc cancel {run_dir} ends all of them"
    with adapter.lock(), pytest.raises(UserError, match=f"works on {adapter} already"):
        _refuse_busy(run_dir)
    _refuse_busy(adapter)
    _refuse_busy(run_dir)


def test_an_adapter_that_went_further_alone_keeps_its_steps(tmp_path: Path) -> None:
    sweep = override_of("trainer.lora.sweep", VARIED)
    cfg = load_config(DEMO, [*ADAPTERS, sweep, "trainer.training.steps=6"])
    run_dir = RunDir(tmp_path / "run").create()

    async def make() -> list[int]:
        sessions = attempt(cfg, run_dir, StatusWriter(run_dir))
        sessions._make(Pins(run_dir.path))
        kept = [read_config(RunDir(run_dir.adapters / n).config) for n in "01"]
        assert kept == sessions._configs
        return [own.trainer.training.steps for own in kept]

    assert asyncio.run(make()) == [6, 6]
    alone = RunDir(run_dir.adapters / "1")
    save_config(with_overrides(read_config(alone.config), ["trainer.training.steps=500"]), alone.config)
    alone.checkpoint(6).mkdir(parents=True)
    assert asyncio.run(make()) == [6, 6]  # asked to, and has not
    save_config(with_overrides(read_config(alone.config), ["trainer.training.steps=500"]), alone.config)
    alone.checkpoint(9).mkdir()
    assert asyncio.run(make()) == [6, 500]


def test_the_directories_say_what_is_varied_now_and_keep_the_users_files(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def score(prompt, response, target, **fields):\n    return 0.0\n")
    run_dir = RunDir(tmp_path / "run").create()

    async def make(sweep: list[str]) -> None:
        reward = f"reward=[{{name: '{tmp_path / 'reward.py'}:score'}}]"
        cfg = load_config(DEMO, [*ADAPTERS, override_of("trainer.lora.sweep", sweep), reward])
        attempt(cfg, run_dir, StatusWriter(run_dir))._make(Pins(run_dir.path))

    for sweep in (["seed=1"], ["seed=1", "seed=2"]):
        asyncio.run(make(sweep))
        assert SweepDir(run_dir.adapters).overrides() == [[item] for item in sweep]
    for adapter in SweepDir(run_dir.adapters).runs:
        assert [path.suffix for path in (adapter.path / "code").iterdir() if path.name != "files.json"] == [".py"]


def test_what_an_adapter_that_has_failed_had_asked_for_is_given_up(tmp_path: Path) -> None:
    cfg = load_config(DEMO, [*ADAPTERS, override_of("trainer.lora.sweep", VARIED)])
    run_dir = RunDir(tmp_path / "run").create()
    RunDir(run_dir.adapters / "1").create()
    run_dir.write_status(state="running")
    aborted: list[dict[str, int]] = []

    async def abort(**options: int) -> None:
        aborted.append(options)

    async def scenario() -> None:
        sessions = attempt(cfg, run_dir, StatusWriter(run_dir))
        service = Service("generator", 2, 30.0, lambda *lost: None)
        for index in range(2):
            await service.admit(index, SimpleNamespace(abort=SimpleNamespace(call_one=abort)))
        nothing: Any = None
        own = [
            Session(own, run_dir, run_dir.logs, nothing, nothing, Recoveries(0), Leave()) for own in sessions._configs
        ]
        own[1]._generators = service.of(1)
        sessions._sessions = own
        await sessions._run(1, nothing)
        assert list(sessions._failed) == [1]

    asyncio.run(scenario())
    assert aborted == [{"adapter": 1}] * 2  # of every engine, and nothing of the other's


# ---- whole runs


def figures(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """What the run computed."""
    return [
        {key: value for key, value in record.items() if not key.startswith(TIMES)} for record in read(run_dir, name)
    ]


def overrides_of(tmp_path: Path, *more: str) -> list[str]:
    model = tmp_path / "model"
    if not model.exists():
        write_tiny_qwen3(model, seed=0)
    common = [f"model.path={model}", "trainer.optimizer.lr=1e-2", "rollout.prompts_per_step=4", *ADAPTERS]
    return [*small_run(tmp_path, 4, REWARD), *common, *more]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_in_a_run_of_several_adapters_none_sees_the_others(tmp_path: Path) -> None:
    run_dir, sweep = tmp_path / "run", ["seed=5", "seed=6", "seed=5"]
    small = ["evaluation.num_prompts=4", "trainer.training.steps=2", override_of("trainer.lora.sweep", sweep)]
    result = run_local(run_dir, overrides_of(tmp_path, *small))
    assert result.returncode == 0, result.stdout + result.stderr
    first, other, third = (SweepDir(run_dir / "adapters").run(number).path for number in range(3))
    assert [record["step"] for record in figures(first)] == [1, 2]
    assert figures(first) == figures(third) != figures(other)
    assert figures(first, "evaluations.jsonl") == figures(third, "evaluations.jsonl")
    assert all(status(path)["state"] == "completed" for path in (run_dir, first, other, third))
    assert status(run_dir)["step"] == status(other)["step"] == 2
    assert "1 (seed=6): completed after 2 steps" in result.stdout
    exports = [load_file(path / "export" / "adapter" / "adapter_model.safetensors") for path in (first, third)]
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])


@pytest.mark.training
@pytest.mark.timeout(3000)
def test_a_run_of_several_adapters_learns_what_each_learns_alone_also_across_a_preemption(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = overrides_of(tmp_path, override_of("trainer.lora.sweep", VARIED))
    process = start_local(run_dir, arguments)
    wait_for(lambda: len(read(run_dir / "adapters/1")) > 1, "a second step", 900)
    process.terminate()
    out, err = process.communicate(timeout=600)
    assert process.returncode != 0, out + err
    result = run_local(run_dir, arguments, timeout_s=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    for number, item in enumerate(VARIED):
        alone = tmp_path / f"alone{number}"
        result = run_local(alone, overrides_of(tmp_path, *item.split()), timeout_s=1200)
        assert result.returncode == 0, result.stdout + result.stderr
        adapter = run_dir / "adapters" / str(number)
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            assert figures(adapter, name) == figures(alone, name), (number, name)
        ours, theirs = (load_file(path / "export/model.safetensors") for path in (adapter, alone))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert json.loads((adapter / "status.json").read_text())["state"] == "completed"
        before, after = read_config(alone / "config.yaml"), read_config(adapter / "config.yaml")
        assert before.trainer == after.trainer and before.seed == after.seed


@pytest.mark.training
@pytest.mark.timeout(1500)
def test_an_adapter_that_diverges_keeps_no_other_from_its_end_and_fails_the_run(tmp_path: Path) -> None:
    run_dir, sweep = tmp_path / "run", ["seed=5", "trainer.optimizer.lr=1e30"]
    result = run_local(run_dir, overrides_of(tmp_path, override_of("trainer.lora.sweep", sweep)), timeout_s=1200)
    assert result.returncode == 1
    assert "adapter 1 (trainer.optimizer.lr=1e30)" in result.stdout + result.stderr
    assert status(run_dir)["state"] == "failed" and status(run_dir / "adapters/1")["state"] == "failed"
    assert status(run_dir / "adapters/0")["state"] == "completed" and len(read(run_dir / "adapters/0")) == 4


FAILS_ON_ONE_RANK = """import torch
import torch.distributed as dist
from forge_hpc.losses import LossOutput


def loss(logprobs, advantages, mask, *, normalizer, **fields):
    if dist.get_rank() == 1:
        raise ValueError("unlucky")
    return LossOutput(-torch.where(mask, logprobs * advantages, 0).sum() / normalizer, {})
"""


@pytest.mark.training
@pytest.mark.timeout(600)
def test_one_trainer_rank_that_fails_while_the_other_waits_ends_all_adapters(tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text(FAILS_ON_ONE_RANK)
    given = [f"algorithm.loss={tmp_path}/loss.py:loss", "trainer.processes_per_node=2", "evaluation.num_prompts=0"]
    sweep = override_of("trainer.lora.sweep", ["seed=5", "seed=6"])
    result = run_local(tmp_path / "run", overrides_of(tmp_path, *given, sweep))
    assert result.returncode == 1
    assert status(tmp_path / "run")["message"] == "ValueError: unlucky", "not that it has not answered for half an hour"

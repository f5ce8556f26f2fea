"""Whole runs with an environment, and the page that tells how to write one."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
import yaml
from runs import PROJECT, check_contract, read, run_local, small_run

from forge_hpc.config import Config, load_config
from forge_hpc.config.schema import EnvironmentConfig
from forge_hpc.config.validate import validate
from forge_hpc.data.types import Prompt
from forge_hpc.environments import EnvironmentPool, Step

STEPS = 5


def guessing_run(directory: Path, *overrides: str) -> list[str]:
    game = [
        "reward=[]",
        "environment.name=guessing",
        "environment.args={low: 1, high: 9}",
        "environment.max_turns=3",
        "environment.max_turn_tokens=4",
        "rollout.max_prompt_tokens=40",
        "rollout.max_response_tokens=48",
        "evaluation.num_prompts=8",
        "evaluation.samples=4",
        "evaluation.k=[1, 4]",
    ]
    return [item for item in small_run(directory, STEPS) if not item.startswith("reward=")] + [*game, *overrides]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_an_environment_trains_on_what_was_generated_and_repeats_exactly(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        directory = tmp_path / name
        directory.mkdir()
        result = run_local(directory / "run", guessing_run(directory))
        assert result.returncode == 0, result.stdout + result.stderr
        runs.append(directory / "run")
    first, second = runs
    check_contract(first, STEPS)
    metrics = read(first)
    # With another context, or another token, the trainer's log-probabilities would be others.
    assert all(0 < record["mismatch/logprob_abs_mean"] < 1e-5 for record in metrics)
    assert all(1 < record["episode/turns_mean"] <= 3 for record in metrics)
    assert any(record["reward/environment"] > 0 for record in metrics)
    assert all(record["reward/mean"] == record["reward/environment"] for record in metrics)
    assert all(len(rollout["transcript"]) == 2 * rollout["turns"] for rollout in read(first, "rollouts.jsonl"))
    for key in ("reward/mean", "loss", "grad_norm", "tokens/generated", "episode/turns_mean"):
        assert [record[key] for record in metrics] == [record[key] for record in read(second)]
    assert len({(run / "export/model.safetensors").read_bytes() for run in runs}) == 1

    def figures(run_dir: Path) -> list[dict[str, object]]:
        return [{k: v for k, v in record.items() if "time" not in k} for record in read(run_dir, "evaluations.jsonl")]

    assert figures(first) == figures(second)
    assert [record["step"] for record in figures(first)] == [0, STEPS]
    assert all(0 < record["pass@1"] < record["pass@4"] <= 1 for record in figures(first))
    options = [*guessing_run(tmp_path), f"model.path={first / 'export'}", "recipe=eval"]
    result = run_local(tmp_path / "alone", options)
    assert result.returncode == 0, result.stdout + result.stderr
    [alone] = figures(tmp_path / "alone")
    assert [alone[key] for key in ("accuracy", "reward")] == [figures(first)[-1][key] for key in ("accuracy", "reward")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_asynchronous_run_whose_episodes_wait_for_their_turn_keeps_the_staleness_bound(tmp_path: Path) -> None:
    bounds = ["rollout.max_staleness=2", "environment.max_open_episodes=5"]
    result = run_local(tmp_path / "run", guessing_run(tmp_path, *bounds, "evaluation.interval=2"))
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = read(tmp_path / "run")
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    assert all(record["staleness/max"] <= 2 and record["episode/turns_mean"] > 1 for record in metrics)
    assert all(record["episodes/failed"] == record["groups/unequal_openings"] == 0 for record in metrics)


def test_the_page_about_your_own_environment_shows_one_that_works(tmp_path: Path) -> None:
    page = (PROJECT / "docs/environments.md").read_text()
    code, tools = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    settings, several, *servers = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    (tmp_path / "capitals.py").write_text(code)
    settings["environment"]["name"] = f"{tmp_path}/{settings['environment']['name']}"
    config = Config(reward=settings["reward"], environment=EnvironmentConfig(**settings["environment"]))
    validate(config)
    (tmp_path / "units.py").write_text(tools)
    validate(Config(reward=[], environment=EnvironmentConfig(name=f"{tmp_path}/units.py:Units")))
    (tmp_path / "several.yaml").write_text(yaml.dump(several))
    validate(load_config(tmp_path / "several.yaml"))
    for server in servers:
        if "environment" in server:
            validate(Config(environment=EnvironmentConfig(**server["environment"])))
        else:  # other packages beside each other, which tests/test_peers_together.py trains on
            assert server["sources"]

    async def talk() -> tuple[object, list[Step]]:
        pool = await EnvironmentPool(config, num_workers=1).start()
        try:
            async with pool.open() as environment:
                opening = await environment.reset(Prompt(0, "", [1], "Paris", {}, "France"))
                return opening, [await environment.step("London?"), await environment.step("It is Paris.")]
        finally:
            await pool.close()

    opening, [wrong, right] = asyncio.run(talk())
    assert opening == "What is the capital of France?"
    assert wrong == Step("No. It begins with P.", info={"hint": "P"})
    assert right == Step("Right.", reward=0.8, done=True)

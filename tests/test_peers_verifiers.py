"""An environment of the published ``verifiers``, which knows nothing of this project, trains through the endpoint.

Not part of the default tests, since it installs about 100 packages: ``make peers``.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from endpoints import Scripted, bpe_tokenizer, endpoint_config
from published import at_home, tasks, verifiers, write_tasks
from runs import PROJECT, check_contract, read, run_local

from forge_hpc.config import Config, UserError
from forge_hpc.data.types import Episode, Prompt, Turn
from forge_hpc.endpoint import Endpoint
from forge_hpc.environments import EnvironmentPool
from forge_hpc.rollouts.agents import AgentPlayer

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1800)]
BPE = bpe_tokenizer()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return verifiers(tmp_path_factory)


@pytest.fixture(autouse=True)
def home(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_home(python, monkeypatch)


def settings(python: Path, **env: Any) -> Config:
    """The page's example, for a taskset of the tests."""
    page = (PROJECT / "docs/agents.md").read_text()
    [text] = [part for part in page.split("```yaml\n")[1:] if "verifiers:episode" in part]
    environment = yaml.safe_load(text.partition("```")[0])["environment"]
    args = environment["args"] | {"taskset": {"id": "sums-v1"}} | env
    config = endpoint_config(args=args, timeout_s=300.0, venv=str(python.parent.parent))
    config.environment.name = environment["name"]
    return config


def test_its_tasks_are_the_prompts_and_its_reward_is_that_of_the_tokens_that_were_sampled(python: Path) -> None:
    def reply(turn: Turn) -> tuple[str, list[int], str]:
        return "12345678", [*BPE.encode("12345678"), BPE.eos_token_id], "stop"

    sampler = Scripted(reply)
    rows = tasks(python, '{"id": "sums-v1", "num_tasks": 9}', "--first", "7")
    assert [row["question"] for row in rows] == ["7+0=", "8+0="]

    async def play() -> list[Any]:
        config = settings(python)
        endpoint = await Endpoint(config, BPE, sampler).start()
        pool = await EnvironmentPool(config, num_workers=1).start()
        try:
            prompts = [Prompt(i, row["question"], [5], None, row, row["question"]) for i, row in enumerate(rows)]
            return [episode async for _, episode in AgentPlayer(config, BPE, endpoint, pool).stream(prompts, 2)]
        finally:
            await pool.close()
            await endpoint.close()

    episodes = asyncio.run(asyncio.wait_for(play(), 600))
    assert [type(episode) for episode in episodes] == [Episode] * 4
    for episode in episodes:
        assert episode.reward == 0.5  # 8 of 16 characters, says the taskset
        assert episode.completion.metadata["info"] == {"rewards": {"length": 0.5}, "metrics": {"right": 0.0}}
        assert episode.completion.token_ids == [*BPE.encode("12345678"), BPE.eos_token_id]
    assert len(sampler.given) == 4


def test_what_verifiers_cannot_make_is_refused_before_the_run(python: Path) -> None:
    async def start(config: Config) -> None:
        pool = EnvironmentPool(config, num_workers=1)
        try:
            await pool.start()
        finally:
            await pool.close()

    for env, words in (({"taskset": {"id": "nothing"}}, "taskset 'nothing' not found"), ({"agnet": {}}, "agnet")):
        with pytest.raises(UserError, match=words):
            asyncio.run(start(settings(python, **env)))
    config = settings(python)
    config.environment.venv = None
    with pytest.raises(UserError, match=r"verifiers 0\.4 cannot be imported") as refused:
        asyncio.run(start(config))
    assert refused.value.hint is not None and "environment.venv" in refused.value.hint


@pytest.mark.parametrize(
    ("taskset", "words"),
    [
        ("nothing", "taskset 'nothing' not found"),
        ('{"id": "sums-v1", "num": 9}', "num"),
        ('{"id": ', "error: verifiers: Expecting value"),
        ("{}", "the taskset has no 'id'"),
    ],
)
def test_a_taskset_that_there_is_not_is_said_in_a_line(python: Path, taskset: str, words: str) -> None:
    command = [python, "-m", "forge_hpc.environments.verifiers", taskset]
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_a_run_of_twenty_steps_trains_on_it(python: Path, tmp_path: Path) -> None:
    write_tasks(python, tmp_path)
    config = settings(python)
    result = run_local(
        tmp_path / "run",
        [
            "model.path=builtin:qwen3-tiny-chat",
            f"data={{path: '{tmp_path}/train.jsonl', eval_path: '{tmp_path}/test.jsonl', target_field: null}}",
            f"environment.name={config.environment.name}",
            f"environment.venv={config.environment.venv}",
            f"environment.args={json.dumps(config.environment.args)}",
            "environment.max_turn_tokens=12",
            "environment.timeout_s=600",
            "trainer.training.steps=20",
            "trainer.lr_scheduler.warmup_steps=0",
            "trainer.optimizer.lr=1e-3",
            "rollout.prompts_per_step=2",
            "rollout.group_size=2",
            "evaluation.num_prompts=2",
            "logging.num_rollouts_per_step=2",
            "generator.engine.kv_cache_memory_gib=0.25",
        ],
        timeout_s=1700,
        config=PROJECT / "configs/agent/demo.yaml",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    check_contract(tmp_path / "run", 20)
    for record in read(tmp_path / "run"):
        assert record["episodes/failed"] == record["endpoint/refused"] == record["endpoint/strangers"] == 0
        assert record["mismatch/logprob_abs_mean"] < 1e-5  # as trained is as sampled
        assert record["endpoint/requests"] >= 4 and record["reward/mean"] > 0

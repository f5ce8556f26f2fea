"""Environments of three published packages in one run, each by its share, and a preemption in its midst.

Not part of the default tests, since it installs some hundred packages: ``make peers``.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from published import GYMS, at_home, echo_server, installed, verifiers, write_tasks
from runs import PROJECT, check_contract, read, run_local, start_local, status, wait_for

pytestmark = [pytest.mark.peers, pytest.mark.timeout(3600)]
STEPS, PROMPTS, GROUP = 20, 4, 2
SHARES = {"tasks": 1, "puzzles": 2, "echo": 1}
"""Prompts of a step, by source."""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return verifiers(tmp_path_factory)


@pytest.fixture(scope="module")
def gyms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed("gyms", GYMS, tmp_path_factory)


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    venv = installed("openenv-core-0.3.0", ["openenv-core==0.3.0"], tmp_path_factory)
    yield from echo_server(venv / "bin/python", tmp_path_factory.mktemp("echo"))


def write_config(folder: Path, harness: Path, gyms: Path, url: str) -> Path:
    """The page's example, with a tiny model and short answers."""
    page = (PROJECT / "docs/environments.md").read_text()
    blocks = [part.partition("```")[0] for part in page.split("```yaml\n")[1:]]
    [config] = [yaml.safe_load(block) for block in blocks if "name: puzzles" in block]
    tasks, puzzles, echo = config["sources"]
    tasks["environment"]["venv"], puzzles["environment"]["venv"] = str(harness.parent.parent), str(gyms)
    tasks["environment"]["args"]["taskset"] = {"id": "sums-v1"}
    echo["environment"]["args"]["url"] = url
    echo["environment"]["max_turns"] = 2
    training = {"steps": STEPS, "seq_len": 512, "local_batch_size": 1, "mixed_precision_param": "float32"}
    config |= {
        "model": {"path": "builtin:qwen3-tiny-chat", "dtype": "float32"},
        "environment": {"max_turn_tokens": 12, "timeout_s": 900},
        "rollout": {
            "prompts_per_step": PROMPTS,
            "group_size": GROUP,
            "max_prompt_tokens": 400,
            "max_response_tokens": 64,
            "max_staleness": 0,
        },
        "generator": {"engine": {"kv_cache_memory_gib": 0.25}},
        "trainer": {"optimizer": {"lr": 1e-3}, "lr_scheduler": {"warmup_steps": 0}, "training": training},
        "checkpoint": {"interval": 5},
        "evaluation": {"num_prompts": 2},
        "logging": {"num_groups_per_step": PROMPTS},
        "cluster": {"gpus_per_node": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "config.yaml"


def programs_of(venv: Path) -> list[list[str]]:
    """Command lines of what runs in a virtual environment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(str(venv) in word for word in command[:2]):
            found.append(command)
    return found


def test_three_packages_train_in_one_run_by_their_shares_and_a_preemption_loses_nothing(
    harness: Path, gyms: Path, echo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home(harness, monkeypatch)
    write_tasks(harness, tmp_path)
    config, run_dir = write_config(tmp_path, harness, gyms, echo), tmp_path / "run"
    run = start_local(run_dir, [], config)
    try:
        wait_for(lambda: len(read(run_dir)) >= STEPS // 3 or run.poll() is not None, "a third of the steps", 1500)
        assert run.poll() is None, run.communicate()
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 75, out + err
    assert status(run_dir)["state"] == "preempted" and STEPS // 3 <= len(read(run_dir)) < STEPS
    result = run_local(run_dir, [], timeout_s=1500, config=config)
    assert result.returncode == 0, result.stdout + result.stderr
    wait_for(lambda: not programs_of(harness.parent.parent) + programs_of(gyms), "the end of all programs", 30)

    check_contract(run_dir, STEPS)
    rollouts = read(run_dir, "rollouts.jsonl")
    assert sorted((record["step"], record["position"], record["sample"]) for record in rollouts) == [
        (1 + position // PROMPTS, position, sample) for position in range(STEPS * PROMPTS) for sample in range(GROUP)
    ], "every episode once, in its step"
    for record in read(run_dir):
        own = [rollout for rollout in rollouts if rollout["step"] == record["step"]]
        assert Counter(rollout["source"] for rollout in own) == {name: GROUP * num for name, num in SHARES.items()}
        assert record["episodes/failed"] == record["endpoint/refused"] == record["endpoint/strangers"] == 0
        assert record["endpoint/requests"] >= GROUP and record["staleness/max"] == 0
        assert record["mismatch/logprob_abs_mean"] < 1e-5  # as trained is as sampled
        rewards = {name: record[f"source/{name}/reward/mean"] for name in SHARES}
        assert record["reward/mean"] == pytest.approx(sum(SHARES[name] * rewards[name] for name in SHARES) / PROMPTS)
        assert rewards["tasks"] > 0 and rewards["echo"] > 0
        assert [record[f"source/{name}/groups/drawn"] for name in SHARES] == list(SHARES.values())
        assert record["source/echo/episode/turns_mean"] == 2 and record["source/puzzles/episode/turns_mean"] == 1
    evaluations = read(run_dir, "evaluations.jsonl")
    assert [record["step"] for record in evaluations] == [0, STEPS]
    for record in evaluations:
        assert record["num_failed"] == 0 and all(record[f"source/{name}/num_prompts"] == 2 for name in SHARES)

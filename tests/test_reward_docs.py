"""docs/rewards.md says what is true: its example runs, and its tables are complete."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from forge_hpc.config.load import load_config
from forge_hpc.config.registry import REWARDS
from forge_hpc.config.validate import validate
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.rewards import RewardError, RewardPool

PAGE = (Path(__file__).parent.parent / "docs/rewards.md").read_text(encoding="utf-8")


def test_the_example_of_a_reward_of_ones_own_runs(tmp_path: Path):
    source, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)  # the other asks a judge: test_served.py
    (tmp_path / "rewards.py").write_text(source)
    (tmp_path / "config.yaml").write_text(
        "reward:\n"
        "  - {name: 'rewards.py:names_the_answer', args: {word: sum}}\n"
        "  - {name: 'rewards.py:Concise', weight: 0.5, args: {max_words: 2}}\n"
        "  - {name: 'rewards.py:Slow'}\n"
    )
    config = load_config(tmp_path / "config.yaml")
    validate(config)

    async def main() -> tuple[float, dict[str, float]]:
        async with RewardPool(config, num_workers=1) as pool:
            prompt = Prompt(0, "2+2=", [1], "4", {"difficulty": 2})
            return await pool.score(prompt, Completion(0, "The sum is 4", [1], [0], "stop", (0, 0)))

    assert asyncio.run(main()) == (2.25, {"names_the_answer": 1.0, "Concise": 0.5, "Slow": 1.0})


@pytest.mark.parametrize("block", [0, -1])
def test_its_configurations_are_valid(tmp_path: Path, block: int):
    text = re.findall(r"```\n(reward:\n.*?)```", PAGE, re.DOTALL)[block]
    (tmp_path / "rewards.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0])
    (tmp_path / "config.yaml").write_text(text)
    validate(load_config(tmp_path / "config.yaml"))


def test_its_tables_are_complete():
    for name, place in REWARDS.items():
        assert re.search(rf"^\| .*`{name}`.*\| `{place.rpartition(':')[2]}` \|", PAGE, re.MULTILINE), name
    assert set(re.findall(r"^\| `rewards/failed_(\w+)` \|", PAGE, re.MULTILINE)) == set(RewardError.KINDS)
